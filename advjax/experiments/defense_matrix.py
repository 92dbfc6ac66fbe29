"""The matrix defence x attack: what every defence keeps against attackers who know more and more.

Black box: images made on a substitute, an undefended network of its own training. Gray box: images
made by one who does not know what is done at test time, on the classifier that MagNet or
Defense-GAN guards; a defence in training has nothing of that kind to hide but its random numbers,
so its attacker trains a second network the same way, with another seed. White box: images made on
the whole defended classifier, and by the adaptive attack of each defence as well.

A cell is (defence, threat, attack) and gives one row. All attacks have the same budget, a radius in
linf. Keys are derived from names, so order and interruption never change a number.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from rich.console import Console
from tqdm.auto import tqdm

from advjax import attacks, defenses, evaluation, models, training
from advjax.core import checks, losses, parallel, random
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key, LogitsFn, TrainingLoss
from advjax.experiments import (
    adversarial_training,
    defended,
    defense_gan,
    distillation,
    grids,
    magnet,
    networks,
)
from advjax.experiments.defence_networks import Trainer, TrainingConfig, trainer
from advjax.experiments.runs import Run

KEY_COLUMNS = ("defence", "threat", "attack")
DEFENCES = (
    "none", "fgsm", "pgd", "least_likely", "trades", "ensemble", "entropy", "distilled", "magnet",
    "defense_gan",
)  # fmt: skip
THREATS = ("black box", "gray box", "white box")
ATTACKS = {"fgsm": "FGSM", "bim": "BIM", "pgd": "PGD", "cw": "CW", "adaptive": "adaptive"}
# What the adaptive attack is; of all others it is AutoAttack.
ADAPTIVE = {
    "distilled": "PGD on logits / T",
    "magnet": "APGD past the detectors",
    "defense_gan": "BPDA",
}

_Config = TypeVar("_Config")


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """A study of all defences.

    Attributes:
      defences: names from `DEFENCES`, the rows.
      threats: names from `THREATS`.
      attacks: names from `ATTACKS`; "cw" is PGD on Carlini and Wagner's margin in the ball, and
        "adaptive" is for the white box only.
      epsilon: radius in linf, of the attacks in training and in the test.
      num_steps: steps of bim, pgd and cw.
      num_auto_steps: steps of APGD and FAB in AutoAttack, and of APGD past MagNet's detectors.
      num_queries: queries of Square in AutoAttack.
      attack_batch_size: images attacked at a time.
      surrogate: name for `models.make`, the substitute of the black box.
      num_held_out: the last of the training images, which no network sees: MagNet's thresholds are
        from them.
      alpha: share of the clean loss in "fgsm" and "ensemble".
      pgd_alpha: the same in "pgd"; 0 is Madry et al.
      train_num_steps: steps of the attack in "pgd" and "trades".
      train_step_size: their length.
      trades_beta: weight of the divergence in "trades".
      entropy_weight: of the entropy in "entropy"; a positive one asks for sure answers.
      sources: names for `models.make`, the static networks of "ensemble".
      temperature: T of "distilled".
      temperatures: of MagNet's detectors by divergence.
      false_positive_rate: budget of each detector on the held-out images.
      noise: standard deviation of the autoencoders' training noise.
      ae_num_epochs: epochs of the autoencoders.
      ae_batch_size: their images a step.
      ae_learning_rate: of their Adam, with a cosine schedule to 0.
      bpda_num_steps: steps of pgd in BPDA.
      bpda_descent_steps: L while Defense-GAN is attacked; it is judged with the defence's own.
      bpda_restarts: R while it is attacked.
      descent_steps: L of the defence.
      restarts: R of the defence.
      descent_rate: learning rate of the descent.
      momentum: of the descent.
      latent_size: length of z.
      features: of the generator.
      critic_features: of the critic.
      gan_num_steps: steps of the generator's training.
      gan_critic_steps: steps of the critic for each.
      gan_learning_rate: of both.
    """

    defences: tuple[str, ...] = DEFENCES
    threats: tuple[str, ...] = THREATS
    attacks: tuple[str, ...] = tuple(ATTACKS)
    num_examples: int = 100
    epsilon: float = 0.1
    num_steps: int = 20
    num_auto_steps: int = 50
    num_queries: int = 500
    attack_batch_size: int = 100
    surrogate: str = "cnn"
    num_held_out: int = 200
    alpha: float = 0.5
    pgd_alpha: float = 0.0
    train_num_steps: int = 5
    train_step_size: float = 0.04
    trades_beta: float = 1.0
    entropy_weight: float = 1.0
    sources: tuple[str, ...] = ("cnn", "mlp")
    temperature: float = 100.0
    temperatures: tuple[float, ...] = (10.0, 40.0)
    false_positive_rate: float = 0.01
    noise: float = 0.1
    ae_num_epochs: int = 100
    ae_batch_size: int = 64
    ae_learning_rate: float = 0.03
    bpda_num_steps: int = 20
    bpda_descent_steps: int = 25
    bpda_restarts: int = 1
    descent_steps: int = 100
    restarts: int = 4
    descent_rate: float = 10.0
    momentum: float = 0.7
    latent_size: int = 16
    features: int = 16
    critic_features: tuple[int, ...] = (16, 32)
    gan_num_steps: int = 2000
    gan_critic_steps: int = 3
    gan_learning_rate: float = 1e-3

    def check(self) -> None:
        """Checks everything that can be checked before any work.

        Raises:
          ValueError: what is wrong, in one sentence; what only one defence needs is said as its
            own study says it.
        """
        study = "defense_matrix"
        self.check_training(study)
        for kind, names, known in (
            ("defence", self.defences, DEFENCES), ("threat", self.threats, THREATS),
            ("attack", self.attacks, ATTACKS),
        ):  # fmt: skip
            if not names:
                raise ValueError(f"{study}: need at least one {kind}, got none.")
            for name in names:
                checks.known(study, kind, name, known)
        if not self.cells:
            raise ValueError(
                f"{study}: the adaptive attack is one of the white box: need another attack or "
                f"that threat, got threats={self.threats}."
            )
        checks.known(study, "model", self.surrogate, models.NAMES)
        checks.non_negative(study, "epsilon", self.epsilon)
        for name, least in (
            ("num_steps", 1), ("num_auto_steps", 1), ("num_queries", 2), ("attack_batch_size", 1),
        ):  # fmt: skip
            checks.at_least(study, name, getattr(self, name), least)
        for config_class, changes in _PARTS:
            self.part(config_class, **changes).check()

    def part(self, config_class: type[_Config], **changes: Any) -> _Config:
        """The configuration of another study: ours where it has a field of that name.

        Args:
          config_class: of that study.
          **changes: fields of its own, and those whose names mean another thing there.
        """
        fields: Any = dataclasses.fields(config_class)  # type: ignore
        # Names of defences and attacks are each study's own.
        names = {field.name for field in fields} - {"defences", "attacks"}
        shared = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return config_class(**shared | changes)

    @property
    def cells(self) -> list[tuple[str, str, str]]:
        """Defence, threat and attack of every row."""
        return [
            (defence, threat, attack)
            for defence in self.defences for threat in self.threats for attack in self.attacks
            if attack != "adaptive" or threat == "white box"
        ]  # fmt: skip


# The studies whose defences these are; alpha is in the last two another thing, not used here.
_PARTS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (adversarial_training.Config, {}),
    (distillation.Config, {}),
    (magnet.Config, {"alpha": 0.0}),
    (defense_gan.Config, {"alpha": 0.0}),
)


def smaller(config: Config) -> Config:
    """The same on the digits with small networks, in seconds."""
    quick = tuple(name for name in config.defences if name in ("none", "fgsm"))
    return dataclasses.replace(
        config, defences=quick or config.defences[:1], dataset="digits", model="mlp",
        surrogate="mlp", sources=("mlp",),
        # What AutoAttack costs here is compiling its four parts.
        attacks=tuple(name for name in config.attacks if name != "adaptive")[:1] or config.attacks,
        num_train=1000, num_held_out=100, num_examples=50, num_epochs=6, batch_size=64,
        learning_rate=3e-3, epsilon=0.1, num_steps=3, num_auto_steps=3, num_queries=20,
        attack_batch_size=50, train_num_steps=2, train_step_size=0.06, temperatures=(),
        false_positive_rate=0.01, ae_num_epochs=20, ae_batch_size=64, ae_learning_rate=0.03,
        bpda_num_steps=3, bpda_descent_steps=10, bpda_restarts=1, descent_steps=20, restarts=2,
        latent_size=16, features=8, critic_features=(8,), gan_num_steps=200, gan_critic_steps=2,
        gan_learning_rate=1e-3,
    )  # fmt: skip


class Study(NamedTuple):
    """What a run leaves in memory.

    Attributes:
      run: the run folder, with its rows.
      grid: accuracies in percent, defences x attacks of each threat.
    """

    run: Run
    grid: grids.Grid


class Judged(NamedTuple):
    """What becomes of images that a defence is shown; columns of a row.

    Attributes:
      accuracy: share that is answered as labelled, or rejected.
      reformed: MagNet's share that is answered as labelled.
      detected: MagNet's share that is rejected.
    """

    accuracy: float
    reformed: float | None = None
    detected: float | None = None


class Target(NamedTuple):
    """A defence: what its attackers work on, and what becomes of the images that it is shown.

    Attributes:
      whole: the defended classifier, with gradients through what it does at test time.
      guessed: gives what a gray box has in its place.
      adapted: images of the adaptive attack.
      judged: what becomes of images.
    """

    whole: LogitsFn
    guessed: Callable[[], LogitsFn]
    adapted: Callable[[Key], Array]
    judged: Callable[[Array], Judged]


def run_study(config: Config, workdir: PathLike, *, data_dir: PathLike | None = None) -> Study:
    """Runs what is missing of a study and writes its table and figure.

    Args:
      config: the study.
      workdir: the run folder.
      data_dir: prepared tfds data.

    Returns:
      A `Study`.

    Raises:
      ValueError: a bad configuration, a folder of another one, a network whose logits are not
        finite.
    """
    opened = networks.open_study(
        config, workdir, study="defense_matrix", key_columns=KEY_COLUMNS, data_dir=data_dir
    )
    run = opened.run
    bench = _Bench(config, opened, data_dir)
    missing = [cell for cell in config.cells if not run.is_done([cell])]
    with tqdm(missing, desc="cells", disable=not parallel.is_main_process()) as bar:
        for defence, threat, attack in bar:
            bar.set_postfix(defence=defence, threat=threat, attack=attack)
            target = bench.target(defence)
            with run.timed(f"{threat} {attack}"):
                judged = target.judged(bench.images(target, threat, attack))
            run.append(
                [{"dataset": config.dataset, "model": config.model, "seed": config.seed,
                  "defence": defence, "threat": threat, "attack": attack,
                  "method": method(defence, attack), "epsilon": config.epsilon,
                  "num_examples": len(opened.y), "clean_accuracy": bench.clean_accuracy(defence),
                  **judged._asdict()}]
            )  # fmt: skip
    study = Study(run, table(config, run.rows))
    grids.write(run, "table", study.grid)
    run.finish(config.seed)
    _draw(study)
    return study


class _Bench:
    """Makes the defences, each once, and attacks them; black-box images are made once for all."""

    def __init__(self, config: Config, opened: networks.Opened, data_dir: PathLike | None):
        self._config, self._opened, self._run = config, opened, opened.run
        self._x, self._y = opened.x, opened.y
        self._training, self._distillation, self._magnet, self._gan = (
            config.part(config_class, **changes) for config_class, changes in _PARTS
        )
        self._splits = defended.load_splits(self._magnet, data_dir)
        fit = dataclasses.replace(config, num_train=len(self._splits.train))
        self._train = trainer(fit, self._run, data_dir)
        self._catalogue = adversarial_training.catalogue(self._training)
        self._scaled = distillation.catalogue(self._distillation)["pgd_scaled"]
        # One object each, since a new one would be compiled again.
        self._past_detectors = functools.partial(
            attacks.apgd, num_steps=config.num_auto_steps, loss_fn=losses.margin, targeted=True
        )
        self._bpda = functools.partial(attacks.pgd, num_steps=config.bpda_num_steps)
        self.target = functools.cache(self._target)
        self.clean_accuracy = functools.cache(self._clean_accuracy)
        self._black_box = functools.cache(self._on_substitute)

    def images(self, target: Target, threat: str, attack: str) -> Array:
        """The images of a cell."""
        if threat == "black box":
            return self._black_box(attack)
        key = self._key(f"{threat} {attack}")
        if attack == "adaptive":
            return target.adapted(key)
        logits_fn = target.whole if threat == "white box" else target.guessed()
        return self._attacked(self._catalogue[attack], key, logits_fn)

    def _on_substitute(self, attack: str) -> Array:
        substitute = self._train(self._config.surrogate, "surrogate", training.cross_entropy)
        return self._attacked(self._catalogue[attack], self._key(f"black box {attack}"), substitute)

    def _clean_accuracy(self, defence: str) -> float:
        judged = self.target(defence).judged(self._x)
        # |right or rejected| - |rejected|: a clean image that is rejected is an error.
        return judged.accuracy - (judged.detected or 0.0)

    def _target(self, defence: str) -> Target:
        special = {"magnet": self._behind_magnet, "defense_gan": self._behind_generator}
        if defence in special:
            return special[defence](self._network("none", self._train))
        logits_fn = self._network(defence, self._train)
        return Target(
            logits_fn,
            lambda: self._network(defence, self._train_again),
            self._scaled_attack(logits_fn) if defence == "distilled" else self._auto(logits_fn),
            self._judge(logits_fn),
        )

    def _network(self, defence: str, train: Trainer) -> LogitsFn:
        """A network by what it was trained for; what it needs is trained first, by `train` too."""
        if defence == "distilled":
            logits_fn = distillation.trained(self._distillation, defence, train)
        else:
            loss_fn = adversarial_training.training_loss(self._training, defence, train)
            logits_fn = train(self._config.model, defence, loss_fn)
        networks.clean_accuracy(self._opened.study, defence, logits_fn, self._x, self._y)
        return logits_fn

    def _train_again(self, model: str, name: str, loss_fn: TrainingLoss) -> LogitsFn:
        """Another network trained the same way: the seed goes by the name."""
        return self._train(model, f"{name}_again", loss_fn)

    def _judge(self, logits_fn: LogitsFn, see: Callable[[Array], Array] = lambda x: x):
        def judged(x: Array) -> Judged:
            accuracy = evaluation.accuracy(
                logits_fn, see(x), self._y, batch_size=self._config.attack_batch_size
            )
            return Judged(float(accuracy))

        return judged

    def _auto(self, logits_fn: LogitsFn) -> Callable[[Key], Array]:
        return lambda key: attacks.auto_attack(
            key, logits_fn, self._x, self._y, self._config.epsilon,
            num_steps=self._config.num_auto_steps, num_queries=self._config.num_queries,
            batch_size=self._config.attack_batch_size,
        )  # fmt: skip

    def _scaled_attack(self, logits_fn: LogitsFn) -> Callable[[Key], Array]:
        return lambda key: self._attacked(self._scaled, key, logits_fn)

    def _behind_magnet(self, logits_fn: LogitsFn) -> Target:
        with self._run.timed("autoencoders"):
            defence = magnet.trained_defence(self._magnet, logits_fn, self._splits, self._run)
        rejecting = defenses.magnet_rejecting(
            defence.reformed, defence.detectors, defence.thresholds
        )

        def adapted(key: Key) -> Array:
            aims = magnet.runners_up(
                defence.reformed, self._x, self._y, self._config.attack_batch_size
            )
            return self._attacked(self._past_detectors, key, rejecting, aims)

        def judged(x: Array) -> Judged:
            found = magnet.shares(self._magnet, defence, x, self._y)
            return Judged(found["defended"], found["reformed"], found["detected"])

        return Target(defence.reformed, lambda: logits_fn, adapted, judged)

    def _behind_generator(self, logits_fn: LogitsFn) -> Target:
        config = self._gan
        with self._run.timed("generator"):
            generator_fn = defense_gan.trained_generator(config, self._splits.train, self._run)
        exact, straight = (
            defense_gan.attackers_classifier(config, logits_fn, generator_fn, gradient)
            for gradient in ("unrolled", "straight_through")
        )

        def copied(x: Array) -> Array:
            return defense_gan.reconstructed(
                config, "test", generator_fn, x, config.descent_steps, config.restarts
            )

        return Target(
            exact, lambda: logits_fn,
            lambda key: self._attacked(self._bpda, key, straight),
            self._judge(logits_fn, copied),
        )  # fmt: skip

    def _attacked(self, attack: Any, key: Key, logits_fn: LogitsFn, labels: Any = None) -> Array:
        return defended.attacked(
            attack, key, logits_fn, self._x, self._y if labels is None else labels,
            self._config.epsilon, batch_size=self._config.attack_batch_size,
        )  # fmt: skip

    def _key(self, name: str) -> Key:
        return random.named(jax.random.key(self._config.seed), name)


def method(defence: str, attack: str) -> str:
    """What an attack of a row is."""
    return ADAPTIVE.get(defence, "AutoAttack") if attack == "adaptive" else ATTACKS[attack]


def column(threat: str, attack: str) -> str:
    """A column of the table, such as "white PGD"."""
    return f"{threat.removesuffix(' box')} {ATTACKS[attack]}"


def table(config: Config, rows: Sequence[Mapping[str, Any]]) -> grids.Grid:
    """Accuracies in percent, defences x attacks of each threat.

    The worst cells of a row have a star, those of adaptive attacks the attack's name.

    Args:
      config: the study.
      rows: its rows.
    """
    values = {(row["defence"], "clean"): [100 * row["clean_accuracy"]] for row in rows}
    marks = {}
    for row in rows:
        cell = row["defence"], column(row["threat"], row["attack"])
        values[cell] = [100 * row["accuracy"]]
        least = min(other["accuracy"] for other in rows if other["defence"] == row["defence"])
        star = " *" if row["accuracy"] == least else ""
        marks[cell] = (f" {row['method']}" if row["attack"] == "adaptive" else "") + star
    columns = dict.fromkeys(column(threat, attack) for _, threat, attack in config.cells)
    return grids.Grid(
        f"Accuracy in %, epsilon {config.epsilon:g}: {config.dataset}, {config.model}, "
        f"{rows[0]['num_examples']} images",
        "defence", list(config.defences), ["clean", *columns], values, marks=marks,
    )  # fmt: skip


def _draw(study: Study) -> None:
    from advjax.experiments import defended_figures  # matplotlib is slow to import

    grid = study.grid
    study.run.figure(
        "matrix.png",
        lambda path: defended_figures.accuracy_matrix(
            grid.mean() / 100, grid.rows, grid.columns, grid.title, path,
            row_label="defence", column_label="attack",
        ),
    )  # fmt: skip


def print_study(study: Study, config: Config, console: Console | None = None) -> None:
    """Prints the table, what its words mean, and where the files are.

    Args:
      study: what `run_study` returned.
      config: its configuration.
      console: where to; the terminal if None.
    """
    console = console or Console()
    console.print(grids.to_rich(study.grid, console.width))
    console.print(
        "* the worst of a row. black: made on a substitute; gray: on a second training of the same "
        "kind, or on the classifier without its defence at test time; white: on all of it."
    )
    methods = {row["method"] for row in study.run.rows if row["attack"] == "adaptive"}
    if "AutoAttack" in methods:
        console.print(
            f"AutoAttack: {config.num_auto_steps} steps and {config.num_queries} queries "
            "[dim](published: 100 and 5000)[/dim]"
        )
    rejecting = [row for row in study.run.rows if row["detected"] is not None]
    if rejecting:
        shares = ", ".join(
            f"{column(row['threat'], row['attack'])} {row['detected']:.0%}" for row in rejecting
        )
        console.print(f"magnet: what is rejected counts as right; rejected: {shares}")
    console.print(f"Files: {study.run.workdir}/ (results.csv, table.md, figures/matrix.png)")
