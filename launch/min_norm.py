"""How far is the nearest adversarial image: minimum-norm attacks on one classifier.

    python launch/min_norm.py                                   # digits, small CNN, every attack
    python launch/min_norm.py --dataset=mnist --attacks=carlini_wagner_l2,deepfool_l2,fab_l2
    python launch/min_norm.py --flagfile=launch/presets/min_norm_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/ and
figures/: the robustness curves that the distances give, one a norm, and the targeted grid of
Carlini and Wagner, source class x target class. Run again, it does only what is missing.

Cost of the defaults: about a minute on two CPU cores, most of it compilation. Expect every attack
to succeed on every image, with median distances in l2 of about 0.53 (FAB), 0.54 (DDN), 0.56
(Carlini and Wagner) and 0.57 (DeepFool), in linf 0.107 (FAB), 0.114 and 0.115 (the other two), in
l1 1.34, and two pixels (one run, seed 0).
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/min_norm")
cli.define_network_flags(num_examples=64)
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all.")
flags.DEFINE_string("epsilons_l2", "0:2:41", "Radii of the l2 curve: FIRST:LAST:COUNT or a list.")
flags.DEFINE_string("epsilons_linf", "0:0.3:31", "Radii of the linf curve.")
flags.DEFINE_string("epsilons_l1", "0:5:41", "Radii of the l1 curve.")
flags.DEFINE_string("epsilons_l0", "0:10:11", "Numbers of pixels of the l0 curve.")
flags.DEFINE_integer("num_steps", 100, "Steps of the iterated attacks.")
flags.DEFINE_integer("num_search_steps", 5, "Constants of Carlini and Wagner's l2 attack.")
flags.DEFINE_float("cw_learning_rate", 0.1, "Learning rate of Carlini and Wagner.")
flags.DEFINE_float("cw_initial_constant", 0.1, "First constant of Carlini and Wagner.")
flags.DEFINE_float("confidence", 0.0, "kappa of Carlini and Wagner.")
flags.DEFINE_bool("grid", True, "Draw the source class x target class picture.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import min_norm, tables

    names = min_norm.default_attacks() if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks)
    config = min_norm.Config(
        **cli.network_settings(),
        attacks=names,
        seed=FLAGS.seed,
        epsilons_l2=cli.parse_range("epsilons_l2", FLAGS.epsilons_l2),
        epsilons_linf=cli.parse_range("epsilons_linf", FLAGS.epsilons_linf),
        epsilons_l1=cli.parse_range("epsilons_l1", FLAGS.epsilons_l1),
        epsilons_l0=cli.parse_range("epsilons_l0", FLAGS.epsilons_l0),
        num_steps=FLAGS.num_steps,
        num_search_steps=FLAGS.num_search_steps,
        cw_learning_rate=FLAGS.cw_learning_rate,
        cw_initial_constant=FLAGS.cw_initial_constant,
        confidence=FLAGS.confidence,
        grid=FLAGS.grid,
    )
    if FLAGS.smoke:
        config = min_norm.smaller(config)
    study = min_norm.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        tables.print_distances(study, config)


if __name__ == "__main__":
    cli.run(main)
