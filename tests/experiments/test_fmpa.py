"""The studies of FMPA: their protocol, scale, tables, resumption, and what they refuse."""

import csv
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from advjax import data, models
from advjax.core import vectors
from advjax.experiments import federated, fmpa
from advjax.experiments.runs import Run
from advjax.federated import make_task
from advjax.training.fitting import as_float

SMALL = (
    ("num_clients", 11), ("num_byzantine", 2), ("num_rounds", 4), ("num_steps", 2),
    ("eval_every", 2), ("fmpa_steps", 4), ("control_steps", 4), ("control_validation", 50),
)  # fmt: skip


@pytest.mark.parametrize("setting", fmpa.SETTINGS)
@pytest.mark.parametrize("study", fmpa.PROTOCOLS)
def test_scale_keeps_the_protocol(study, setting):
    whole = fmpa.Config(study=study, setting=setting).conditions()
    small = fmpa.Config(study=study, setting=setting, scale=0.02).conditions()
    assert len(whole) == len(small) >= 1
    may_change = {"num_rounds", "num_steps", "batch_size", "num_examples"}
    for (condition, before), (_, after) in zip(whole, small, strict=True):
        for field in dataclasses.fields(federated.Config):
            old, new = getattr(before, field.name), getattr(after, field.name)
            assert old == new or (field.name in may_change and 0 < new < old)
        assert after.num_rounds < before.num_rounds
        # The changes of the condition are there in both.
        assert all(getattr(after, name) == value for name, value in condition.changes.items())


def test_every_study_can_run_in_every_setting(monkeypatch):
    check, crowds = federated.Config.check, set()

    def check_rules_once(config):
        """The rules take the time, and of a setting they see these fields only."""
        crowd = config.num_clients, config.num_byzantine, config.clients_per_round, config.variant
        new = tuple(rule for rule in config.rules if (rule, crowd) not in crowds)
        crowds.update((rule, crowd) for rule in new)
        check(dataclasses.replace(config, rules=new or ("mean",)))

    monkeypatch.setattr(federated.Config, "check", check_rules_once)
    # Sorting networks take long to trace and refuse nothing.
    monkeypatch.setattr(vectors, "over_sorted", lambda function, updates: updates[0])
    for study in fmpa.PROTOCOLS:
        for setting in fmpa.SETTINGS:
            fmpa.Config(study=study, setting=setting).check()


def test_the_conditions_vary_what_the_figure_shows():
    def values(study, name):
        found = fmpa.Config(study=study, setting="mnist_fc").conditions()
        return [getattr(config, name) for _, config in found]

    assert values("attackers", "num_byzantine") == [2, 5, 8, 10]  # 5, 10, 15, 20 % of 50
    shares = fmpa.Config(study="attackers", setting="mnist_fc").conditions()
    assert [condition.value for condition, _ in shares] == [4.0, 10.0, 16.0, 20.0]
    assert values("references", "fmpa_reference") == list(federated.REFERENCES)
    assert values("sampling", "clients_per_round") == [10, 20, 30, 40, 0]  # 0 is all
    assert values("clients", "num_byzantine") == [6, 10, 20]
    assert values("non_iid", "fang_q") == [0.1, 0.3, 0.5, 0.7]


def row(rule, attack, impact, seed=0, **more):
    made = dict.fromkeys(("deviation", "final_deviation", "best_accuracy"))
    return {"rule": rule, "attack": attack, "impact": impact, "seed": seed, "value": ""} | (
        made | more
    )


def test_our_values_stand_beside_the_papers():
    rows = [
        row("krum", "i_fmpa", 40.0), row("krum", "fang", 10.0), row("krum", "lie", 50.0),
        row("afa", "i_fmpa", 20.0), row("afa", "lie", 10.0),
        row("krum", "none", None, best_accuracy=0.9),
    ]  # fmt: skip
    made = {r["quantity"]: r for r in fmpa.comparison(fmpa.Config(setting="mnist_fc"), rows)}
    # Against Fang's attack only over the rules against which it exists.
    assert made["mean impact of i_fmpa / fang"]["ours"] == 4.0
    assert made["mean impact of i_fmpa / lie"]["ours"] == 1.0
    assert made["share of cells that i_fmpa wins"]["ours"] == 0.5
    assert made["accuracy without attack, krum"]["ours"] == 90.0
    assert all(r["paper"] is not None and r["source"] for r in made.values())
    # Alone it wins nothing.
    assert fmpa.comparison(fmpa.Config(), [row("krum", "i_fmpa", 40.0)]) == []


