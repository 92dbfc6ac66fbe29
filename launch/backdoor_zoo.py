"""A zoo for detection studies: many clean and many infected classifiers, with a manifest.

    python launch/backdoor_zoo.py                              # digits, 20 + 3 x 20 small CNNs
    python launch/backdoor_zoo.py --attacks=badnets,sig --num_clean=5 --num_infected=5
    python launch/backdoor_zoo.py --flagfile=launch/presets/zoo_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl and results.csv (one row a model),
models.csv (with verdicts), summary.csv, models/NAME/ (orbax) and, while it trains, checkpoints/.
Run again, it trains only the models that are missing, with the same weights.
`advjax.experiments.zoo.load_zoo(WORKDIR)` opens it.

A model counts if its clean accuracy is at least --min_accuracy and within --max_gap of the clean
models' mean and, if infected, its attack success rate is above --min_success; the manifest says
which failed and why. Attacks that need a clean model (low_frequency, trojannn) take the zoo's own.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/backdoor_zoo")
flags.DEFINE_string("dataset", "digits", "Data set: see docs/data.md.")
flags.DEFINE_string("model", "cnn", "Network: a name of advjax.models.NAMES.")
flags.DEFINE_string("model_options", "", "Of the network: NAME=VALUE with commas between them.")
flags.DEFINE_string("mean", "0", "The network's input becomes (x - mean) / std: one or a channel.")
flags.DEFINE_string("std", "1", "See --mean.")
flags.DEFINE_string("attacks", "badnets,blended,wanet", "Attacks with commas between them, or all.")
flags.DEFINE_string("options", "", "ATTACK.NAME=VALUE with commas between them.")
flags.DEFINE_integer("num_clean", 20, "Clean models.")
flags.DEFINE_integer("num_infected", 20, "Infected models an attack.")
flags.DEFINE_string("label_map", "all_to_one", "all_to_one, x_to_one, x_to_x or all_to_all.")
flags.DEFINE_integer("num_sources", 1, "Of x_to_one and x_to_x.")
flags.DEFINE_float("ratio", 0.1, "Poisoned share of each source class.")
flags.DEFINE_float("clean_label_ratio", 0.5, "Poisoned share of the target class, for sig.")
flags.DEFINE_float("cover_ratio", 0.1, "x_to_one, x_to_x: triggered share of the other classes.")
flags.DEFINE_bool("per_batch", None, "Poison other images in each step; as published if none.")
flags.DEFINE_string("quantise", "round", "Of poisoned images: none, floor or round (to 1/255).")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_examples", 0, "Test images that are used; 0 for all.")
flags.DEFINE_integer("num_epochs", 30, "Training epochs.")
flags.DEFINE_integer("batch_size", 64, "Training images a step.")
flags.DEFINE_string("optimizer", "adam", "sgd (momentum 0.9) or adam, with a cosine to 0.")
flags.DEFINE_float("learning_rate", 1e-3, "Its first one.")
flags.DEFINE_float("weight_decay", 5e-4, "Added to the gradient.")
flags.DEFINE_string("augment", "none", "none, crop or crop_flip.")
flags.DEFINE_string("method", "map", "Models of a group: map or vmap (one program), or loop.")
flags.DEFINE_integer("group_size", 10, "Models in a program.")
flags.DEFINE_float("min_accuracy", 0.95, "Least clean accuracy of a model that counts.")
flags.DEFINE_float("max_gap", 0.03, "Farthest from the clean models' mean.")
flags.DEFINE_float("min_success", 0.9, "An infected model's attack success is above this.")
flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0, upper_bound=2**31 - 2)
flags.DEFINE_bool("all_devices", False, "All devices: models of their own, or batches (loop).")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    import dataclasses

    from advjax import backdoor
    from advjax.core import parallel
    from advjax.experiments import zoo

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(backdoor.ZooConfig)
    }
    values["attacks"] = (
        backdoor.ATTACKS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks)
    )
    values["options"] = cli.parse_options("options", FLAGS.options)
    values["model_options"] = cli.parse_fields("model_options", FLAGS.model_options)
    values["mean"] = cli.parse_range("mean", FLAGS.mean)
    values["std"] = cli.parse_range("std", FLAGS.std)
    config = backdoor.ZooConfig(**values)
    if FLAGS.smoke:
        config = zoo.smaller(config)
    study = zoo.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir, mesh=cli.make_mesh())
    if parallel.is_main_process():
        zoo.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
