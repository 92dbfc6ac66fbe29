"""The study of federated training: its folder, interruptions, tables, and what it refuses."""

import csv
import dataclasses
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from advjax.experiments import federated, grids

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = federated.Config(
    attacks=("none", "label_flip", "lie", "mpaf", "fang"), rules=("mean", "krum", "afa"),
    num_clients=11, num_byzantine=2, num_examples=60, num_rounds=3, num_steps=1, eval_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("federated")
    return workdir, federated.run_study(SMALL, workdir)


def rows_of(workdir):
    return (workdir / "results.jsonl").read_text()


@pytest.mark.study
def test_the_folder_holds_everything(finished):
    workdir, study = finished
    # Five attacks against three rules, but Fang's only against krum; rounds 2 and 3.
    assert len(study.run.rows) == (4 * 3 + 1) * 2
    for name in ("config.json", "manifest.json", "results.csv"):
        assert (workdir / name).is_file()
    for name in ("accuracy", "impact", "curves", "partition"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000
    with (workdir / "best.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 13 and all(0 <= float(cell["mean"]) <= 100 for cell in cells)
    assert " – |" in (workdir / "best.md").read_text()
    assert r"label\_flip" in (workdir / "best.tex").read_text()
    assert "none" not in study.grids["impact"].columns and "deviation" not in study.grids


@pytest.mark.study
def test_mpaf_ruins_the_mean_and_not_krum(finished):
    final = finished[1].grids["final"]
    cell = {key: values[0] for key, values in final.values.items()}
    assert cell["mean", "mpaf"] < cell["mean", "none"] - 10
    # Without the attack Krum may choose one of the two whose updates are lost here.
    assert cell["krum", "mpaf"] > cell["mean", "mpaf"] + 10


@pytest.mark.study
@pytest.mark.parametrize("kept", [0, 7])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(finished, tmp_path, kept):
    workdir, _ = finished
    lines = rows_of(workdir).splitlines(keepends=True)
    federated.Run(tmp_path, SMALL, study="federated", key_columns=federated.KEY_COLUMNS)
    # Killed while it appended: seven whole rows, which is half of a cell, and a part of one.
    (tmp_path / "results.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20] * (kept > 0))
    federated.run_study(SMALL, tmp_path)
    assert sorted(rows_of(tmp_path).splitlines()) == sorted(rows_of(workdir).splitlines())


@pytest.mark.study
def test_another_configuration_is_refused_and_nothing_is_lost(finished):
    workdir, _ = finished
    before = rows_of(workdir)
    with pytest.raises(ValueError, match="num_rounds was 3 and is now 4"):
        federated.run_study(dataclasses.replace(SMALL, num_rounds=4), workdir)
    assert rows_of(workdir) == before


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(attacks=("lye",)), "federated: unknown attack 'lye'"),
        (dict(rules=()), "federated: need at least one rule"),
        (dict(num_byzantine=6), "need fewer than half of the clients malicious, got"),
        (dict(rules=("bulyan",), num_byzantine=3), "bulyan: need n >= 4 \\* num_byzantine \\+ 3"),
        (dict(rules=("krum",), num_byzantine=5), "krum: need n > 2 \\* num_byzantine \\+ 2"),
        (dict(clients_per_round=12), "need clients_per_round <= num_clients=11, got 12"),
        (dict(partition="even"), "federated: unknown partition 'even'"),
        (dict(learning_rate=float("nan")), "federated: need a finite learning_rate >= 0"),
        (dict(fmpa_alpha=1.0, attacks=("i_fmpa",)), "i_fmpa: need 0 < alpha < 1, got alpha=1.0"),
        (dict(control_boost="up", attacks=("none", "f_fmpa")), "f_fmpa: unknown boost 'up'"),
        (dict(direction="up"), "federated: unknown direction 'up'"),
        (dict(fang_q=1.5), "federated: need fang_q <= 1, got fang_q=1.5"),
        (dict(local="sgd", momentum=1.0), "FedSGD: need 0 <= momentum < 1"),
        (dict(mpaf_scale=float("inf")), "federated: need a finite mpaf_scale >= 0"),
        (dict(seeds=()), "federated: need at least one seed"),
        (dict(num_train=5), "client"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        federated.run_study(dataclasses.replace(SMALL, **change), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.parametrize("clients_per_round", [0, 7])
def test_monna_trusts_an_honest_client(clients_per_round):
    config = dataclasses.replace(SMALL, rules=("monna",), clients_per_round=clients_per_round)
    rule = federated.rules(config)["monna"]
    # Two malicious rows, the first ones as in the study, far from the honest.
    n = clients_per_round or config.num_clients
    updates = np.where(np.arange(n) < 2, 100.0, np.arange(n) / 100)[:, None].astype(np.float32)
    aggregate, _ = rule.update(updates, rule.init(updates[0]))
    np.testing.assert_allclose(aggregate, np.mean(updates[2:], axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    "num_byzantine, z", [(3, 0.69847), (5, 0.7054), (8, 0.71904), (10, 0.72575), (12, 0.73891)]
)
def test_lie_of_the_ndss_code(num_byzantine, z):
    config = dataclasses.replace(
        SMALL, attacks=("lie",), variant="ndss", num_clients=50, num_byzantine=num_byzantine,
        knows="all",
    )  # fmt: skip
    updates = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    is_byzantine = np.arange(50) < num_byzantine
    attack = federated.attacks(config)["lie"]
    state = attack.init(None, updates[0])
    crafted, _ = attack.craft(None, updates, is_byzantine, None, state)
    expected = updates.mean(axis=0) + z * updates.std(axis=0, ddof=1)
    np.testing.assert_allclose(crafted[0], expected, rtol=0, atol=2e-6)
    drawn = dataclasses.replace(config, num_clients=100, num_byzantine=2 * num_byzantine)
    drawn = dataclasses.replace(drawn, clients_per_round=50)
    assert federated._published_z(drawn) == z


@pytest.mark.study
def test_a_grid_in_every_form():
    grid = grids.Grid("A & B", "rule", ["a_b"], ["x", "y"], {("a_b", "x"): [1.0, 3.0]})
    assert grid.texts() == [["2.0 ± 1.4", "–"]]
    assert np.isnan(grid.mean()[0, 1])
    assert "| a_b | 2.0 ± 1.4 | – |" in grids.to_markdown(grid)
    latex = grids.to_latex(grid)
    assert r"A \& B" in latex and r"a\_b & $2.0 \pm 1.4$ & -- \\" in latex


def test_the_launcher_tells_bad_flags(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "federated.py"), f"--workdir={tmp_path}"]
    done = subprocess.run(
        [*command, "--rules=krum", "--num_byzantine=9"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: krum: need n > 2 .*n=20\.\n", done.stderr.splitlines(True)[-1])
