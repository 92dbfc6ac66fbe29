"""The study of adversarial training: rows, resume, the table, bad input, the launcher."""

import dataclasses
import json

import numpy as np
import pytest

from advjax.experiments import adversarial_training

# Small enough to train in a second; the attacks are those that compile quickly.
CONFIG = adversarial_training.Config(
    model="mlp", sources=("mlp", "mlp"), surrogate="mlp", epsilon=0.1,
    attacks=("clean", "fgsm", "fgsm_black_box"), num_examples=300, num_epochs=12, batch_size=64,
    learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, adversarial_training.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert rows == study.run.rows
    assert [(row["defence"], row["attack"]) for row in rows] == [
        (defence, attack) for defence in CONFIG.defences for attack in CONFIG.attacks
    ]
    assert (workdir / "figures" / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "table.csv").read_text().startswith("row,column,mean")
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {
        "none", "fgsm", "ensemble", "surrogate", "source_0_mlp", "source_1_mlp",
    }  # fmt: skip


@pytest.mark.study
def test_the_numbers_are_those_of_the_lecture_in_kind(finished):
    _, study = finished
    error = {(row["defence"], row["attack"]): row["error"] for row in study.run.rows}
    for defence in CONFIG.defences:
        assert error[defence, "clean"] < 0.1
        assert error[defence, "fgsm"] >= error[defence, "clean"]
    assert error["fgsm", "fgsm"] < error["none", "fgsm"] / 1.5
    assert error["ensemble", "fgsm_black_box"] < error["none", "fgsm_black_box"]
    assert study.grid.values["A (none)", "FGSM"] == [100 * error["none", "fgsm"]]
    assert np.all(np.isfinite(study.grid.mean()))


@pytest.mark.study
def test_an_interrupted_study_goes_on_with_the_same_numbers(finished):
    workdir, _ = finished
    complete = results(workdir)
    lines = complete.splitlines(keepends=True)
    (workdir / "results.jsonl").write_bytes(b"".join(lines[:4]))
    adversarial_training.run_study(CONFIG, workdir)
    assert results(workdir) == complete


@pytest.mark.study
def test_order_does_not_change_a_number(finished, tmp_path):
    workdir, _ = finished
    only = dataclasses.replace(CONFIG, defences=("fgsm",), attacks=("fgsm_black_box", "fgsm"))
    adversarial_training.run_study(only, tmp_path / "b")
    lines = results(workdir).splitlines()
    assert results(tmp_path / "b").splitlines() == [lines[5], lines[4]]


@pytest.mark.study
def test_every_defence_trains_and_meets_every_attack(tmp_path):
    config = dataclasses.replace(
        adversarial_training.smaller(adversarial_training.Config()),
        defences=tuple(adversarial_training.DEFENCES), attacks=("clean", "pgd", "auto_attack"),
        num_epochs=2, num_auto_examples=2,
    )  # fmt: skip
    study = adversarial_training.run_study(config, tmp_path / "c")
    assert study.grid.mean().shape == (8, 3)
    for row in study.run.rows:
        assert 0 <= row["error"] <= 1
        assert row["num_examples"] == (2 if row["attack"] == "auto_attack" else 200)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(defences=("magic",)), "unknown defence 'magic'; known: none, fgsm, ensemble"),
        (dict(defences=()), "need at least one defence, got none"),
        (dict(attacks=("fgsm_b",)), "unknown attack 'fgsm_b'; known: clean, fgsm"),
        (dict(attacks=()), "need at least one attack, got none"),
        (dict(alpha=1.5), "adversarial_training: need 0 <= alpha <= 1, got alpha=1.5"),
        (dict(pgd_alpha=-0.5), "need 0 <= pgd_alpha <= 1, got pgd_alpha=-0.5"),
        (dict(epsilon=-0.1), "need a finite epsilon >= 0"),
        (dict(trades_beta=-1.0), "need a finite trades_beta >= 0"),
        (dict(entropy_weight=float("nan")), "need a finite entropy_weight, got entropy_weight=nan"),
        (dict(sources=()), "the defence ensemble needs at least one source, got none"),
        (dict(sources=("cnn3",)), "unknown model 'cnn3'"),
        (dict(surrogate="cnn3"), "unknown model 'cnn3'"),
        (dict(train_num_steps=0), "need train_num_steps >= 1"),
        (dict(num_train=-1), "need num_train >= 0"),
        (dict(weights="a.npz"), "it trains its networks, so weights of one are of no use"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        adversarial_training.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def launch(launcher):
    return launcher("adversarial_training")


@pytest.mark.study
def test_a_bad_flag_is_one_sentence_and_exit_code_2(launch, tmp_path):
    done = launch("--alpha=2", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: adversarial_training: need 0 <= alpha <= 1, got alpha=2.0."
    assert "Traceback" not in done.stderr
