"""Detectors on a zoo of clean and infected models: Model X-ray, Neural Cleanse, MM-BD, MNTD.

    python launch/xray.py                                       # trains a small zoo of digits first
    python launch/xray.py --zoo=runs/zoo_mnist --detectors=all
    python launch/xray.py --zoo=runs/zoo_gtsrb --expansions=0.5,2.5,5
    python launch/xray.py --flagfile=launch/presets/xray_mnist.flags

Writes under --workdir: config.json, zoo.json (which models), manifest.json, results.jsonl and
results.csv (one row a model and detector), surveys/ (the class shares of every plane),
verdicts.csv, auroc.csv (Table 2 and 5), readings.csv (one setting varied at a time),
figures/roc.png, scores.png and readings.png. Run again, it does only what is missing or failed.
Other orders and limits are read off the stored planes, and other detectors, densities and
expansions added to them; the tables are of those that the last command named.

Scores are such that higher means more likely infected, so an AUROC below 0.5 points the wrong way.
Expect on small networks no average over attacks near the paper's 0.985 (ours: .71 to .86), and
single attacks from chance to 1; docs/studies/model_xray.md has them all.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/xray")
flags.DEFINE_string("zoo", "", "Folder of a zoo (launch/backdoor_zoo.py); a small one if empty.")
flags.DEFINE_string("detectors", "model_xray", "With commas, or all.")
flags.DEFINE_bool("with_failed", False, "Also models of the zoo that do not count.")
flags.DEFINE_integer("num_images", 60, "Clean test images that the detectors get.")
flags.DEFINE_integer("num_planes", 20, "Planes of Model X-ray.")
flags.DEFINE_string("densities", "100", "Points a side of a plane; numbers with commas.")
flags.DEFINE_string("expansions", "5", "How far planes reach, in lengths a side; with commas.")
flags.DEFINE_bool("normalised", False, "Planes orthonormal in the space of normalised images.")
flags.DEFINE_bool("clip", False, "Clip the points to [0, 1]; not the published method.")
flags.DEFINE_string("orders", "10,1,2,5", "Of the Renyi entropy; the first is the tables'.")
flags.DEFINE_string("limits", "0.5,0.3,0.4,0.6,0.7", "Of the area; the first is the tables'.")
flags.DEFINE_string("own", "true", "An image's own region: true, predicted or connected.")
flags.DEFINE_integer("cleanse_rounds", 1000, "Rounds of Neural Cleanse.")
flags.DEFINE_string("null", "gamma", "Of MM-BD: gamma, gamma_loc0, exponential or mad.")
flags.DEFINE_integer("num_shadows", 256, "Shadow models of MNTD, a kind.")
flags.DEFINE_integer("num_shadow_images", 1000, "Clean training images that MNTD has.")
flags.DEFINE_integer("seed", 0, "Of everything.", lower_bound=0, upper_bound=2**31 - 2)

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    import dataclasses

    from advjax.core import parallel
    from advjax.experiments import xray

    values: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(xray.Config)
    }
    values["detectors"] = (
        xray.DETECTORS if FLAGS.detectors == "all" else cli.parse_names(FLAGS.detectors)
    )
    values["densities"] = cli.parse_whole("densities", FLAGS.densities)
    for name in ("expansions", "orders", "limits"):
        values[name] = cli.parse_range(name, str(FLAGS[name].value))
    config = xray.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = xray.smaller(config)
    study = xray.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir, is_small=FLAGS.smoke)
    if parallel.is_main_process():
        xray.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
