"""Robustness curves of a classifier: train or restore it, attack it, draw it.

    python launch/evasion.py                                  # digits, small CNN, every attack
    python launch/evasion.py --dataset=mnist --attacks=fgsm,pgd --epsilons=0:0.3:16 --seeds=0,1,2
    python launch/evasion.py --flagfile=launch/presets/mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, checkpoints/ and
figures/{curve,examples,fooling}.png. Run again, it does only what is missing, with the same
numbers.

Cost of the defaults: about a minute on two CPU cores, half of it compilation, which a second run
does not repeat. Expect 98 % clean accuracy on the digits, and PGD at epsilon 0.2 to leave none.
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/evasion")
cli.define_network_flags()
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all.")
flags.DEFINE_string("epsilons", "0:0.3:16", "Radii of linf attacks: FIRST:LAST:COUNT or a list.")
flags.DEFINE_string("epsilons_l2", "0:3:16", "Radii of l2 attacks.")
flags.DEFINE_string("epsilons_l1", "0:15:16", "Radii of l1 attacks.")
flags.DEFINE_string("seeds", None, "Several seeds with commas between them, instead of --seed.")
flags.DEFINE_integer("num_steps", 40, "Steps of the iterated attacks.")
flags.DEFINE_integer("num_restarts", 1, "Random starts of each PGD.")
flags.DEFINE_string("method", "auto", "How curves are computed: auto, map, vmap, bisect, active.")
flags.DEFINE_integer("attack_batch_size", 512, "Images attacked at a time.")
flags.DEFINE_float("fgsm_epsilon", 0.25, "Radius of the FGSM table and of the fooling image.")
flags.DEFINE_bool("all_devices", False, "Split each batch over all devices; on a CPU, its cores.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import evasion, tables

    names = evasion.ATTACKS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks)
    config = evasion.Config(
        **cli.network_settings(),
        attacks=names,
        epsilons=cli.parse_range("epsilons", FLAGS.epsilons),
        epsilons_l2=cli.parse_range("epsilons_l2", FLAGS.epsilons_l2),
        epsilons_l1=cli.parse_range("epsilons_l1", FLAGS.epsilons_l1),
        seeds=(FLAGS.seed,) if FLAGS.seeds is None else cli.parse_seeds(FLAGS.seeds),
        num_steps=FLAGS.num_steps,
        num_restarts=FLAGS.num_restarts,
        method=FLAGS.method,
        attack_batch_size=FLAGS.attack_batch_size,
        fgsm_epsilon=FLAGS.fgsm_epsilon,
    )
    if FLAGS.smoke:
        config = evasion.smaller(config)
    study = evasion.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir, mesh=cli.make_mesh())
    if parallel.is_main_process():
        tables.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
