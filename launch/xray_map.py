"""One model under Model X-ray: pictures of its decision planes and the two scores.

    python launch/xray_map.py                              # BadNets on the digits, trained here
    python launch/xray_map.py --zoo=runs/zoo_mnist --name=badnets_003
    python launch/xray_map.py --checkpoint=runs/zoo_mnist/models/clean_000 --dataset=mnist

Writes under --workdir: figures/map.png (planes in the colours of their classes, the three images as
dots; more than one --expansion gives one row of planes each), shares.csv and manifest.json.

The scores are the means over the planes of the Renyi entropy (RE) and of the area of the images'
own classes (ATS); both are meant to be low where a backdoor's target spreads. A minute of CPU time
on the digits.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/xray_map")
flags.DEFINE_string("zoo", "", "Folder of a zoo (launch/backdoor_zoo.py).")
flags.DEFINE_string("name", "", "A model of the zoo; its first infected one if empty.")
flags.DEFINE_string("checkpoint", "", "An orbax checkpoint of --model, in place of --zoo.")
flags.DEFINE_string("dataset", "digits", "With --checkpoint: data set, see docs/data.md.")
flags.DEFINE_string("model", "cnn", "With --checkpoint: a name of advjax.models.NAMES.")
flags.DEFINE_string("mean", "0", "With --checkpoint: subtracted from the input.")
flags.DEFINE_string("std", "1", "With --checkpoint: then divided by.")
flags.DEFINE_integer("num_images", 60, "Clean test images.")
flags.DEFINE_integer("num_planes", 20, "Planes for the scores.")
flags.DEFINE_integer("num_shown", 5, "Planes that are drawn.")
flags.DEFINE_integer("density", 100, "Points a side.")
flags.DEFINE_string("expansions", "5,0.5", "How far planes reach; the scores are of the first.")
flags.DEFINE_bool("normalised", False, "Planes orthonormal in the space of normalised images.")
flags.DEFINE_integer("seed", 0, "Of the planes.", lower_bound=0, upper_bound=2**31 - 2)

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    import dataclasses

    from advjax.core import parallel
    from advjax.experiments import xray_map

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(xray_map.Config)
    }
    for name in ("mean", "std", "expansions"):
        values[name] = cli.parse_range(name, str(FLAGS[name].value))
    config = xray_map.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = xray_map.smaller(config)
    study = xray_map.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        xray_map.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
