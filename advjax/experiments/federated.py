"""Federated training under attack: every attack against every rule, several seeds.

One compiled program runs all cells of the table: rules and attacks are chosen by a number in its
state, seeds and masks are its arguments.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from tqdm.auto import tqdm

from advjax import aggregation, data, evaluation, federated, models, poisoning
from advjax.aggregation import Aggregator
from advjax.core import checks, classifier, parallel, random
from advjax.core.io import PathLike
from advjax.data import Dataset
from advjax.experiments import federated_figures, grids
from advjax.experiments.runs import Run
from advjax.poisoning import Poisoning
from advjax.poisoning.flexible import REFERENCES, num_training
from advjax.training.fitting import as_float

KEY_COLUMNS = ("seed", "attack", "rule", "round")
NO_ATTACK, CONTROL = "none", "f_fmpa"
# The attacks that seek the worst model, and all.
DENIALS = (
    NO_ATTACK, "sign_flip", "gaussian", "label_flip", "lie", "ipm", "mpaf", "fang", "min_max",
    "min_sum", "i_fmpa",
)  # fmt: skip
ATTACKS = (*DENIALS, CONTROL)
RULES = (
    "mean", "krum", "multi_krum", "median", "trimmed_mean", "norm_bounding", "bulyan", "faba",
    "afa", "centered_clipping", "dnc", "geometric_median", "meamed", "monna", "caf", "signguard",
    "flame",
)  # fmt: skip
# The rules of the paper's tables; the others are there for the asking.
TABLE_RULES = RULES[:11]
# Which rules Fang's attack is tailored to; against the others it does not exist.
TAILORED = ("krum", "multi_krum", "bulyan", "trimmed_mean", "median")
PARTITIONS = ("iid", "fang", "dirichlet", "shards")
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
VARIANTS = ("paper", "ndss")


@dataclasses.dataclass(frozen=True)
class Config:
    """A study of federated training.

    Attributes:
      dataset: name for `data.load`.
      train_split: of it, for `data.load`.
      test_split: of it, for `data.load`.
      model: name for `models.make`.
      attacks: names from `ATTACKS`.
      rules: names from `RULES`.
      seeds: a partition, a network and an order of batches each.
      num_clients: n.
      num_byzantine: how many of them are malicious; the first ones.
      partition: from `PARTITIONS`.
      fang_q: share of a label that goes to its own group, of Fang's partition.
      concentration: of the Dirichlet partition.
      shards_per_client: of the partition by shards.
      num_train: training images that are used; 0 for all.
      num_examples: test images that are used.
      num_rounds: rounds.
      clients_per_round: how many are drawn each round; 0 for all.
      local: "sgd", one gradient a round, or "avg", several steps a round.
      num_steps: local steps of "avg".
      batch_size: images of a client a step.
      learning_rate: of the clients.
      momentum: of the clients, kept from round to round with "sgd".
      server_rate: the server steps `g + server_rate * aggregate`.
      eval_every: rounds between evaluations.
      variant: "paper", every rule and attack as its paper has it, or "ndss", as the code that the
        tables of FMPA were made with has it: Krum over n - f - 3 others, iterative Multi-Krum, the
        lower median, its z of LIE, the smaller bound of Min-Sum.
      knows: "published", all honest updates for LIE and the attackers' own for the others, "own",
        or "all".
      ipm_epsilon: of the inner product attack.
      mpaf_scale: of MPAF.
      gaussian_stddev: of the Gaussian attack.
      direction: of Min-Max and Min-Sum.
      clipping_radius: of centered clipping.
      fmpa_reference: reference model of I-FMPA.
      fmpa_alpha: of the prediction.
      fmpa_weight: lambda, of the distance in their loss.
      fmpa_optimizer: "sgd" or "adam", of their search.
      fmpa_rate: its learning rate.
      fmpa_steps: of their search in a round.
      control_reference: reference model of F-FMPA.
      control_boost: "known" or "searched", its rho.
      control_steps: of its search in a round.
      control_validation: images on which its search looks at the accuracy.
      control_share: of the malicious clients' images, the part that these images are from.
      control_drops: xi, by how many points F-FMPA shall lower the accuracy that the rule reaches
        without attack, as the attackers see it on that part; a column of the table each.
    """

    dataset: str = "digits"
    train_split: str = "train"
    test_split: str = "test"
    model: str = "mlp"
    attacks: tuple[str, ...] = DENIALS
    rules: tuple[str, ...] = TABLE_RULES
    seeds: tuple[int, ...] = (0,)
    num_clients: int = 20
    num_byzantine: int = 4
    partition: str = "iid"
    fang_q: float = 0.5
    concentration: float = 0.5
    shards_per_client: int = 2
    num_train: int = 0
    num_examples: int = 10_000
    num_rounds: int = 30
    clients_per_round: int = 0
    local: str = "avg"
    num_steps: int = 5
    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.0
    server_rate: float = 1.0
    eval_every: int = 5
    variant: str = "paper"
    knows: str = "published"
    ipm_epsilon: float = 0.5
    mpaf_scale: float = 1e6
    gaussian_stddev: float = 200.0
    direction: str = "std"
    clipping_radius: float = 5.0
    fmpa_reference: str = "predictive"
    fmpa_alpha: float = 0.5
    fmpa_weight: float = 0.0
    fmpa_optimizer: str = "sgd"
    fmpa_rate: float = 0.1
    fmpa_steps: int = 40
    control_reference: str = "alternative"
    control_boost: str = "known"
    control_steps: int = 200
    control_validation: int = 2000
    control_share: float = 0.5
    control_drops: tuple[float, ...] = (2.5, 5.0, 10.0)

    def check(self) -> None:
        """Refuses what cannot run.

        Raises:
          ValueError: what is wrong, in one sentence.
        """
        checks.known("federated", "data set", self.dataset, data.NAMES)
        checks.known("federated", "model", self.model, models.NAMES)
        for kind, names, known in (
            ("attack", self.attacks, ATTACKS), ("rule", self.rules, RULES),
        ):  # fmt: skip
            if not names:
                raise ValueError(f"federated: need at least one {kind}, got none.")
            for name in names:
                checks.known("federated", kind, name, known)
        if not self.seeds:
            raise ValueError("federated: need at least one seed, got none.")
        checks.known("federated", "partition", self.partition, PARTITIONS)
        checks.known("federated", "variant", self.variant, VARIANTS)
        checks.known("federated", "local work", self.local, ("sgd", "avg"))
        checks.known("federated", "knowledge", self.knows, ("published", "own", "all"))
        for name in (
            "num_clients", "num_examples", "num_rounds", "num_steps", "batch_size", "eval_every",
            "shards_per_client", "fmpa_steps", "control_steps", "control_validation",
        ):  # fmt: skip
            checks.at_least("federated", name, getattr(self, name), 1)
        for name in ("num_byzantine", "num_train", "clients_per_round"):
            checks.at_least("federated", name, getattr(self, name), 0)
        for name in (
            "learning_rate", "server_rate", "ipm_epsilon", "gaussian_stddev", "clipping_radius",
            "momentum", "concentration", "fang_q", "fmpa_rate", "fmpa_weight",
            "mpaf_scale",
        ):  # fmt: skip
            checks.non_negative("federated", name, getattr(self, name))
        if 2 * self.num_byzantine >= self.num_clients:
            raise ValueError(
                "federated: need fewer than half of the clients malicious, got "
                f"num_byzantine={self.num_byzantine} of num_clients={self.num_clients}."
            )
        if self.clients_per_round > self.num_clients:
            raise ValueError(
                f"federated: need clients_per_round <= num_clients={self.num_clients}, got "
                f"{self.clients_per_round}."
            )
        checks.known("federated", "direction", self.direction, ("sign", "std", "unit"))
        checks.known("federated", "reference model", self.fmpa_reference, REFERENCES)
        checks.known("federated", "optimizer", self.fmpa_optimizer, OPTIMIZERS)
        if not self.num_byzantine and {"i_fmpa", CONTROL} & set(self.attacks):
            raise ValueError(
                "federated: need a malicious client for i_fmpa and f_fmpa, got num_byzantine=0."
            )
        if CONTROL in self.attacks:
            if NO_ATTACK not in self.attacks[: self.attacks.index(CONTROL)]:
                raise ValueError(
                    f"federated: {CONTROL} lowers the accuracy that is reached without attack, so "
                    f"need {NO_ATTACK} before it among the attacks, got {','.join(self.attacks)}."
                )
            if not self.control_drops or not all(0 < drop < 100 for drop in self.control_drops):
                raise ValueError(
                    "federated: need control_drops in points between 0 and 100, got "
                    f"{self.control_drops}."
                )
        if self.fang_q > 1:
            raise ValueError(f"federated: need fang_q <= 1, got fang_q={self.fang_q}.")
        attacks(self)
        local_work(self)
        # Every rule says now, not after the first hour, that it has too few clients.
        n = self.clients_per_round or self.num_clients
        updates = np.zeros((n, 2), np.float32)
        for rule in rules(self).values():
            jax.eval_shape(lambda x, rule=rule: rule.update(x, rule.init(x[0])), updates)

    @property
    def assumed_byzantine(self) -> int:
        """What the rules take as f: the malicious share of the clients of a round, rounded up."""
        n = self.clients_per_round or self.num_clients
        return math.ceil(self.num_byzantine * n / self.num_clients)


def smaller(config: Config) -> Config:
    """A tiny version of a study, in seconds."""
    return dataclasses.replace(
        config,
        dataset="digits",
        train_split="train",
        test_split="test",
        model="mlp",
        attacks=config.attacks[:1] + tuple(a for a in config.attacks[1:] if a in ("lie", "fang")),
        rules=tuple(r for r in config.rules if r in ("mean", "krum", "median")) or config.rules[:1],
        seeds=config.seeds[:1],
        num_clients=11,
        num_byzantine=2,
        clients_per_round=0,
        num_train=0,
        num_examples=100,
        num_rounds=4,
        num_steps=2,
        eval_every=2,
    )


def rules(config: Config) -> dict[str, Aggregator]:
    """The rules of a configuration, which share one program."""
    f = config.assumed_byzantine
    is_ndss = config.variant == "ndss"
    even = "lower" if is_ndss else "midpoint"
    options: dict[str, dict[str, Any]] = {
        "krum": {"num_byzantine": f},
        "multi_krum": {"num_byzantine": f, "iterative": is_ndss},
        "median": {"even": even},
        "norm_bounding": {"radius": "mean"},
        "bulyan": {"num_byzantine": f, "even": even},
        "dnc": {"num_byzantine": f},
    }
    for name in ("trimmed_mean", "faba", "meamed", "caf"):
        options[name] = {"num_byzantine": f}
    # The malicious clients are the first ones, so the last row is the one to trust.
    n = config.clients_per_round or config.num_clients
    options["monna"] = {"num_byzantine": f, "reference": n - 1}
    for name in ("krum", "multi_krum", "bulyan"):
        options[name]["neighbors"] = _neighbors(config)
    made: dict[str, Aggregator] = {}
    for name in config.rules:
        if name == "afa":
            made[name] = aggregation.afa(num_clients=config.num_clients)
        elif name == "centered_clipping":
            made[name] = aggregation.centered_clipping(radius=config.clipping_radius)
        else:
            rule = functools.partial(getattr(aggregation, name), **options.get(name, {}))
            made[name] = aggregation.stateless(rule, key=jax.random.key(0))
    return dict(aggregation.choose(made))


def _neighbors(config: Config) -> int | None:
    """Krum's; None for the paper's n - f - 2."""
    n = config.clients_per_round or config.num_clients
    return max(1, n - config.assumed_byzantine - 3) if config.variant == "ndss" else None


def _published_z(config: Config) -> float:
    """LIE's z in the code of NDSS 2021, whose table is of 3, 5, 8, 10 and 12 of 50 clients.

    It has `Phi(p)` in place of the quantile of p, the share of the honest clients whose support is
    not needed, which it rounds up to two digits.
    """
    n = config.clients_per_round or config.num_clients
    num_honest = max(1, n - config.assumed_byzantine)
    percent = -(-100 * (n - n // 2 - 1) // num_honest)
    return round(statistics.NormalDist().cdf(percent / 100), 5)


def attacks(config: Config) -> dict[str, Poisoning]:
    """The attacks of a configuration, which share one program; Fang's is one a tailored rule."""
    is_ndss = config.variant == "ndss"
    z = _published_z(config) if is_ndss else None
    bound = "min" if is_ndss else "max"
    functions: dict[str, Any] = {
        "sign_flip": poisoning.sign_flip,
        "gaussian": functools.partial(poisoning.gaussian, stddev=config.gaussian_stddev),
        "lie": functools.partial(poisoning.lie, z=z),
        "ipm": functools.partial(poisoning.ipm, epsilon=config.ipm_epsilon),
        "min_max": functools.partial(poisoning.min_max, direction=config.direction),
        "min_sum": functools.partial(poisoning.min_sum, direction=config.direction, bound=bound),
    }

    def knowledge(name: str) -> str:
        if config.knows == "published":
            return "all" if name == "lie" else "byzantine"
        return "all" if config.knows == "all" else "byzantine"

    search = poisoning.Search(
        weight=config.fmpa_weight, num_steps=config.fmpa_steps,
        optimizer=OPTIMIZERS[config.fmpa_optimizer](config.fmpa_rate),
    )  # fmt: skip
    # Flipped labels are in the data: nothing happens to the updates.
    made = {NO_ATTACK: poisoning.stateless(poisoning.no_attack)}
    for name in config.attacks:
        if name in functions:
            made[name] = poisoning.stateless(functions[name], knows=knowledge(name))
        elif name == "mpaf":
            made[name] = poisoning.mpaf(scale=config.mpaf_scale)
        elif name == "i_fmpa":
            made[name] = poisoning.i_fmpa(
                reference=config.fmpa_reference, alpha=config.fmpa_alpha, search=search
            )
        elif name == CONTROL:
            made[name] = _controlled(
                config,
                search._replace(
                    check_every=1,
                    num_steps=config.control_steps,
                    num_validation=config.control_validation,
                    validation_share=config.control_share,
                ),
            )
        elif name == "fang":
            for rule in config.rules:
                if rule in TAILORED:
                    tailored = functools.partial(
                        poisoning.fang, rule=rule, neighbors=_neighbors(config)
                    )
                    made[f"fang_{rule}"] = poisoning.stateless(tailored, knows=knowledge(name))
    return dict(poisoning.choose(made))


