"""FMPA: every table and figure of its evaluation, one command each.

    python launch/fmpa.py                                            # Table 1 on the digits
    python launch/fmpa.py --study=deviation                          # Table 2 on the digits
    python launch/fmpa.py --flagfile=launch/presets/fmpa_table1_mnist.flags --scale=0.25

Studies: impact (Table 1), deviation (Table 2), attackers (Figure 2), references (Figure 3),
sampling and clients (Figure 4), non_iid. Settings: mnist_fc, mnist_fc_sgd (one gradient a round),
emnist_cnn, cifar10_resnet20, cifar10_vgg16, digits_mlp. A smaller --scale keeps clients, attackers,
rules, attacks and partition and takes fewer rounds, test images and, of the larger networks, local
steps and images a step.

Writes under --workdir: results.csv (one row a condition, seed, attack and rule), the tables as
.csv, .md and .tex with mean and deviation over the seeds, paper.csv (our values beside what is
known of the paper's), figures as .png and .pdf, and a folder for each condition as
launch/federated.py writes it. Run again, it does only the cells that are missing.
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/fmpa")
flags.DEFINE_string("study", "impact", "Which table or figure: see above.")
flags.DEFINE_string("setting", "digits_mlp", "Data, network and clients: see above.")
flags.DEFINE_float("scale", 1.0, "Size of the study, in (0, 1].")
flags.DEFINE_string("seeds", "0,1,2", "A partition, a network and orders of batches a seed.")
flags.DEFINE_string("attacks", "", "Attacks with commas between them; empty for the study's.")
flags.DEFINE_string("rules", "", "Rules with commas between them; empty for the study's.")
flags.DEFINE_multi_string(
    "override", [], "NAME=VALUE of a field of experiments.federated.Config; may be repeated."
)
flags.DEFINE_bool("all_devices", False, "Split the clients over all devices (on a CPU: cores).")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import fmpa

    config = fmpa.Config(
        study=FLAGS.study,
        setting=FLAGS.setting,
        scale=FLAGS.scale,
        seeds=cli.parse_seeds(FLAGS.seeds),
        attacks=cli.parse_names(FLAGS.attacks),
        rules=cli.parse_names(FLAGS.rules),
        overrides=tuple(fmpa.parse_override(text) for text in FLAGS.override),
    )
    if FLAGS.smoke:
        config = fmpa.tiny(config)
    study = fmpa.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir, mesh=cli.make_mesh())
    if parallel.is_main_process():
        fmpa.print_study(study)


if __name__ == "__main__":
    cli.run(main)
