"""Studies of distances and of AutoAttack: folders, resume, bad input, the launchers."""

import csv
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from advjax.experiments import auto_attack, backdoor, min_norm, networks
from advjax.experiments.runs import Run

pytestmark = pytest.mark.usefixtures("quick_compilation")

MIN_NORM = min_norm.Config(
    model="mlp", attacks=("deepfool_l2", "carlini_wagner_l2", "deepfool_linf"), num_examples=24,
    num_epochs=2, num_steps=20, num_search_steps=3, cw_initial_constant=1.0,
    epsilons_l2=(0.0, 0.5, 100.0), epsilons_linf=(0.0, 0.1),
)  # fmt: skip
AUTO_ATTACK = auto_attack.Config(
    model="mlp", num_examples=24, num_epochs=2, num_steps=3, num_queries=5, epsilons=(0.02, 0.05),
)  # fmt: skip
STUDIES = {"min_norm": (min_norm, MIN_NORM), "auto_attack": (auto_attack, AUTO_ATTACK)}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    return {
        name: module.run_study(config, tmp_path_factory.mktemp(name))
        for name, (module, config) in STUDIES.items()
    }


def test_a_radius_counts_once():
    config = dataclasses.replace(MIN_NORM, epsilons_l2=(0.5, 0.5, 1.0))
    assert config.epsilons_of("l2") == (0.5, 1.0)


@pytest.mark.parametrize("config", [MIN_NORM, backdoor.Config()], ids=["min_norm", "backdoor"])
def test_a_study_opens_with_and_without_weights_among_its_settings(config, tmp_path):
    opened = networks.open_study(
        config, tmp_path / "a", study="any", key_columns=("a",), data_dir=None
    )
    assert len(opened.x) == len(opened.y) > 0
    assert not (opened.run.workdir / "weights.json").exists()


def test_rows_of_other_weights_are_not_taken(tmp_path):
    """A file may change under its name."""
    weights, folder = tmp_path / "net.npz", tmp_path / "run"
    weights.write_bytes(b"one")
    run = Run(folder, MIN_NORM, study="min_norm", key_columns=("a",))
    networks._check_same_weights(run, weights)
    run.append([{"a": 1}])
    networks._check_same_weights(run, weights)
    weights.write_bytes(b"two")
    with pytest.raises(ValueError, match=r"holds results of other weights than are now in .*npz"):
        networks._check_same_weights(run, weights)


@pytest.mark.study
@pytest.mark.parametrize("name", STUDIES)
def test_the_run_folder_holds_everything(studies, name):
    run = studies[name].run
    pictures = {
        "min_norm": ("curve_l2.png", "curve_linf.png", "grid.png"),
        "auto_attack": ("cascade.png",),
    }[name]
    assert {path.name for path in (run.workdir / "figures").iterdir()} == set(pictures)
    for picture in pictures:
        assert (run.workdir / "figures" / picture).read_bytes().startswith(b"\x89PNG")
    with (run.workdir / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["robust_accuracy"]) for row in table] == [
        row["robust_accuracy"] for row in run.rows
    ]
    for other in ("config.json", "manifest.json", "checkpoints"):
        assert (run.workdir / other).exists()
    assert not list(run.workdir.rglob(".*"))  # no temporary file is left


@pytest.mark.study
def test_curves_fall_from_the_clean_accuracy(studies):
    study = studies["min_norm"]
    for name in MIN_NORM.attacks:
        mine = [row for row in study.run.rows if row["attack"] == name]
        curve = [row["robust_accuracy"] for row in mine]
        # float32, as both are shares of 24 images.
        assert curve[0] == pytest.approx(study.clean_accuracy, abs=1e-6)
        assert curve == sorted(curve, reverse=True) and curve[-1] < curve[0]
        assert mine[0]["num_correct"] == round(24 * study.clean_accuracy)
        assert 0 < mine[0]["num_success"] <= mine[0]["num_correct"]
        assert mine[0]["median_distance"] > 0  # images that are wrong by themselves do not count
    far = [row for row in study.run.rows if row["epsilon"] == 100.0]
    for row in far:  # beyond the diagonal of the box only failures are left
        left = (row["num_correct"] - row["num_success"]) / 24
        assert row["robust_accuracy"] == pytest.approx(left, abs=1e-6)


@pytest.mark.study
def test_distances_are_of_correct_images_and_a_failure_is_far():
    result = min_norm.MinNorm(
        np.zeros((4, 1, 1, 1)), np.array([0.0, 1.0, 2.0, np.inf]), np.array([1, 1, 1, 0], bool)
    )
    is_correct = np.array([False, True, True, True])
    (row, *_) = min_norm._rows(MIN_NORM, "ddn", "l2", result, is_correct)
    assert (row["num_correct"], row["num_success"]) == (3, 2)
    assert row["median_distance"] == 2.0 and row["mean_distance_of_successes"] == 1.5
    failed = result._replace(success=np.array([1, 1, 0, 0], bool))
    (row, *_) = min_norm._rows(MIN_NORM, "ddn", "l2", failed, is_correct)
    assert row["median_distance"] is None and row["mean_distance_of_successes"] == 1.0