def _controlled(config: Config, search: poisoning.Search) -> Poisoning:
    """F-FMPA whose wanted accuracy stands in its state: one program for all targets."""

    def attack(target_accuracy: Any) -> Poisoning:
        return poisoning.f_fmpa(
            target_accuracy=target_accuracy, reference=config.control_reference,
            boost=config.control_boost, alpha=config.fmpa_alpha, search=search,
        )  # fmt: skip

    def init(key, params):
        # The wanted accuracy is set in `_aiming`.
        return jnp.ones((), jnp.float32), attack(lambda _: 1.0).init(key, params)

    def craft(key, updates, is_byzantine, context, state):
        target, memory = state
        updates, memory = attack(lambda _: target).craft(
            key, updates, is_byzantine, context, memory
        )
        return updates, (target, memory)

    # Made once here, so that what is wrong with it is said before any training.
    return Poisoning(init, craft, attack(0.5).check)


def _aiming(attack: Poisoning, target_accuracy: float) -> Poisoning:
    """One of the attacks of `attacks`, F-FMPA, with another accuracy to aim at."""

    def init(key, params):
        index, states = attack.init(key, params)
        own = jnp.asarray(target_accuracy, jnp.float32), states[index][1]
        return index, (*states[:index], own, *states[index + 1 :])

    return attack._replace(init=init)