def test_the_table_ends_with_means_over_the_rules_of_each_seed():
    rows = [
        row("krum", "lie", 4.0, 0), row("afa", "lie", 2.0, 0), row("krum", "lie", 8.0, 1),
        row("afa", "lie", 0.0, 1),
    ]  # fmt: skip
    grid = fmpa.summaries(fmpa.Config(), rows)["impact"]
    assert grid.rows[-1] == "mean of all"
    assert grid.values["mean of all", "lie"] == [3.0, 4.0]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(study="table"), "fmpa: unknown study 'table'"),
        (dict(setting="mnist"), "fmpa: unknown setting 'mnist'"),
        (dict(scale=0.0), "need 0 < scale <= 1, got scale=0.0"),
        (dict(overrides=(("rounds", 3),)), "unknown field to override 'rounds'"),
        (dict(overrides=(("num_byzantine", 0),)), "need a malicious client for i_fmpa"),
        (dict(overrides=(("fmpa_alpha", 1.0),)), "i_fmpa: need 0 < alpha < 1, got alpha=1.0"),
        (dict(study="deviation", attacks=("f_fmpa",)), "need none before it among the attacks"),
        (dict(study="clients", overrides=(("num_clients", 0),)), "need num_clients >= 1, got"),
        (dict(study="references", overrides=(("fmpa_alpha", 0.3),)), "references sets fmpa_alpha"),
        (dict(attacks=("lie",)), "need none and an attack beside it, got lie"),
        (dict(attacks=("none",)), "need none and an attack beside it, got none"),
        (dict(study="attackers", rules=("bulyan",), overrides=(("num_clients", 10),)), "bulyan"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        fmpa.run_study(dataclasses.replace(fmpa.Config(), **change), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_opens_again_for_the_same_overrides_only(tmp_path):
    config = fmpa.Config(overrides=(("num_rounds", 4), ("control_drops", (2.5, 10.0))))
    for _ in range(2):
        run = Run(tmp_path, config, study="fmpa", key_columns=fmpa.KEY_COLUMNS)
        run.append([dict.fromkeys(fmpa.KEY_COLUMNS, "x")])
    other = dataclasses.replace(config, overrides=(("num_rounds", 5),))
    with pytest.raises(ValueError, match="another configuration: overrides was"):
        Run(tmp_path, other, study="fmpa", key_columns=fmpa.KEY_COLUMNS)


def test_reference_models_are_compared_under_the_attacks_that_are_asked_for():
    config = fmpa.Config(study="references", attacks=("none", "lie"))
    attacks = [inner.attacks for _, inner in config.conditions()]
    assert attacks == [("none", "lie"), ("lie",), ("lie",)]


def test_a_tiny_version_of_no_study_is_refused():
    with pytest.raises(ValueError, match="fmpa: unknown study 'table'"):
        fmpa.tiny(fmpa.Config(study="table"))


@pytest.mark.parametrize(
    "text", ["num_rounds", "rounds=3", "num_rounds=many", "seeds=1", "control_drops=5,"]
)
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="--override: need "):
        fmpa.parse_override(text)


def test_what_the_attackers_are_told_is_the_accuracy_on_their_validation_part():
    config = federated.Config(num_clients=7, num_byzantine=2, control_share=0.3)
    train = data.load("digits", "train").take(100)  # 15 or 14 images a client
    task = make_task(
        models.make("mlp", 10),
        train,
        train,
        federated.make_partition(config, jax.random.key(0), train),
    )
    variables = task.module.init(jax.random.key(0), as_float(train.images[:1]))
    index, counts = np.asarray(task.index), np.asarray(task.counts)
    # The last three tenths of each, rounded down.
    own = [row for c in range(2) for row in index[c, : counts[c]][-int(0.3 * counts[c]) :]]
    logits = task.module.apply(variables, as_float(train.images[np.array(own)]))
    expected = np.mean(np.argmax(logits, axis=1) == np.asarray(train.labels)[own])
    assert len(own) == 8
    told = federated._attackers_accuracy(config, task, variables)
    np.testing.assert_allclose(told, expected, rtol=1e-6)


@pytest.mark.study
def test_a_table_of_control_and_its_resumption(tmp_path):
    config = fmpa.Config(
        study="deviation", seeds=(0,), rules=("mean", "median"), overrides=(*SMALL,)
    )
    study = fmpa.run_study(config, tmp_path / "run")
    columns = ["f_fmpa 2.5", "f_fmpa 5", "f_fmpa 10"]
    assert study.grids["deviation"].columns == columns
    rows = {(r["attack"], r["rule"]): r for r in study.run.rows}
    for column, drop in zip(columns, (2.5, 5.0, 10.0), strict=True):
        clean, held = (rows[a, "mean"]["best_accuracy"] for a in ("none", column))
        assert rows[column, "mean"]["deviation"] == pytest.approx(
            abs(drop - 100 * (clean - held)), abs=1e-3
        )
    for name in ("deviation.csv", "deviation.md", "deviation.tex", "paper.csv", "results.csv"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    for suffix in ("png", "pdf"):
        assert (tmp_path / "run" / "figures" / f"deviation.{suffix}").stat().st_size > 1000

    # Killed after five cells: the sixth on are done again, and the table is the same.
    inner = tmp_path / "run" / "table" / "results.jsonl"
    lines = inner.read_text().splitlines(keepends=True)
    again = tmp_path / "again"
    (again / "table").mkdir(parents=True)
    (again / "table" / "results.jsonl").write_text("".join(lines[:10]))
    (again / "table" / "config.json").write_bytes((inner.parent / "config.json").read_bytes())
    fmpa.run_study(config, again)
    assert (again / "deviation.csv").read_text() == (tmp_path / "run/deviation.csv").read_text()


@pytest.mark.study
def test_a_drop_larger_than_the_accuracy_is_one_sentence_and_keeps_what_is_done(tmp_path):
    config = federated.Config(
        attacks=("none", "f_fmpa"), rules=("mean",), control_drops=(99.5,), **dict(SMALL)
    )
    with pytest.raises(ValueError, match="need control_drops below the accuracy without attack"):
        federated.run_study(config, tmp_path)
    assert "none" in (tmp_path / "results.jsonl").read_text()


@pytest.mark.study
def test_reference_models_share_the_runs_without_attack(tmp_path):
    config = fmpa.Config(study="references", seeds=(0,), rules=("mean",), overrides=(*SMALL,))
    study = fmpa.run_study(config, tmp_path)
    with (tmp_path / "impact.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [cell["row"] for cell in cells] == list(federated.REFERENCES)
    per_folder = [
        pathlib.Path(tmp_path, name, "results.jsonl").read_text().count('"none"')
        for name in federated.REFERENCES
    ]
    assert per_folder == [2, 0, 0]  # two evaluations
    assert study.grids["impact"].columns == ["i_fmpa"]
