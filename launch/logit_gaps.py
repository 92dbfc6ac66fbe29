"""Logit gaps near zero, the first-order response to FGSM, and the mean-field theory of the error.

    python launch/logit_gaps.py                                 # digits, MLP and small CNN
    python launch/logit_gaps.py --flagfile=launch/presets/logit_gaps.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/,
arrays/ and figures/{densities,responses,mean_field,linearity}.png. Run again, it does only the
networks that are missing, with the same numbers.

The preset takes 140 seconds of CPU time; expect exponents of Delta_12 within 0.1 of 0 (one run,
seed 0). On one GPU it was not run.
"""

import dataclasses
from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/logit_gaps")
flags.DEFINE_string("datasets", "digits", "Data sets with commas: see docs/data.md.")
flags.DEFINE_string("models", "mlp,cnn", "Names of advjax.models.NAMES with commas.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_examples", 10_000, "Test images whose gaps are looked at, at most.")
flags.DEFINE_integer("num_responses", 2000, "Of them, those whose response to FGSM is.")
flags.DEFINE_integer("num_epochs", 10, "Training epochs.")
flags.DEFINE_integer("batch_size", 64, "Training images a step.")
flags.DEFINE_float("learning_rate", 1e-3, "Of Adam, with a cosine schedule to 0.")
flags.DEFINE_float("share", 0.05, "Share of the gaps that the fit near zero uses.")
flags.DEFINE_string("small_epsilons", "0.005,0.01,0.02,0.05", "Ends of the explained variance.")
flags.DEFINE_float("max_epsilon", 0.1, "End of the mean-field curves.")
flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0, upper_bound=2**31 - 2)

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import logit_differences

    fields = dataclasses.fields(logit_differences.Config)
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in fields}
    values |= {
        "datasets": cli.parse_names(FLAGS.datasets),
        "models": cli.parse_names(FLAGS.models),
        "small_epsilons": cli.parse_range("small_epsilons", FLAGS.small_epsilons),
    }
    config = logit_differences.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = logit_differences.smaller(config)
    study = logit_differences.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        logit_differences.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
