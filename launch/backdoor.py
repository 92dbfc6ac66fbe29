"""Backdoor attacks one by one: trains a clean and an infected classifier and compares them.

    python launch/backdoor.py                                   # digits, small CNN, BadNets
    python launch/backdoor.py --attacks=badnets,sig --options=badnets.size=2,sig.frequency=3
    python launch/backdoor.py --label_map=x_to_one --sources=1,2 --target=7
    python launch/backdoor.py --flagfile=launch/presets/backdoor_gtsrb.flags --attacks=all

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/,
examples/ and figures/ATTACK.png, a contact sheet of clean images, triggered ones and their
difference. Run again, it does only the attacks that are missing, with the same numbers.

With --smoke 15 seconds of CPU time; expect BadNets to succeed on all triggered digits of a small
network, at an accuracy of 96.5 % where the clean one has 98.0 % (one run, seed 0).
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/backdoor")
flags.DEFINE_string("dataset", "digits", "Data set: see docs/data.md.")
flags.DEFINE_string("model", "cnn", "Network: a name of advjax.models.NAMES.")
flags.DEFINE_string("mean", "0", "Subtracted from the input; one number, or one a channel.")
flags.DEFINE_string("std", "1", "Then divided by; one number, or one a channel.")
flags.DEFINE_string("attacks", "badnets", 'Names of backdoor.ATTACKS with commas, or "all".')
flags.DEFINE_string("options", "", "ATTACK.NAME=VALUE with commas between them.")
flags.DEFINE_string("label_map", "all_to_one", "all_to_one, x_to_one, x_to_x or all_to_all.")
flags.DEFINE_integer("target", 0, "The class that triggered images shall get.")
flags.DEFINE_string("sources", "", "Classes that x_to_one and x_to_x attack, with commas.")
flags.DEFINE_float("ratio", None, "Poisoned share of each source class; each attack's own if none.")
flags.DEFINE_float("clean_label_ratio", 0.5, "Poisoned share of the target class, for sig.")
flags.DEFINE_float("cover_ratio", 0.1, "x_to_one, x_to_x: triggered share of the other classes.")
flags.DEFINE_bool("per_batch", None, "Poison other images in each step; as published if none.")
flags.DEFINE_string("quantise", "round", "none, floor or round: how poisoned images are stored.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_examples", 10_000, "Test images that are used, at most.")
flags.DEFINE_integer("num_epochs", 30, "Training epochs.")
flags.DEFINE_integer("batch_size", 64, "Training images a step.")
flags.DEFINE_string("optimizer", "adam", "sgd (momentum 0.9) or adam, with a cosine to 0.")
flags.DEFINE_float("learning_rate", 1e-3, "Its first learning rate.")
flags.DEFINE_float("weight_decay", 5e-4, "Added to the gradient, times the weights.")
flags.DEFINE_string("augment", "none", "none, crop (4 pixels) or crop_flip.")
flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0, upper_bound=2**31 - 2)

FLAGS = flags.FLAGS


def parse_classes(text: str) -> tuple[int, ...]:
    """Classes from "1,2,3"."""
    try:
        return tuple(int(part) for part in cli.parse_names(text))
    except ValueError:
        raise ValueError(f"--sources: need classes with commas, got {text!r}.") from None


def main() -> None:
    cli.start_jax()
    import dataclasses

    import advjax
    from advjax.core import parallel
    from advjax.experiments import backdoor

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(backdoor.Config)
    }
    values |= {
        "mean": cli.parse_range("mean", FLAGS.mean),
        "std": cli.parse_range("std", FLAGS.std),
        "attacks": (
            advjax.backdoor.ATTACKS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks)
        ),
        "options": cli.parse_options("options", FLAGS.options),
        "sources": parse_classes(FLAGS.sources),
    }
    config = backdoor.Config(**values)
    if FLAGS.smoke:
        config = backdoor.smaller(config)
    study = backdoor.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        backdoor.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
