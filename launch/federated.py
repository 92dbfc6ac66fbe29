"""Federated training under attack: every attack against every rule, as the paper's table.

    python launch/federated.py                                   # digits, 20 clients, in minutes
    python launch/federated.py --attacks=none,lie,min_max --rules=krum,median --seeds=0,1,2
    python launch/federated.py --flagfile=launch/presets/mnist_fc.flags --all_devices

Writes under --workdir: config.json, manifest.json, results.jsonl and results.csv (one row an
evaluated round), best, final and impact as .csv, .md and .tex, figures/accuracy.png, impact.png,
curves.png and partition.png. Run again, it does only the cells that are missing, with the same
numbers. A dash is a cell that does not exist: Fang's attack is tailored to five rules.

One program is compiled for the whole table, in half a minute or less. Cost of the defaults: about
three minutes on two CPU cores.
"""

from typing import Any

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/federated")
flags.DEFINE_string("dataset", "digits", "Data set: see docs/data.md.")
flags.DEFINE_string("train_split", "train", "Split of it to train on, such as test[:85%].")
flags.DEFINE_string("test_split", "test", "Split of it to test on.")
flags.DEFINE_string("model", "mlp", "Network: a name of advjax.models.NAMES.")
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all but f_fmpa: all.")
flags.DEFINE_string("rules", "table", "Rules with commas between them, table (11 of them) or all.")
flags.DEFINE_string("seeds", "0", "A partition, a network and orders of batches a seed.")
flags.DEFINE_integer("num_clients", 20, "Clients.")
flags.DEFINE_integer("num_byzantine", 4, "Malicious ones among them.")
flags.DEFINE_string("partition", "iid", "iid, fang, dirichlet or shards.")
flags.DEFINE_float("fang_q", 0.5, "Share of a label that goes to its own group (fang).")
flags.DEFINE_float("concentration", 0.5, "Of the Dirichlet partition.")
flags.DEFINE_integer("shards_per_client", 2, "Of the partition by shards.")
flags.DEFINE_integer("num_train", 0, "Training images that are used; 0 for all.")
flags.DEFINE_integer("num_examples", 10_000, "Test images that are used.")
flags.DEFINE_integer("num_rounds", 30, "Rounds.")
flags.DEFINE_integer("clients_per_round", 0, "Clients that are drawn each round; 0 for all.")
flags.DEFINE_string("local", "avg", "Local work: avg (several steps) or sgd (one gradient).")
flags.DEFINE_integer("num_steps", 5, "Local steps (avg).")
flags.DEFINE_integer("batch_size", 32, "Images of a client a step.")
flags.DEFINE_float("learning_rate", 0.1, "Of the clients.")
flags.DEFINE_float("momentum", 0.0, "Of the clients; with sgd kept from round to round.")
flags.DEFINE_float("server_rate", 1.0, "The server steps g + server_rate * aggregate.")
flags.DEFINE_integer("eval_every", 5, "Rounds between evaluations.")
flags.DEFINE_string(
    "variant", "paper", "Rules and attacks as in their papers, or as in ndss' code."
)
flags.DEFINE_string("knows", "published", "What attackers see: published, own or all.")
flags.DEFINE_float("ipm_epsilon", 0.5, "Of the inner product attack.")
flags.DEFINE_float("mpaf_scale", 1e6, "Of MPAF.")
flags.DEFINE_float("gaussian_stddev", 200.0, "Of the Gaussian attack.")
flags.DEFINE_string("direction", "std", "Of Min-Max and Min-Sum: std, unit or sign.")
flags.DEFINE_float("clipping_radius", 5.0, "Of centered clipping.")
flags.DEFINE_string(
    "fmpa_reference", "predictive", "Of I-FMPA: predictive, alternative or historical."
)
flags.DEFINE_float("fmpa_alpha", 0.5, "Smoothing of its prediction, in (0, 1).")
flags.DEFINE_float("fmpa_weight", 0.0, "Lambda, of the distance in its loss.")
flags.DEFINE_string("fmpa_optimizer", "sgd", "Of its search: sgd or adam.")
flags.DEFINE_float("fmpa_rate", 0.1, "Learning rate of its search.")
flags.DEFINE_integer("fmpa_steps", 40, "Of its search in a round.")
flags.DEFINE_string("control_reference", "alternative", "Reference model of F-FMPA.")
flags.DEFINE_string("control_boost", "known", "Rho of F-FMPA: known or searched.")
flags.DEFINE_integer("control_steps", 200, "Of F-FMPA's search in a round, at most.")
flags.DEFINE_integer("control_validation", 2000, "Images on which F-FMPA looks at the accuracy.")
flags.DEFINE_float("control_share", 0.5, "Of the malicious clients' images, the part for that.")
flags.DEFINE_string(
    "control_drops", "2.5,5,10", "Points that F-FMPA (f_fmpa) shall take, with commas between them."
)
flags.DEFINE_bool("all_devices", False, "Split the clients over all devices (on a CPU: cores).")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    import dataclasses

    from advjax.core import parallel
    from advjax.experiments import federated

    settings: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(federated.Config)
    }
    settings |= {
        "attacks": federated.DENIALS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks),
        "rules": {"all": federated.RULES, "table": federated.TABLE_RULES}.get(
            FLAGS.rules, cli.parse_names(FLAGS.rules)
        ),
        "seeds": cli.parse_seeds(FLAGS.seeds),
        "control_drops": cli.parse_range("control_drops", FLAGS.control_drops),
    }
    config = federated.Config(**settings)
    if FLAGS.smoke:
        config = federated.smaller(config)
    study = federated.run_study(
        config, FLAGS.workdir, data_dir=FLAGS.data_dir, mesh=cli.make_mesh()
    )
    if parallel.is_main_process():
        federated.print_study(study)


if __name__ == "__main__":
    cli.run(main)