def columns(config: Config) -> list[str]:
    """The attacks as columns of a table: F-FMPA has one a wanted drop, such as "f_fmpa 2.5"."""
    drops = [f"{CONTROL} {drop:g}" for drop in config.control_drops]
    return [
        column for attack in config.attacks for column in (drops if attack == CONTROL else [attack])
    ]


def wanted_drop(column: str) -> float | None:
    """The points that F-FMPA shall take in this column; None for the other attacks."""
    name, _, drop = column.partition(" ")
    return float(drop) if name == CONTROL else None


def exists(attack: str, rule: str) -> bool:
    """Whether the table has this cell."""
    return attack != "fang" or rule in TAILORED


def make_partition(config: Config, key: jax.Array, dataset: Dataset) -> federated.Partition:
    """Which client holds which images."""
    n, labels = config.num_clients, dataset.labels
    if config.partition == "iid":
        return federated.partition_iid(key, labels, n)
    if config.partition == "fang":
        return federated.partition_fang(
            key, labels, n, q=config.fang_q, num_classes=dataset.num_classes
        )
    if config.partition == "dirichlet":
        return federated.partition_dirichlet(key, labels, n, concentration=config.concentration)
    return federated.partition_shards(key, labels, n, shards_per_client=config.shards_per_client)


def local_work(config: Config) -> Any:
    """What a client does in a round."""
    if config.local == "sgd":
        return federated.FedSGD(
            batch_size=config.batch_size, learning_rate=config.learning_rate,
            momentum=config.momentum,
        )  # fmt: skip
    return federated.FedAvg(
        learning_rate=config.learning_rate, num_steps=config.num_steps,
        batch_size=config.batch_size,
        optimizer=functools.partial(optax.sgd, momentum=config.momentum or None),
    )  # fmt: skip


