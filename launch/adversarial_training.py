"""Adversarial training: trains networks with several losses and attacks all of them.

    python launch/adversarial_training.py                        # digits, small CNN
    python launch/adversarial_training.py --defences=none,pgd,trades --epsilon=0.1
    python launch/adversarial_training.py --flagfile=launch/presets/adversarial_training_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, table.csv, table.md,
table.tex, checkpoints/NAME/ (every network) and figures/errors.png. Run again, it does only what is
missing, with the same numbers; a killed training goes on. Black-box attacks are made on a surrogate
that no defence has seen.

With --smoke half a minute of CPU time (without AutoAttack, whose compiling costs as much again);
expect FGSM training to halve FGSM's error on the digits, 46.5 % to 23.5 % (one run, seed 0).
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/adversarial_training")
cli.define_network_flags()
flags.DEFINE_string("defences", "none,fgsm,ensemble", "Losses with commas between them, or all.")
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all.")
flags.DEFINE_float("epsilon", 0.3, "Radius in linf, in training and in the test.")
flags.DEFINE_float("alpha", 0.5, "fgsm, ensemble: share of the clean loss.")
flags.DEFINE_float("pgd_alpha", 0.0, "pgd: the same; 0 is Madry et al.")
flags.DEFINE_float("pgd_warmup", 0.0, "pgd: share of the training in which the radius grows.")
flags.DEFINE_integer("train_num_steps", 10, "pgd, trades: steps of the attack in training.")
flags.DEFINE_float("train_step_size", 0.075, "pgd, trades: their length.")
flags.DEFINE_float("trades_beta", 1.0, "trades: weight of the divergence.")
flags.DEFINE_float("entropy_weight", 1.0, "entropy: its weight; positive asks for sure answers.")
flags.DEFINE_string("sources", "cnn,mlp", "ensemble: architectures of the static networks.")
flags.DEFINE_string("surrogate", "cnn", "Architecture that black-box attacks are made on.")
flags.DEFINE_integer("num_steps", 40, "Steps of pgd, bim and cw in the test.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_auto_examples", 128, "Test images for AutoAttack, at most.")
flags.DEFINE_integer("num_auto_steps", 100, "Its steps of APGD and FAB.")
flags.DEFINE_integer("num_queries", 5000, "Its queries of Square.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    import dataclasses

    from advjax.core import parallel
    from advjax.experiments import adversarial_training as study_of

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(study_of.Config)
    }
    for name, names in (("defences", study_of.DEFENCES), ("attacks", study_of.ATTACKS)):
        values[name] = tuple(names) if values[name] == "all" else cli.parse_names(values[name])
    values["sources"] = tuple(part.strip() for part in FLAGS.sources.split(",") if part.strip())
    config = study_of.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = study_of.smaller(config)
    study = study_of.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        study_of.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
