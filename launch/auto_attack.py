"""AutoAttack: the strongest standard evaluation, attack by attack.

    python launch/auto_attack.py                              # digits, small CNN, linf
    python launch/auto_attack.py --dataset=mnist --ball=l2 --epsilons=0.5,1,2 --all_devices
    python launch/auto_attack.py --flagfile=launch/presets/auto_attack_reference.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/ and
figures/cascade.png. Run again, it does only the radii that are missing. It warns where gradients
are masked.

Cost of the defaults: about four minutes on two CPU cores, most of it Square's 5,000 queries.
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/auto_attack")
cli.define_network_flags(num_examples=128)
flags.DEFINE_string("version", "standard", "standard or plus.")
flags.DEFINE_string("ball", "linf", "linf, l2 or l1.")
flags.DEFINE_string("epsilons", "0.05,0.1,0.2", "Radii: FIRST:LAST:COUNT or a list.")
flags.DEFINE_integer("num_steps", 100, "Steps of APGD and FAB.")
flags.DEFINE_integer("num_queries", 5000, "Queries of Square.")
flags.DEFINE_integer("attack_batch_size", 512, "Images attacked at a time.")
flags.DEFINE_bool("all_devices", False, "Split each batch over all devices; on a CPU, its cores.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import auto_attack, tables

    config = auto_attack.Config(
        **cli.network_settings(),
        version=FLAGS.version,
        ball=FLAGS.ball,
        epsilons=cli.parse_range("epsilons", FLAGS.epsilons),
        seed=FLAGS.seed,
        num_steps=FLAGS.num_steps,
        num_queries=FLAGS.num_queries,
        attack_batch_size=FLAGS.attack_batch_size,
    )
    if FLAGS.smoke:
        config = auto_attack.smaller(config)
    study = auto_attack.run_study(
        config, FLAGS.workdir, data_dir=FLAGS.data_dir, mesh=cli.make_mesh()
    )
    if parallel.is_main_process():
        tables.print_cascade(study, config)


if __name__ == "__main__":
    cli.run(main)