class Study(NamedTuple):
    """What `run_study` returns.

    Attributes:
      run: the folder with the rows, one an evaluated round of a cell.
      grids: the tables that apply, rules x attacks: "best" and "final" accuracy in percent,
        "impact", 100 * drop / accuracy without attack (best), and of F-FMPA "deviation" from the
        wanted drop in points (best) and "final_deviation".
    """

    run: Run
    grids: dict[str, grids.Grid]


def run_study(
    config: Config, workdir: PathLike, *, data_dir: PathLike | None = None, mesh: Mesh | None = None
) -> Study:
    """Runs every cell that is missing, and draws tables and figures.

    Args:
      config: the study.
      workdir: run folder; started again, it does only what is missing.
      data_dir: prepared tfds data.
      mesh: devices to split the clients over.

    Returns:
      `Study(run, grids)`.

    Raises:
      ValueError: a bad configuration, or a folder of another one.
    """
    config.check()
    train = data.load(config.dataset, config.train_split, data_dir=data_dir)
    train = train.take(min(config.num_train or len(train), len(train)))
    test = data.load(config.dataset, config.test_split, data_dir=data_dir)
    test = test.take(min(config.num_examples, len(test)))
    run = Run(workdir, config, study="federated", key_columns=KEY_COLUMNS)
    module = models.make(config.model, train.num_classes)
    known_rules, known_attacks, local = rules(config), attacks(config), local_work(config)
    is_byzantine = np.arange(config.num_clients) < config.num_byzantine
    rounds = evaluated_rounds(config)
    cells = [
        (seed, attack, rule)
        for seed in config.seeds
        for attack in columns(config)
        for rule in config.rules
        if exists(attack, rule)
    ]
    with tqdm(cells, desc="cells", disable=not parallel.is_main_process()) as bar:
        tasks: dict[bool, federated.Task] = {}
        made_for = None
        for seed, attack, rule in bar:
            bar.set_postfix(seed=seed, attack=attack, rule=rule)
            if run.is_done((seed, attack, rule, number) for number in rounds):
                continue
            key = random.named(jax.random.key(seed), "federated")
            if made_for != seed:
                partition = make_partition(config, random.named(key, "partition"), train)
                task = federated.make_task(module, train, test, partition)
                flip = functools.partial(poisoning.label_flip, num_classes=train.num_classes)
                tasks = {False: task, True: federated.poison_labels(task, is_byzantine, flip)}
                made_for = seed
            is_flipped = attack == "label_flip"
            entry = {"label_flip": NO_ATTACK, "fang": f"fang_{rule}"}.get(attack, attack)
            drop = wanted_drop(attack)
            if drop is None:
                poison = known_attacks[entry]
            else:
                target = _attackers_accuracies(run.rows)[rule, seed] - drop / 100
                if target <= 0:
                    raise ValueError(
                        f"federated: need control_drops below the accuracy without attack, got "
                        f"{drop:g} points where {rule} with seed {seed} reaches "
                        f"{100 * target + drop:.1f} %; the cells that are done are kept."
                    )
                poison = _aiming(known_attacks[CONTROL], target)
            with run.timed(attack):
                history = federated.simulate(
                    random.named(key, "simulate"),
                    tasks[is_flipped],
                    rule=known_rules[rule],
                    poisoning=poison,
                    num_rounds=config.num_rounds,
                    is_byzantine=is_byzantine,
                    clients_per_round=config.clients_per_round or None,
                    local=local,
                    server_rate=config.server_rate,
                    eval_every=config.eval_every,
                    mesh=mesh,
                    progress=False,
                )
                rows = _rows(seed, attack, rule, history)
                if attack == NO_ATTACK and CONTROL in config.attacks:
                    rows[-1]["attackers_accuracy"] = _attackers_accuracy(
                        config, tasks[False], history.variables
                    )
                run.append(rows)
    run.finish(config.seeds[0])
    study = Study(run, summaries(config, run.rows))
    for name, grid in study.grids.items():
        grids.write(run, name, grid)
    _draw(study, config, train)
    return study


