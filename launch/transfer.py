"""Transfer: adversarial images of every network, shown to every other.

    python launch/transfer.py                     # digits, cnn and mlp, two seeds, four attacks
    python launch/transfer.py --attacks=fgsm,bim --epsilon=0.2 --seeds=0,1,2
    python launch/transfer.py --flagfile=launch/presets/transfer_mnist.flags

Writes under --workdir: config.json, manifest.json, results.jsonl, results.csv, orderings.csv,
checkpoints/, figures/matrix_ATTACK.png and figures/confidence.png. Run again, it does only what is
missing, with the same numbers. A rate is the share of the images that the target gets right when
clean and wrong when attacked on the source.

Cost of the defaults: about three minutes on two CPU cores. Expect the white box to be stronger than
the black box, and transfer to rise with the confidence up to 10. On the digits a margin of 20 or 40
is more than most images can be given, also with five times the steps: the attack fails on its own
source, which counts as no transfer, so those orderings are printed as "does not hold". The rate of
the white box tells where that is so; on MNIST it is 100 % up to 20 and 92 % at 40.
"""

from absl import flags

from advjax.experiments import cli

cli.define_common_flags("runs/transfer")
cli.define_network_flags(num_examples=256)
flags.DEFINE_string("more_models", "mlp", "Further networks beside --model, with commas.")
flags.DEFINE_string("seeds", None, "A network a seed and architecture; else --seed and the next.")
flags.DEFINE_string("attacks", "all", "Attacks with commas between them, or all.")
flags.DEFINE_float("epsilon", 0.1, "Radius of the fixed-budget attacks, in linf.")
flags.DEFINE_integer("num_steps", 10, "Steps of bim.")
flags.DEFINE_string("confidences", "0,5,10,20,40", "Kappas of Carlini and Wagner's attack.")
flags.DEFINE_integer("cw_num_steps", 200, "Its steps.")
flags.DEFINE_integer("cw_num_search_steps", 6, "Its search steps for the constant.")
flags.DEFINE_float("cw_learning_rate", 0.1, "Its step of Adam.")

FLAGS = flags.FLAGS


def main() -> None:
    cli.start_jax()
    from advjax.core import parallel
    from advjax.experiments import transfer

    seeds = (FLAGS.seed, FLAGS.seed + 1) if FLAGS.seeds is None else cli.parse_seeds(FLAGS.seeds)
    config = transfer.Config(
        **cli.network_settings(),
        more_models=cli.parse_names(FLAGS.more_models),
        seeds=seeds,
        attacks=transfer.ATTACKS if FLAGS.attacks == "all" else cli.parse_names(FLAGS.attacks),
        epsilon=FLAGS.epsilon,
        num_steps=FLAGS.num_steps,
        confidences=cli.parse_range("confidences", FLAGS.confidences),
        cw_num_steps=FLAGS.cw_num_steps,
        cw_num_search_steps=FLAGS.cw_num_search_steps,
        cw_learning_rate=FLAGS.cw_learning_rate,
    )
    if FLAGS.smoke:
        config = transfer.smaller(config)
    study = transfer.run_study(config, FLAGS.workdir, data_dir=FLAGS.data_dir)
    if parallel.is_main_process():
        transfer.print_study(study, config)


if __name__ == "__main__":
    cli.run(main)
