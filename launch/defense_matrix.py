"""All defences against all attackers: black box, gray box, white box and the adaptive attack.

    python launch/defense_matrix.py                              # digits, small CNN
    python launch/defense_matrix.py --defences=none,pgd,magnet --attacks=pgd,adaptive
    python launch/defense_matrix.py --flagfile=launch/presets/defense_matrix_digits.flags  # an MLP
    python launch/defense_matrix.py --flagfile=launch/presets/defense_matrix_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, table.csv, table.md,
table.tex, checkpoints/NAME/ (every network) and figures/matrix.png. Run again, it does only what is
missing, with the same numbers; a killed training goes on. A cell is the accuracy on the first
--num_examples test images; of MagNet an adversarial image that is rejected counts as right.

With --smoke two defences and one attack, half a minute of CPU time, most of it compiling. The first
five rows of the default took 2.7 minutes of CPU time and the rest was not run; no time on a GPU was
measured. Expect the adaptive attack to be the worst of nearly every row; the preset of the digits
has numbers.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli, defended_flags

cli.define_common_flags("runs/defense_matrix")
cli.define_network_flags(num_examples=100)
flags.DEFINE_string("defences", "all", "Rows with commas between them, or all.")
flags.DEFINE_string("threats", "all", "black box, gray box, white box, with commas; or all.")
flags.DEFINE_string("attacks", "all", "fgsm, bim, pgd, cw, adaptive, with commas; or all.")
flags.DEFINE_float("epsilon", 0.1, "Radius in linf, in training and in the test.")
flags.DEFINE_integer("num_steps", 20, "Steps of bim, pgd and cw.")
flags.DEFINE_integer("num_auto_steps", 50, "AutoAttack, and APGD past the detectors: steps.")
flags.DEFINE_integer("num_queries", 500, "AutoAttack: queries of Square.")
flags.DEFINE_integer("attack_batch_size", 100, "Images attacked at a time.")
flags.DEFINE_string("surrogate", "cnn", "Architecture of the black box's substitute.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_held_out", 200, "The last of them, which no network sees.")
flags.DEFINE_float("alpha", 0.5, "fgsm, ensemble: share of the clean loss.")
flags.DEFINE_float("pgd_alpha", 0.0, "pgd: the same; 0 is Madry et al.")
flags.DEFINE_integer("train_num_steps", 5, "pgd, trades: steps of the attack in training.")
flags.DEFINE_float("train_step_size", 0.04, "pgd, trades: their length.")
flags.DEFINE_float("trades_beta", 1.0, "trades: weight of the divergence.")
flags.DEFINE_float("entropy_weight", 1.0, "entropy: its weight; positive asks for sure answers.")
flags.DEFINE_string("sources", "cnn,mlp", "ensemble: architectures of the static networks.")
flags.DEFINE_float("temperature", 100.0, "distilled: T.")
flags.DEFINE_string("temperatures", "10,40", "magnet: of the detectors by divergence; or empty.")
flags.DEFINE_float("false_positive_rate", 0.01, "magnet: budget of each detector.")
flags.DEFINE_float("noise", 0.1, "magnet: deviation of the autoencoders' training noise.")
flags.DEFINE_integer("ae_num_epochs", 100, "magnet: epochs of the autoencoders.")
flags.DEFINE_integer("ae_batch_size", 64, "magnet: their images a step.")
flags.DEFINE_float("ae_learning_rate", 0.03, "magnet: of their Adam, with a cosine to 0.")
flags.DEFINE_integer("bpda_num_steps", 20, "defense_gan: steps of pgd in BPDA.")
flags.DEFINE_integer("bpda_descent_steps", 25, "defense_gan: L while it is attacked.")
flags.DEFINE_integer("bpda_restarts", 1, "defense_gan: R while it is attacked.")
flags.DEFINE_integer("descent_steps", 100, "defense_gan: L of the defence.")
flags.DEFINE_integer("restarts", 4, "defense_gan: R of the defence.")
flags.DEFINE_float("descent_rate", 10.0, "defense_gan: learning rate of the descent.")
flags.DEFINE_float("momentum", 0.7, "defense_gan: of the descent.")
flags.DEFINE_integer("latent_size", 16, "defense_gan: length of z.")
flags.DEFINE_integer("features", 16, "defense_gan: of the generator.")
flags.DEFINE_string("critic_features", "16,32", "defense_gan: of the critic, with commas.")
flags.DEFINE_integer("gan_num_steps", 2000, "defense_gan: steps of the generator's training.")
flags.DEFINE_integer("gan_critic_steps", 3, "defense_gan: steps of the critic for each.")
flags.DEFINE_float("gan_learning_rate", 1e-3, "defense_gan: of both.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import defense_matrix as study_of

    values: dict[str, Any] = defended_flags.values_of(study_of.Config)
    for name, names in (
        ("defences", study_of.DEFENCES), ("threats", study_of.THREATS),
        ("attacks", study_of.ATTACKS),
    ):  # fmt: skip
        values[name] = tuple(names) if values[name] == "all" else cli.parse_names(values[name])
    values |= {
        "sources": tuple(part.strip() for part in FLAGS.sources.split(",") if part.strip()),
        "temperatures": (
            cli.parse_range("temperatures", FLAGS.temperatures) if FLAGS.temperatures else ()
        ),
        "critic_features": cli.parse_whole("critic_features", FLAGS.critic_features),
    }
    config = study_of.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = study_of.smaller(config)
    study = study_of.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        study_of.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