def evaluated_rounds(config: Config) -> list[int]:
    """After how many rounds the global model is evaluated: every few, and at the end."""
    rounds = list(range(config.eval_every, config.num_rounds + 1, config.eval_every))
    return rounds if config.num_rounds in rounds else [*rounds, config.num_rounds]


def _rows(seed: int, attack: str, rule: str, history: Any) -> list[dict[str, Any]]:
    history = jax.device_get(history)

    def number(value: Any) -> float | None:
        # null where there is none: NaN is no JSON number.
        return float(value) if np.isfinite(value) else None

    return [
        {
            "seed": seed,
            "attack": attack,
            "rule": rule,
            "round": int(history.round[i]),
            "accuracy": float(history.accuracy[i]),
            **{
                name: number(getattr(history, name)[i])
                for name in ("loss", "malicious_share", "distance", "cosine")
            },
            "diverged": bool(history.diverged),
            "attackers_accuracy": None,
        }
        for i in range(len(history.round))
    ]


def _attackers_accuracy(config: Config, task: federated.Task, variables: Any) -> float:
    """What the final model without attack reaches on the images that F-FMPA validates on.

    From it the attackers know which accuracy on these images is so many points less: others, their
    own too, may be easier by a point.
    """
    index, counts = (np.asarray(x)[: config.num_byzantine] for x in (task.index, task.counts))
    kept = np.asarray(num_training(counts, config.control_share))
    position = np.arange(index.shape[1])
    own = index[(position >= kept[:, None]) & (position < counts[:, None])]
    logits_fn = classifier.bind(task.module, variables)
    x = as_float(task.images[own])
    return float(evaluation.accuracy(logits_fn, x, task.labels[own], batch_size=500))


