"""Universal perturbations: one change of the pixels for all images, fitted and held out.

    python launch/universal.py                                   # digits, small CNN, both forms
    python launch/universal.py --methods=sgd --epsilons=0:0.3:7
    python launch/universal.py --flagfile=launch/presets/universal_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/,
perturbations/METHOD_EPSILON.npy and figures/{curve,perturbation}.png. Run again, it does only what
is missing, with the same numbers.

Cost of the defaults: about a minute on two CPU cores. On the digits at epsilon 0.3 expect about
85 % of the held-out images to be fooled by "sgd" and 49 % by "deepfool".
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/universal")
cli.define_network_flags()
flags.DEFINE_string("methods", "sgd,deepfool", "Forms of the attack, with commas between them.")
flags.DEFINE_string("epsilons", "0:0.4:5", "Radii: FIRST:LAST:COUNT or a list.")
flags.DEFINE_string("ball", "linf", "Norm: linf, l2 or l1.")
flags.DEFINE_integer("num_fit", 512, "Training images that the perturbation is fitted to.")
flags.DEFINE_integer("num_passes", 10, "Passes over them, at most.")
flags.DEFINE_integer("fit_batch_size", 64, "Images a step of the SGD form.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import universal

    config = universal.Config(
        **cli.network_settings(),
        seed=FLAGS.seed,
        methods=cli.parse_names(FLAGS.methods),
        epsilons=cli.parse_range("epsilons", FLAGS.epsilons),
        ball=FLAGS.ball,
        num_fit=FLAGS.num_fit,
        num_passes=FLAGS.num_passes,
        fit_batch_size=FLAGS.fit_batch_size,
    )
    if FLAGS.smoke:
        config = universal.smaller(config)
    study = universal.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        universal.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
