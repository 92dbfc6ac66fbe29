"""Architecture search for robust networks: small cells, judged by FGSM on validation images.

    python launch/architecture_search.py                        # digits, two experiments
    python launch/architecture_search.py --controllers=evolution --experiments=step_ll

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv (a row a child),
correlations.csv and figures/{children,rounds}.png. Run again, it goes on with the next round.

The preset takes some ten minutes of CPU time; expect a correlation of adversarial with clean
accuracy of .95 (one run, seed 0). On one GPU it was not run.
"""

import dataclasses
from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/architecture_search")
flags.DEFINE_string("dataset", "digits", "Data set: see docs/data.md.")
flags.DEFINE_string("experiments", "step_ll,pgd", "Trained on: clean, step_ll, pgd, with commas.")
flags.DEFINE_string("controllers", "evolution,reinforce,random", "A search each, with commas.")
flags.DEFINE_integer("num_rounds", 10, "Rounds of each search.")
flags.DEFINE_integer("num_children", 16, "Children a round.")
flags.DEFINE_float("epsilon", 0.1, "Of the training and of the reward.")
flags.DEFINE_integer("num_train", 0, "Training images of a child; 0 for all but the validation's.")
flags.DEFINE_integer("num_validation", 400, "Images for the reward.")
flags.DEFINE_integer("num_epochs", 5, "Training epochs of a child.")
flags.DEFINE_integer("batch_size", 64, "Training images a step.")
flags.DEFINE_float("learning_rate", 3e-3, "Of Adam.")
flags.DEFINE_string("method", "map", "map: one child after the other; vmap: side by side.")
flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0, upper_bound=2**31 - 2)

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import architecture_search

    fields = dataclasses.fields(architecture_search.Config)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    values |= {name: cli.parse_names(values[name]) for name in ("experiments", "controllers")}
    config = architecture_search.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = architecture_search.smaller(config)
    study = architecture_search.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        architecture_search.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