def _attackers_accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    return {
        (row["rule"], row["seed"]): row["attackers_accuracy"]
        for row in rows
        if row.get("attackers_accuracy") is not None
    }


def accuracies(rows: Sequence[Mapping[str, Any]], at: str) -> dict[tuple[str, str, int], float]:
    """Accuracy of each (attack, rule, seed), the best over the rounds or the final one."""
    curves: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        key = (row["attack"], row["rule"], row["seed"])
        curves.setdefault(key, {})[row["round"]] = row["accuracy"]
    return {
        key: max(curve.values()) if at == "best" else curve[max(curve)]
        for key, curve in curves.items()
    }


def impacts(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], float]:
    """Attack impact in percent of each (attack, rule, seed) that also ran without attack (best)."""
    best = accuracies(rows, "best")
    return {
        (attack, rule, seed): float(
            federated.attack_impact(best[NO_ATTACK, rule, seed], accuracy)
        )
        for (attack, rule, seed), accuracy in best.items()
        if attack != NO_ATTACK and (NO_ATTACK, rule, seed) in best
    }  # fmt: skip


def deviations(
    rows: Sequence[Mapping[str, Any]], at: str
) -> dict[tuple[str, str, int], float]:  # fmt: skip
    """Deviation in points of each (F-FMPA's column, rule, seed), of best or final accuracies."""
    values = accuracies(rows, at)
    wanted = {key: drop for key in values if (drop := wanted_drop(key[0])) is not None}
    return {
        key: float(federated.attack_deviation(values[NO_ATTACK, *key[1:]], values[key], drop))
        for key, drop in wanted.items()
    }


