"""The study of the physical world: its numbers, resume, bad input, and the launcher."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from advjax.experiments import physical

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = physical.Config(
    model="mlp", num_examples=24, num_epochs=2, attacks=("fast", "iterative"),
    epsilons=(0.05, 0.1), num_photos=2, attack_batch_size=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, physical.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    for name in ("destruction.png", "photographs.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert rows == study.run.rows
    assert [(r["attack"], r["epsilon"]) for r in rows] == [
        (name, epsilon) for name in CONFIG.attacks for epsilon in CONFIG.epsilons
    ]
    for row in rows:
        assert row["source_clean"] == pytest.approx(study.clean_accuracy)
        # The attack never helps: what is wrong clean stays wrong.
        harmed = (row["source_clean"] - row["source_adversarial"]) * row["num_examples"]
        assert row["num_adversarial"] == pytest.approx(harmed, abs=1e-6)
        assert row["num_prefiltered"] <= row["num_adversarial"]
    assert (workdir / "orderings.csv").read_text().count("\n") == 1 + len(study.orderings)


@pytest.mark.study
def test_interrupted_it_ends_with_the_same_bytes(finished, tmp_path):
    workdir, _ = finished
    complete = results(workdir)
    subprocess.run(["cp", "-r", str(workdir), str(tmp_path / "b")], check=True)
    lines = complete.splitlines(keepends=True)
    (tmp_path / "b" / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    physical.run_study(CONFIG, tmp_path / "b")
    assert results(tmp_path / "b") == complete


@pytest.mark.study
def test_without_a_channel_nothing_is_destroyed(finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "c").mkdir()
    subprocess.run(
        ["cp", "-r", str(workdir / "checkpoints"), str(tmp_path / "c" / "checkpoints")], check=True
    )
    config = dataclasses.replace(CONFIG, strength=0.0, attacks=("fast",), epsilons=(0.2,))
    (row,) = physical.run_study(config, tmp_path / "c").run.rows
    assert row["num_adversarial"] > 0 and row["destruction_rate"] == 0
    assert row["photo_adversarial"] == row["source_adversarial"]
    assert row["photo_clean"] == row["source_clean"]


def _answers(correct, confidence, photo_correct):
    return physical.Answers(
        np.array(correct, bool), np.float32(confidence), np.array(photo_correct, bool), 0
    )


@pytest.mark.study
def test_a_row_by_hand():
    clean = _answers([1, 1, 1, 0], [0.9, 0.9, 0.7, 0.9], [[1, 1, 1, 0], [1, 0, 1, 0]])
    adversarial = _answers([0, 0, 0, 0], [0.9, 0.8, 0.9, 0.9], [[1, 0, 1, 1], [0, 0, 1, 0]])
    row = physical.row(CONFIG, "fast", 8 / 255, clean, adversarial)
    assert row["num_adversarial"] == 3 and row["num_prefiltered"] == 2
    assert row["destruction_rate"] == pytest.approx(3 / 6)  # float32 means
    assert row["prefiltered_destruction_rate"] == pytest.approx(1 / 4)
    assert row["prefiltered_photo_clean"] == pytest.approx(3 / 4)
    assert row["photo_adversarial"] == pytest.approx(4 / 8)
    assert (row["published_destruction_rate"], row["source_clean"]) == (0.333, 0.75)


@pytest.mark.study
def test_orderings_by_hand():
    def row(attack, source, rate):
        numbers = dict(source_adversarial=source, destruction_rate=rate, photo_adversarial=0.0)
        return dict(attack=attack, epsilon=0.1, prefiltered_destruction_rate=None, **numbers)

    rows = [row("fast", 0.5, 0.3), row("iterative", 0.2, 0.3)]
    verdicts = {o.quantity: o.verdict for o in physical.orderings(rows)}
    rows[0]["source_adversarial"] = 0.1
    assert physical.orderings(rows)[0].verdict == "does not hold"
    assert verdicts == {
        "source_adversarial": "holds",
        "destruction_rate": "equal",
        "prefiltered_destruction_rate": "no images",
    }


@pytest.mark.study
@pytest.mark.parametrize("levels, steps", [(4, 5), (8, 10), (16, 20), (64, 68), (0, 1)])
def test_steps_are_the_published_ones(levels, steps):
    assert physical.published_steps(levels / 255) == steps


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(dataset="imagenet"), "unknown data set 'imagenet'"),
        (dict(attacks=("fgsm",)), "unknown attack 'fgsm'; known: fast, iterative"),
        (dict(attacks=()), "at least one of attacks"),
        (dict(epsilons=()), "at least one of epsilons"),
        (dict(epsilons=(-0.1,)), "finite epsilons >= 0"),
        (dict(strength=float("nan")), "finite strength >= 0"),
        (dict(strength=9.0), "need strength \\* perspective < 0.25, got 0.36"),
        (dict(num_photos=0), "num_photos >= 1"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        physical.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value) and not (tmp_path / "d").exists()


def _launch(root, workdir, *flags):
    return subprocess.run(
        [sys.executable, "launch/physical.py", f"--workdir={workdir}", *flags],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip


@pytest.mark.study
def test_the_launcher_runs_and_tells_bad_flags(root, tmp_path):
    done = _launch(root, tmp_path / "e", "--smoke", "--model=mlp", "--attacks=pgd,photo")
    assert done.returncode == 0, done.stderr
    assert "Printed and photographed" in done.stdout and "Orderings" in done.stdout
    done = _launch(root, tmp_path / "f", "--epsilons=much")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: --epsilons: need") and not (tmp_path / "f").exists()
