"""How many pixels fool a classifier: differential evolution over one, three and five pixels.

    python launch/one_pixel.py                                # digits, small CNN
    python launch/one_pixel.py --num_pixels=1,2,4 --num_sources=2   # and every class to every other
    python launch/one_pixel.py --flagfile=launch/presets/one_pixel_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/,
examples/ and figures/{success,examples,targeted}.png. Run again, it does only what is missing,
with the same numbers. An image costs population * (generations + 1) queries.

Cost of the defaults: two and a half minutes on two busy CPU cores. Expect one pixel to fool the
network on about 34 of 100 digits, three on 98 and five on all (one run, seed 0).
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/one_pixel")
cli.define_network_flags(num_examples=100)
flags.DEFINE_string("num_pixels", "1,3,5", "How many pixels may change, with commas between them.")
flags.DEFINE_integer("population", 400, "Individuals an image.")
flags.DEFINE_integer("generations", 100, "Generations of the differential evolution.")
flags.DEFINE_string("strategy", "best1", "best1, as in SciPy, or rand1, as published.")
flags.DEFINE_float("epsilon", 1.0, "Largest change of a value; 1 leaves the colour free.")
flags.DEFINE_integer("num_sources", 0, "Images of each class attacked toward every other class.")
flags.DEFINE_integer("attack_batch_size", 32, "Images attacked at a time.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import one_pixel

    numbers = dict.fromkeys(cli.parse_range("num_pixels", FLAGS.num_pixels))
    if not all(number.is_integer() for number in numbers):
        raise ValueError(f"--num_pixels: need whole numbers, got {FLAGS.num_pixels!r}.")
    config = one_pixel.Config(
        **cli.network_settings(),
        num_pixels=tuple(map(int, numbers)),
        population=FLAGS.population,
        generations=FLAGS.generations,
        strategy=FLAGS.strategy,
        epsilon=FLAGS.epsilon,
        num_sources=FLAGS.num_sources,
        attack_batch_size=FLAGS.attack_batch_size,
        seed=FLAGS.seed,
    )
    if FLAGS.smoke:
        config = one_pixel.smaller(config)
    study = one_pixel.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        one_pixel.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