def summaries(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, grids.Grid]:
    """The tables of a study, see `Study`."""
    where = f"{config.dataset}, {config.model}, {config.num_byzantine} of {config.num_clients}"
    best, final = (
        {key: 100 * value for key, value in accuracies(rows, at).items()}
        for at in ("best", "final")
    )
    tables = {}
    for name, title, values, digits in (
        ("best", "Best accuracy in %", best, 1),
        ("final", "Final accuracy in %", final, 1),
        ("impact", "Attack impact in %", impacts(rows), 1),
        ("deviation", "Deviation from the wanted drop in points", deviations(rows, "best"), 2),
        ("final_deviation", "The same after the last round", deviations(rows, "final"), 2),
    ):
        cells: dict[tuple[str, str], list[float]] = {}
        for (attack, rule, _), value in values.items():
            cells.setdefault((rule, attack), []).append(value)
        shown = [column for column in columns(config) if any(column == c for _, c in cells)]
        if shown:
            rules_of = list(config.rules)
            tables[name] = grids.Grid(f"{title} ({where})", "rule", rules_of, shown, cells, digits)
    return tables


def _draw(study: Study, config: Config, train: Dataset) -> None:
    run = study.run
    run.figure("accuracy.png", functools.partial(federated_figures.heatmap, study.grids["best"]))
    if "impact" in study.grids:
        impact = study.grids["impact"]
        run.figure(
            "impact.png",
            functools.partial(federated_figures.heatmap, impact, lower_is_better=True),
        )
    run.figure("curves.png", functools.partial(federated_figures.curves, run.rows, config))
    key = random.named(random.named(jax.random.key(config.seeds[0]), "federated"), "partition")
    run.figure(
        "partition.png",
        functools.partial(
            federated_figures.partition, make_partition(config, key, train), train,
            config.num_byzantine,
        ),
    )  # fmt: skip


def print_study(study: Study, console: Console | None = None) -> None:
    """Prints the tables and where the files are."""
    console = console or Console()
    for name in ("best", "impact", "deviation"):
        if name in study.grids:
            console.print(grids.to_rich(study.grids[name], console.width))
    console.print(
        f"Files: {study.run.workdir}/ (results.csv, {', '.join(study.grids)} as .csv .md .tex, "
        "figures/, manifest.json)"
    )
