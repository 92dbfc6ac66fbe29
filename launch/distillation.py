"""Defensive distillation: trains a teacher and a student at T, and attacks the student at T = 1.

    python launch/distillation.py                               # digits, small CNN
    python launch/distillation.py --temperature=20 --epsilon=0.1
    python launch/distillation.py --flagfile=launch/presets/distillation_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, gradients.npz,
checkpoints/NAME/ (standard, teacher, distilled), figures/success.png and figures/gradients.png: the
gradient of the cross-entropy collapses, that of the margin does not. Run again, it does only what
is missing, with the same numbers.

With --smoke 27 seconds of CPU time; expect FGSM to succeed on 100 % of the standard network's
digits and 8.5 % of the distilled one's, and PGD on the margin and CW-L2 on 100 % of both (one run,
seed 0).
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/distillation")
cli.define_network_flags()
flags.DEFINE_float("temperature", 100.0, "T in the training of the teacher and of the student.")
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all.")
flags.DEFINE_float("epsilon", 0.3, "Radius of the fixed-budget attacks, in linf.")
flags.DEFINE_integer("num_steps", 40, "Steps of PGD.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_cw_examples", 128, "Test images for Carlini and Wagner, at most.")
flags.DEFINE_integer("cw_num_steps", 200, "Steps of Carlini and Wagner's attack.")
flags.DEFINE_integer("cw_num_search_steps", 6, "Its search steps for the constant.")
flags.DEFINE_float("cw_learning_rate", 0.1, "Its step of Adam.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    import dataclasses

    from advjax.core import parallel
    from advjax.experiments import distillation

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(distillation.Config)
    }
    values["attacks"] = (
        tuple(distillation.ATTACKS) if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks)
    )
    config = distillation.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = distillation.smaller(config)
    study = distillation.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        distillation.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
