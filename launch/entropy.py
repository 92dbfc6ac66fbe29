"""What entropy regularisation buys: four ways of training, curves under step l.l. and PGD.

    python launch/entropy.py                                    # digits, small CNN and MLP
    python launch/entropy.py --flagfile=launch/presets/entropy_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/ and
figures/ATTACK.png. Run again, it does only the trainings that are missing, with the same numbers.
An MLP is what the paper calls permutation-invariant MNIST.

Two presets, an MLP (four minutes of a CPU core, Adam) and a CNN (entropy_mnist_cnn.flags, 25
minutes, SGD with momentum), three seeds each. Expect a larger median Delta_12 with the entropy.
The CNN: higher accuracy under step l.l. (76.4 to 78.0 % at 0.3, 48.4 to 56.8 at 0.4) and under PGD
(28.9 to 40.0 at 0.2). The MLP: a higher one under step l.l. with step l.l. training (70.5 to 78.9
at 0.3), a lower one under PGD. Which optimiser it is decides: docs/universality.md has the tables.
On one GPU it was not run.
"""

import dataclasses
from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/entropy")
flags.DEFINE_string("dataset", "digits", "Data set: see docs/data.md.")
flags.DEFINE_string("models", "cnn,mlp", "Names of advjax.models.NAMES with commas.")
flags.DEFINE_string("bases", "clean,step_ll", "Trained on: clean, step_ll, pgd, with commas.")
flags.DEFINE_float("weight", 1.0, "Of the entropy.")
flags.DEFINE_bool("all_images", False, "The entropy of attacked training images too.")
flags.DEFINE_float("epsilon", 0.3, "Of the adversarial training.")
flags.DEFINE_string("attacks", "least_likely,pgd,pgd_dlr", "Of the curves, with commas.")
flags.DEFINE_float("max_epsilon", 0.4, "Last epsilon of the curves.")
flags.DEFINE_integer("num_epsilons", 9, "Epsilons of the curves.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_examples", 1000, "Test images that are used, at most.")
flags.DEFINE_integer("num_epochs", 20, "Training epochs.")
flags.DEFINE_integer("batch_size", 64, "Training images a step.")
flags.DEFINE_string("optimizer", "adam", "sgd (momentum 0.9) or adam, with a cosine to 0.")
flags.DEFINE_float("learning_rate", 1e-3, "The first one.")
flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0, upper_bound=2**31 - 2)
flags.DEFINE_integer("seeds", 1, "Trainings of each kind, with the seeds from --seed on.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import entropy

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(entropy.Config)
    }
    values |= {name: cli.parse_names(values[name]) for name in ("models", "bases", "attacks")}
    config = entropy.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = entropy.smaller(config)
    study = entropy.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        entropy.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
