"""Adversarial images printed and photographed: destruction rates, and an attack that survives.

    python launch/physical.py                                  # digits, small CNN
    python launch/physical.py --epsilons=8/255,32/255 --num_photos=8
    python launch/physical.py --flagfile=launch/presets/physical_cifar10.flags

Fast (FGSM), iterative (BIM) and iterative least-likely attacks as published, PGD, and expectation
over transformations ("photo"), each judged on the image and on photographs of it by
advjax.attacks.photograph.

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, orderings.csv,
checkpoints/ and figures/{destruction,photographs}.png. Run again, it does only what is missing,
with the same numbers.

COST
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/physical")
cli.define_network_flags(num_examples=256)
flags.DEFINE_string("attacks", "all", "fast, iterative, least_likely, pgd, photo; or all.")
flags.DEFINE_string(
    "epsilons",
    "0.05,0.1,0.2",
    "Radii in linf: a list, or FIRST:LAST:COUNT. The default is for the digits, where the paper's "
    "4/255,8/255,16/255 do little.",
)
flags.DEFINE_integer("num_photos", 4, "Photographs of each image.")
flags.DEFINE_float("strength", 1.0, "Multiplies all that a photograph does; 0 changes nothing.")
flags.DEFINE_float("threshold", 0.8, "Least confidence in an image of the prefiltered case.")
flags.DEFINE_integer("num_steps", 40, "Steps of pgd and photo.")
flags.DEFINE_integer("num_samples", 8, "Photographs a step of photo.")
flags.DEFINE_integer("attack_batch_size", 64, "Images attacked at a time.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import physical

    config = physical.Config(
        **cli.network_settings(),
        attacks=physical.ATTACKS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks),
        epsilons=cli.parse_range("epsilons", FLAGS.epsilons),
        num_photos=FLAGS.num_photos,
        strength=FLAGS.strength,
        threshold=FLAGS.threshold,
        num_steps=FLAGS.num_steps,
        num_samples=FLAGS.num_samples,
        attack_batch_size=FLAGS.attack_batch_size,
        seed=FLAGS.seed,
    )
    if FLAGS.smoke:
        config = physical.smaller(config)
    study = physical.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        physical.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
