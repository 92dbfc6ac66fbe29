"""Studies of universal perturbations and of transfer: folders, resume, orderings, launchers."""

import csv
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from advjax.experiments import transfer, universal

UNIVERSAL = universal.Config(
    model="mlp", num_examples=24, num_epochs=2, methods=("sgd", "deepfool"), epsilons=(0.0, 0.3),
    num_fit=16, num_passes=2,
)  # fmt: skip
TRANSFER = transfer.Config(
    model="mlp", more_models=(), num_examples=24, num_epochs=2, num_steps=2,
    confidences=(0.0, 5.0), cw_num_steps=10, cw_num_search_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def universal_run(tmp_path_factory):
    return universal.run_study(UNIVERSAL, tmp_path_factory.mktemp("universal"))


@pytest.fixture(scope="module")
def transfer_run(tmp_path_factory):
    return transfer.run_study(TRANSFER, tmp_path_factory.mktemp("transfer"))


@pytest.mark.study
def test_universal_folder(universal_run):
    run = universal_run.run
    for name in ("curve.png", "perturbation.png"):
        assert (run.workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert [(row["method"], row["epsilon"]) for row in run.rows] == [
        (method, epsilon) for method in UNIVERSAL.methods for epsilon in UNIVERSAL.epsilons
    ]
    for row in run.rows:
        delta = np.load(universal.perturbation_path(run, row["method"], row["epsilon"]))
        assert np.abs(delta).max() <= np.float32(row["epsilon"])
        assert row["num_not_answered"] == 0
        assert row["epsilon"] > 0 or row["fooling_rate"] == row["fooling_rate_fit"] == 0
    assert max(row["fooling_rate"] for row in run.rows) > 0


@pytest.mark.study
def test_universal_goes_on_where_it_was_interrupted(universal_run, monkeypatch):
    run = universal_run.run
    path = run.workdir / "results.jsonl"
    complete = path.read_bytes()
    perturbation = universal.perturbation_path(run, "sgd", 0.3)
    delta = np.load(perturbation)
    path.write_bytes(complete[:-5])
    perturbation.unlink()  # a row whose perturbation was deleted
    universal.run_study(UNIVERSAL, run.workdir)
    np.testing.assert_array_equal(np.load(perturbation), delta)
    assert path.read_bytes() == complete
    monkeypatch.setattr(universal, "_fit", None)  # nothing is computed again
    universal.run_study(UNIVERSAL, run.workdir)


@pytest.mark.study
def test_transfer_folder(transfer_run):
    run = transfer_run.run
    for name in ("matrix_fgsm.png", "matrix_carlini_wagner_l2_5.png", "confidence.png"):
        assert (run.workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert len(run.rows) == len(TRANSFER.variants) * 4
    with (run.workdir / "orderings.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(transfer_run.orderings) == len(TRANSFER.variants) + 1 + 1
    for row in table:
        assert (row["holds"] == "holds") == (float(row["stronger"]) > float(row["weaker"]))
    for row in run.rows:
        assert (row["relation"] == "white box") == (row["source"] == row["target"])


@pytest.mark.study
def test_transfer_goes_on_where_it_was_interrupted(transfer_run, monkeypatch):
    path = transfer_run.run.workdir / "results.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[:-5])
    transfer.run_study(TRANSFER, transfer_run.run.workdir)
    assert path.read_bytes() == complete
    monkeypatch.setattr(transfer, "_cell", None)  # nothing is computed again
    transfer.run_study(TRANSFER, transfer_run.run.workdir)


@pytest.mark.study
def test_orderings_compare_means_over_pairs():
    config = dataclasses.replace(TRANSFER, attacks=("fgsm", "bim"))
    rates = {"fgsm": (0.5, 0.1), "bim": (0.25, 0.25)}
    rows = [
        {
            "attack": name, "confidence": 0.0, "transfer_rate": rates[name][s != t],
            "relation": transfer.relation(config, s, t),
        }
        for name in rates for s in config.members for t in config.members
    ]  # fmt: skip
    found = {row["claim"]: row for row in transfer.orderings(config, rows)}
    fgsm = found["white box stronger: fgsm"]
    assert (fgsm["stronger"], fgsm["weaker"], fgsm["holds"]) == (0.5, 0.1, "holds")
    assert found["white box stronger: bim"]["holds"] == "does not hold"  # a tie
    assert found["on its source iterative (bim) stronger than fast (fgsm)"]["stronger"] == 0.25
    assert np.isnan(transfer.mean_rate(rows, "fgsm", 0.0, ("other architecture",)))


def test_the_distance_is_of_the_images_that_moved():
    config = dataclasses.replace(TRANSFER, attacks=("fgsm",))
    accuracies = dict.fromkeys(config.members, 1.0)
    rates = np.zeros(len(config.members))
    for distances, expected in (([0.0, 3.0, 1.0], 2.0), ([0.0, 0.0, 0.0], None)):
        cell = transfer._Cell(rates, np.array(distances))
        rows = transfer._rows(config, "fgsm", 0.0, next(iter(config.members)), cell, accuracies)
        assert {row["mean_distance_l2"] for row in rows} == {expected}
        assert {row["num_examples"] for row in rows} == {3}


@pytest.mark.parametrize(
    "study, config, change, sentence",
    [
        (universal, UNIVERSAL, dict(methods=("fgsm",)), "universal: unknown method 'fgsm'"),
        (universal, UNIVERSAL, dict(methods=()), "universal: need at least one method"),
        (universal, UNIVERSAL, dict(ball="l3"), "unknown ball 'l3'"),
        (universal, UNIVERSAL, dict(num_fit=0), "universal: need num_fit >= 1"),
        (universal, UNIVERSAL, dict(epsilons=(-0.1,)), "universal: need a finite epsilons >= 0"),
        (universal, UNIVERSAL, dict(dataset="imagenet"), "unknown data set 'imagenet'"),
        (transfer, TRANSFER, dict(attacks=("gsm",)), "transfer: unknown attack 'gsm'"),
        (transfer, TRANSFER, dict(attacks=()), "transfer: need at least one attack"),
        (transfer, TRANSFER, dict(seeds=(0,)), "transfer: need at least two networks"),
        (transfer, TRANSFER, dict(more_models=("vgg",)), "transfer: unknown model 'vgg'"),
        (transfer, TRANSFER, dict(weights="a.npz"), "transfer: need several networks"),
        (transfer, TRANSFER, dict(confidences=(-1.0,)), "finite confidences >= 0"),
        (transfer, TRANSFER, dict(cw_num_steps=0), "transfer: need cw_num_steps >= 1"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, study, config, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        study.run_study(dataclasses.replace(config, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


LAUNCHERS = {
    "universal": ("--methods=sgd", "Universal perturbations in linf", "fooled, held out", "Files:"),
    "transfer": (
        "--attacks=fgsm,carlini_wagner_l2",
        "Transfer on digits",
        "Orderings of the lecture",
        "holds",
        "Files:",
    ),
}


@pytest.mark.study
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launcher(root, tmp_path, name):
    option, *texts = LAUNCHERS[name]

    def launch(*arguments):
        return subprocess.run(
            [
                sys.executable, str(root / "launch" / f"{name}.py"), "--smoke", "--model=mlp",
                "--num_epochs=1", "--compilation_cache=", f"--workdir={tmp_path / 'w'}", option,
                *arguments,
            ],
            capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip

    bad = launch("--epsilon=-1" if name == "transfer" else "--epsilons=1:2")
    last = bad.stderr.strip().splitlines()[-1]
    assert bad.returncode == 2 and last.startswith("error: ") and "epsilon" in last
    assert not (tmp_path / "w").exists()
    done = launch()
    assert done.returncode == 0, done.stderr
    for text in texts:
        assert text in done.stdout.replace("\n", " "), text
