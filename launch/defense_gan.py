"""Defense-GAN: classifiers behind a generator, white-box attacks on them, and BPDA.

    python launch/defense_gan.py --smoke
    python launch/defense_gan.py --flagfile=launch/presets/defense_gan_mnist.flags
    python launch/defense_gan.py --more_models= --trained_on=both --attacks=fgsm,bpda

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/,
examples/ (attacked images) and figures/: steps.png, the effect of L, and ATTACK.png, images and
their copies. Run again, it does only what is missing, with the same numbers.

With --smoke 40 seconds of CPU time, which is too little for a generator that copies digits.
launch/presets/defense_gan_mnist.flags has numbers.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli, defended_flags

cli.define_common_flags("runs/defense_gan")
cli.define_network_flags(num_examples=100)
defended_flags.define_defence_flags()
flags.DEFINE_string("more_models", "mlp", "Further classifiers beside --model, with commas.")
flags.DEFINE_string("trained_on", "original,reconstructed", "And both; a classifier each.")
flags.DEFINE_integer("num_fit", 4000, "Training images of the classifiers.")
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all.")
flags.DEFINE_float("epsilon", 0.3, "Radius of the attacks, in linf.")
flags.DEFINE_float("alpha", 0.05, "The random step of rand_fgsm.")
flags.DEFINE_integer("bpda_num_steps", 20, "Steps of pgd in BPDA.")
flags.DEFINE_integer("bpda_descent_steps", 50, "L while BPDA attacks.")
flags.DEFINE_integer("bpda_restarts", 2, "R while BPDA attacks.")
flags.DEFINE_integer("descent_steps", 200, "L of the defence.")
flags.DEFINE_integer("restarts", 10, "R of the defence.")
flags.DEFINE_float("descent_rate", 10.0, "Learning rate of the descent.")
flags.DEFINE_float("momentum", 0.7, "Of the descent.")
flags.DEFINE_string("curve", "5,10,25,50,100", "Further values of L for the first classifier.")
flags.DEFINE_integer("fit_descent_steps", 50, "L for the classifiers' training images.")
flags.DEFINE_integer("fit_restarts", 2, "R for the classifiers' training images.")
flags.DEFINE_integer("latent_size", 64, "Length of z.")
flags.DEFINE_integer("features", 16, "Channels of the generator.")
flags.DEFINE_string("critic_features", "16,32", "Channels of the critic, with commas.")
flags.DEFINE_integer("gan_num_steps", 30_000, "Steps of the generator's training.")
flags.DEFINE_integer("gan_critic_steps", 5, "Steps of the critic for each.")
flags.DEFINE_float("gan_learning_rate", 1e-4, "Of both.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import defense_gan

    values: dict[str, Any] = defended_flags.values_of(defense_gan.Config)
    for name in ("more_models", "trained_on", "attacks"):
        values[name] = cli.parse_names(values[name])
    if FLAGS.attacks == "all":
        values["attacks"] = defense_gan.ATTACKS
    for name in ("curve", "critic_features"):
        values[name] = cli.parse_whole(name, values[name]) if values[name] else ()
    config = defense_gan.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = defense_gan.smaller(config)
    study = defense_gan.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        defense_gan.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
