"""The power law of the adversarial error on random networks and on one that is near perfect.

    python launch/power_law.py                                  # digits
    python launch/power_law.py --flagfile=launch/presets/power_law_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv (a row for each
network and attack), checkpoints/ and figures/{exponents,curves}.png. Run again, it trains only the
networks that are missing, with the same numbers.

The preset takes some 40 minutes of CPU time and gave median exponents of 1.07 (FGSM) and 1.98 (step
l.l.) on 500 networks. On one GPU it was not run.
"""

import dataclasses
from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/power_law")
cli.define_network_flags(num_examples=5000)
flags.DEFINE_bool("near_perfect", True, "Also train one network well and attack it in four ways.")
flags.DEFINE_integer("num_networks", 500, "Random architectures.")
flags.DEFINE_string("kind", "fully_connected", "fully_connected or cnn.")
flags.DEFINE_integer("max_width", 0, "Their largest width; 0 for the largest of the kind.")
flags.DEFINE_string("population_attacks", "fgsm,least_likely", "fgm, fgsm, pgd, least_likely.")
flags.DEFINE_integer("population_train", 2000, "Training images for them; 0 for all.")
flags.DEFINE_integer("population_examples", 1000, "Test images for them.")
flags.DEFINE_integer("population_epochs", 3, "Training epochs for them.")
flags.DEFINE_integer("group_size", 32, "Networks a program.")
flags.DEFINE_integer("num_epsilons", 10, "Epsilons of each curve.")
flags.DEFINE_float("ceiling", 0.1, "Largest error of the window of the fit.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import power_law

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(power_law.Config)
    }
    values["population_attacks"] = cli.parse_names(FLAGS.population_attacks)
    config = power_law.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = power_law.smaller(config)
    study = power_law.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        power_law.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