def test_an_image_that_is_wrong_by_itself_is_not_robust():
    # With confidence the attack asks for more than a wrong answer, and may not get it.
    result = min_norm.MinNorm(
        np.zeros((4, 1, 1, 1)), np.array([np.inf, 0.3, 2.0, np.inf]), np.array([0, 1, 1, 0], bool)
    )
    is_correct = np.array([False, False, True, True])
    rows = min_norm._rows(MIN_NORM, "carlini_wagner_l2", "l2", result, is_correct)
    assert [row["robust_accuracy"] for row in rows] == [0.5, 0.5, 0.25]


@pytest.mark.study
def test_the_grid_goes_from_each_class_to_each_other(studies):
    grid = studies["min_norm"].grid
    assert len(grid.sources) > 1 and sorted(set(grid.sources)) == list(grid.sources)
    for i, source in enumerate(grid.sources):
        assert grid.distance[i, source] == 0
        np.testing.assert_array_equal(grid.x_adv[i, source], grid.x[i])
        others = np.delete(grid.distance[i], source)
        assert np.all(others > 0)
        moved = grid.x_adv[i].astype(np.float64) - grid.x[i]
        norms = np.sqrt(np.sum(moved**2, axis=(1, 2, 3)))
        found = np.isfinite(grid.distance[i])
        # float32 sums of 64 squares.
        np.testing.assert_allclose(norms[found], grid.distance[i][found], rtol=1e-5)
        assert not norms[~found].any()
    assert np.isfinite(grid.distance).mean() > 0.5


@pytest.mark.study
def test_the_cascade_only_breaks_more(studies):
    for row in studies["auto_attack"].run.rows:
        stages = [row[name] for name in row if name.startswith("after_")]
        assert len(stages) == 4
        shares = [row["clean_accuracy"], *stages]
        assert shares == sorted(shares, reverse=True)
        assert stages[-1] == row["robust_accuracy"] == row["num_correct"] / 24
    near, far = studies["auto_attack"].run.rows
    assert far["robust_accuracy"] < near["robust_accuracy"] <= near["clean_accuracy"]


@pytest.mark.study
@pytest.mark.parametrize("name", STUDIES)
def test_interrupted_it_ends_with_the_same_rows(studies, name, monkeypatch):
    """Results cut off in the middle of a line, as a kill during a write leaves them."""
    run = studies[name].run
    module, config = STUDIES[name]
    path = run.workdir / "results.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[:-5])
    monkeypatch.setattr(min_norm, "targeted_grid", None)  # the grid is there already
    module.run_study(config, run.workdir)
    assert path.read_bytes() == complete

    def fail(*_, **__):
        raise AssertionError("attacked again")

    monkeypatch.setattr(min_norm, "_rows", fail)
    monkeypatch.setattr(auto_attack.attacks, "cascade", fail)
    again = module.run_study(config, run.workdir)
    assert path.read_bytes() == complete and again.run.rows == run.rows


@pytest.mark.parametrize(
    "name, change, sentence",
    [
        ("min_norm", dict(attacks=("ddn", "dnn")), "unknown attack 'dnn'; known: carlini"),
        ("min_norm", dict(attacks=()), "at least one attack"),
        ("min_norm", dict(epsilons_l2=()), "at least one radius in epsilons_l2"),
        ("min_norm", dict(epsilons_linf=(-0.1,)), "epsilons_linf >= 0"),
        ("min_norm", dict(num_steps=0), "num_steps >= 1"),
        ("min_norm", dict(confidence=-1.0), "confidence >= 0"),
        ("auto_attack", dict(version="rand"), "unknown version 'rand'; known: standard, plus"),
        ("auto_attack", dict(ball="l3"), "unknown"),
        ("auto_attack", dict(epsilons=()), "at least one epsilon"),
        ("auto_attack", dict(epsilons=(float("nan"),)), "epsilons >= 0"),
        ("auto_attack", dict(num_queries=1), "num_queries >= 2"),
        ("auto_attack", dict(model="resnet"), "unknown model 'resnet'"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, name, change, sentence):
    module, config = STUDIES[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        module.run_study(dataclasses.replace(config, **change), tmp_path / "a")
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


@pytest.mark.study
@pytest.mark.parametrize("name", STUDIES)
def test_a_folder_of_another_configuration_is_refused_and_kept(studies, name):
    workdir = studies[name].run.workdir
    module, config = STUDIES[name]
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="another configuration: num_steps was"):
        module.run_study(dataclasses.replace(config, num_steps=7), workdir)
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_the_launchers_exit_2_on_bad_flags(root, tmp_path):
    bad = {
        "min_norm": (["--attacks=nonsense"], "unknown attack 'nonsense'"),
        "auto_attack": (["--epsilons=1:2"], "--epsilons: need FIRST:LAST:COUNT"),
    }
    for name, (arguments, sentence) in bad.items():
        done = subprocess.run(
            [
                sys.executable, str(root / "launch" / f"{name}.py"), *arguments,
                f"--workdir={tmp_path / name}", "--compilation_cache=",
            ],
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and sentence in last
        assert "Traceback" not in done.stderr and not (tmp_path / name).exists()
