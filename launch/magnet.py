"""MagNet against attackers who do not know it, know one of many like it, or know it.

    python launch/magnet.py                                  # digits, small CNN
    python launch/magnet.py --num_autoencoders=4 --alpha=0.5
    python launch/magnet.py --flagfile=launch/presets/magnet_mnist.flags
    python launch/magnet.py --flagfile=launch/presets/magnet_gray_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/,
gray_box.csv and figures/gray_box.png, the accuracy behind each reformer on images made against each
other one. Run again, it does only what is missing, with the same numbers. An image counts as
defended when a detector rejects it or its reformed copy is answered correctly.

With --smoke about a minute of CPU time, nearly all of it compiling; the white box is left out then,
and the autoencoders are trained too little to keep the digits readable. Expect the black box to be
rejected or reformed, and the white box to break the reformer; launch/presets/magnet_mnist.flags and
magnet_gray_mnist.flags have numbers.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli, defended_flags

cli.define_common_flags("runs/magnet")
cli.define_network_flags(num_examples=200)
defended_flags.define_defence_flags()
flags.DEFINE_string("settings", "all", "black box, white box, gray box, with commas; or all.")
flags.DEFINE_string("attacks", "all", "Attacks of the black box with commas, or all.")
flags.DEFINE_string("epsilons", "0.1,0.2", "Radii of fgsm and bim, in linf.")
flags.DEFINE_string("confidences", "0,10,20,30,40", "Kappas of Carlini and Wagner's l2 attack.")
flags.DEFINE_string("linf_confidences", "0", "Kappas of their linf attack.")
flags.DEFINE_string("temperatures", "10,40", "Of the detectors by divergence; empty for none.")
flags.DEFINE_float("false_positive_rate", 0.001, "Budget of each detector.")
flags.DEFINE_float("noise", 0.1, "Standard deviation of the autoencoders' training noise.")
flags.DEFINE_integer("ae_num_epochs", 100, "Epochs of the autoencoders.")
flags.DEFINE_integer("ae_batch_size", 256, "Their images a step.")
flags.DEFINE_float("ae_learning_rate", 1e-3, "Of their Adam, with a cosine schedule to 0.")
flags.DEFINE_integer("num_autoencoders", 8, "Autoencoders of the gray box.")
flags.DEFINE_float("alpha", 0.2, "Weight of their diversity.")
flags.DEFINE_string("gray_widths", "3", "Channels of their encoders, with commas.")
flags.DEFINE_integer("gray_num_examples", 100, "Test images in the gray box.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import magnet

    values: dict[str, Any] = defended_flags.values_of(magnet.Config)
    for name in ("epsilons", "confidences", "linf_confidences", "temperatures"):
        values[name] = cli.parse_range(name, values[name]) if values[name] else ()
    values |= {
        "settings": (
            magnet.SETTINGS if FLAGS.settings == "all" else cli.parse_names(FLAGS.settings)
        ),
        "attacks": magnet.ATTACKS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks),
        "gray_widths": cli.parse_whole("gray_widths", FLAGS.gray_widths),
    }
    config = magnet.Config(**values)
    config.check()  # what is wrong is said even where --smoke would replace it
    if FLAGS.smoke:
        config = magnet.smaller(config)
    study = magnet.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        magnet.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
