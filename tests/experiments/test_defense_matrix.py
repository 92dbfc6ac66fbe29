"""The study of all defences against all attackers: rows, table, resume, bad input, the launcher."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

from advjax import defenses
from advjax.experiments import defense_gan, defense_matrix, grids

# Defences whose adaptive attack is their own: AutoAttack takes long to compile.
CONFIG = dataclasses.replace(
    defense_matrix.smaller(defense_matrix.Config()),
    defences=("distilled", "magnet"), attacks=("fgsm", "adaptive"), num_epochs=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, defense_matrix.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert rows == study.run.rows
    keys = [tuple(row[name] for name in defense_matrix.KEY_COLUMNS) for row in rows]
    assert keys == CONFIG.cells
    assert len(keys) == 2 * 4  # one attack of three threats, and the adaptive one
    assert (workdir / "figures" / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "table.csv").read_text().startswith("row,column,mean")
    # A second training of what is distilled, none of what is wrapped at test time.
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {
        "surrogate", "none", "teacher", "distilled", "teacher_again", "distilled_again",
        "detector I", "detector II",
    }  # fmt: skip


@pytest.mark.study
def test_rows_are_shares_and_only_magnet_rejects(finished):
    _, study = finished
    for row in study.run.rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["clean_accuracy"] <= 1
        assert (row["detected"] is None) == (row["defence"] != "magnet")
        if row["detected"] is not None:
            # An image is right when it is rejected or answered correctly.
            least = max(row["reformed"], row["detected"])
            assert least <= row["accuracy"] <= row["reformed"] + row["detected"] + 1e-6


@pytest.mark.study
def test_logits_over_t_show_what_distillation_hides(finished):
    _, study = finished
    accuracy = {
        row["attack"]: row["accuracy"]
        for row in study.run.rows
        if (row["defence"], row["threat"]) == ("distilled", "white box")
    }
    assert accuracy["adaptive"] < accuracy["fgsm"]


@pytest.mark.study
def test_an_interrupted_study_goes_on_with_the_same_numbers(finished):
    workdir, _ = finished
    complete = results(workdir)
    lines = complete.splitlines(keepends=True)
    # What is missing: MagNet's rows, images of the substitute and the adaptive attack among them.
    (workdir / "results.jsonl").write_bytes(b"".join(lines[:4]))
    defense_matrix.run_study(CONFIG, workdir)
    assert results(workdir) == complete


@pytest.mark.study
def test_defense_gan_is_judged_behind_its_generator(monkeypatch, tmp_path):
    def grey(*_):
        return defenses.GeneratorFn(Partial(lambda z: jnp.full((len(z), 8, 8, 1), 0.5)), 4)

    monkeypatch.setattr(defense_gan, "trained_generator", grey)
    config = dataclasses.replace(CONFIG, defences=("defense_gan",), threats=("white box",))
    rows = defense_matrix.run_study(config, tmp_path / "e").run.rows
    assert [row["method"] for row in rows] == ["FGSM", "BPDA"]
    # All images are replaced by one, so whatever is shown gets one and the same answer.
    assert len({row[name] for row in rows for name in ("clean_accuracy", "accuracy")}) == 1


def row(defence, threat, attack, accuracy):
    return {
        "defence": defence, "threat": threat, "attack": attack, "accuracy": accuracy,
        "method": defense_matrix.method(defence, attack), "clean_accuracy": 1.0,
        "num_examples": 4,
    }  # fmt: skip


def test_the_table_says_which_attack_was_adaptive_and_which_cells_are_worst():
    config = dataclasses.replace(
        CONFIG, defences=("pgd", "magnet"), threats=("gray box", "white box")
    )
    accuracies = {"pgd": (0.75, 0.25, 0.25), "magnet": (0.5, 1.0, 0.75)}
    rows = [
        row(*cell, accuracy)
        for cell, accuracy in zip(config.cells, sum(accuracies.values(), ()), strict=True)
    ]
    grid = defense_matrix.table(config, rows)
    assert grid.columns == ["clean", "gray FGSM", "white FGSM", "white adaptive"]
    assert grid.texts() == [
        ["100.0", "75.0", "25.0 *", "25.0 AutoAttack *"],
        ["100.0", "50.0 *", "100.0", "75.0 APGD past the detectors"],
    ]
    assert "| pgd | 100.0 | 75.0 | 25.0 * | 25.0 AutoAttack * |" in grids.to_markdown(grid)


def test_the_adaptive_attack_is_one_of_the_white_box():
    cells = defense_matrix.Config(defences=("pgd",)).cells
    assert [cell[1] for cell in cells if cell[2] == "adaptive"] == ["white box"]
    assert len(cells) == 3 * 4 + 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(defences=("magic",)), "defense_matrix: unknown defence 'magic'; known: none, fgsm"),
        (dict(defences=()), "defense_matrix: need at least one defence, got none"),
        (dict(threats=("grey box",)), "unknown threat 'grey box'; known: black box, gray box"),
        (dict(threats=()), "need at least one threat, got none"),
        (dict(attacks=("bpda",)), "unknown attack 'bpda'; known: fgsm, bim, pgd, cw, adaptive"),
        (dict(attacks=()), "need at least one attack, got none"),
        (
            dict(attacks=("adaptive",), threats=("black box", "gray box")),
            "the adaptive attack is one of the white box: need another attack or that threat",
        ),
        (dict(surrogate="cnn3"), "unknown model 'cnn3'"),
        (dict(epsilon=-0.1), "defense_matrix: need a finite epsilon >= 0"),
        (dict(attack_batch_size=0), "need attack_batch_size >= 1"),
        (dict(num_queries=1), "need num_queries >= 2"),
        (dict(weights="a.npz"), "it trains its networks, so weights of one are of no use"),
        (dict(alpha=1.5), "adversarial_training: need 0 <= alpha <= 1, got alpha=1.5"),
        (dict(temperature=0.0), "distillation: need a finite temperature > 0"),
        (dict(false_positive_rate=2.0), "magnet: need 0 <= false_positive_rate <= 1"),
        (dict(num_held_out=1000), "need num_held_out < num_train, got num_held_out=1000"),
        (dict(restarts=0), "defense_gan: need restarts >= 1"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        defense_matrix.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_a_share_beyond_one_is_fine_where_alpha_is_another_thing():
    # MagNet's alpha is below 1; the share of the clean loss may be 1.
    dataclasses.replace(CONFIG, alpha=1.0).check()


@pytest.mark.parametrize(
    "flag, sentence",
    [
        ("--defences=magic", "defense_matrix: unknown defence 'magic'; known: none, fgsm"),
        ("--critic_features=1.5", "--critic_features: need whole numbers, got '1.5'"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(launcher, tmp_path, flag, sentence):
    done = launcher("defense_matrix")(flag, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {sentence}")
    assert "Traceback" not in done.stderr
