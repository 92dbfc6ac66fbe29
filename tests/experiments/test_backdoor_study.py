"""The study of single backdoor attacks: rows, resume, contact sheets, bad input, the launcher."""

import dataclasses
import json
import types

import numpy as np
import pytest

from advjax.experiments import backdoor

# Half of the two source classes, since the digits have only 140 images of each.
CONFIG = backdoor.Config(
    model="mlp", attacks=("badnets", "sig"), label_map="x_to_one", sources=(3, 6), target=1,
    ratio=0.5, clean_label_ratio=0.6, cover_ratio=0.5, num_examples=300, num_epochs=15,
    batch_size=32, learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, backdoor.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert rows == study.run.rows
    assert [row["attack"] for row in rows] == ["badnets", "sig"]
    for row in rows:
        assert (workdir / "figures" / f"{row['attack']}.png").read_bytes().startswith(b"\x89PNG")
        assert row["clean_model_accuracy"] == rows[0]["clean_model_accuracy"]
        assert row["clean_model_accuracy"] > 0.9
    assert [row["label_map"] for row in rows] == [
        [-1, -1, -1, 1, -1, -1, 1, -1, -1, -1],
        [-1, 1, -1, -1, -1, -1, -1, -1, -1, -1],  # sig keeps labels
    ]


@pytest.mark.study
def test_badnets_works_on_its_source_classes_only(finished):
    _, study = finished
    row = study.run.rows[0]
    assert row["accuracy"] > row["clean_model_accuracy"] - 0.05
    assert row["attack_success_rate"] > 0.9
    assert row["robust_accuracy"] < 0.1
    assert row["clean_model_success_rate"] < 0.2
    assert row["spill"] < 0.05
    assert study.run.rows[1]["spill"] is None  # every class but the target is attacked


@pytest.mark.study
def test_the_contact_sheet_shows_attacked_classes(finished):
    workdir, _ = finished
    shown = np.load(workdir / "examples" / "badnets.npz")
    np.testing.assert_array_equal(shown["y"], [3, 6])
    # 1e-6: both are multiples of 1 / 255, divided in two ways.
    changed = np.any(np.abs(shown["x"] - shown["triggered"]) > 1e-6, axis=(0, 3))
    assert changed[-3:, -3:].any()
    assert not changed[:-3].any()
    assert not changed[:, :-3].any()
    assert np.all(shown["triggered"][:, -3:, -3:] == 1)


@pytest.mark.study
def test_spill():
    goals = np.array([1, -1, -1, -1])
    y = np.array([0, 1, 2, 2, 3, 3])
    answers = np.array([1, 1, 1, 2, 3, 0])
    assert backdoor.spill(answers, y, goals) == 1 / 4  # the target's own images aside
    assert backdoor.spill(answers, y, np.array([1, 0, 3, 2])) is None


@pytest.mark.study
def test_an_interrupted_study_goes_on_with_the_same_numbers(finished, tmp_path):
    workdir, _ = finished
    complete = results(workdir)
    first = dataclasses.replace(CONFIG, attacks=("sig",))
    backdoor.run_study(first, tmp_path / "b")
    assert results(tmp_path / "b").splitlines()[0] == complete.splitlines()[1]
    (workdir / "results.jsonl").write_bytes(complete.splitlines(keepends=True)[0])
    backdoor.run_study(CONFIG, workdir)
    assert results(workdir) == complete


@pytest.mark.parametrize(
    "attack, ratio, per_batch",
    [("badnets", 0.5, False), ("sig", 0.6, False), ("lira", None, None)],
)
def test_every_kind_of_attack_has_its_ratio(monkeypatch, tmp_path, attack, ratio, per_batch):
    monkeypatch.setattr("advjax.backdoor.train", lambda *_, **given: given)
    config = dataclasses.replace(CONFIG, per_batch=False)
    folder = types.SimpleNamespace(workdir=tmp_path)
    given = backdoor._infected(config, attack, None, None, None, folder, {})
    assert (given["ratio"], given["per_batch"]) == (ratio, per_batch)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(dataset="imagenet"), "unknown data set 'imagenet'; known: digits, mnist"),
        (dict(attacks=("clbd",)), "unknown attack 'clbd'; known: badnets, blended, sig"),
        (dict(attacks=()), "at least one attack, got none"),
        (dict(label_map="one"), "unknown label map 'one'; known: all_to_one"),
        (dict(target=10), "need a target from 0 ... 9, got target=10"),
        (dict(target=3), r"need sources without the target 3, got \[3, 6\]"),
        (dict(sources=()), r"need sources from 0 ... 9, a list of at least one, got \[\]"),
        (dict(clean_label_ratio=-1.0), "need 0 <= clean_label_ratio <= 1, got"),
        (dict(ratio=1.2), "need 0 <= ratio <= 1, got ratio=1.2"),
        (
            dict(options={"clbd": {}}),
            "unknown attack with options 'clbd'; known: badnets, blended, sig",
        ),
        (
            dict(attacks=("badnets",), options={"badnets": {"alpha": 1}}),
            "unknown option of badnets 'alpha'; known: size, value, margin",
        ),
        (dict(options={"badnets": {"size": 9}}), "fits into images of 8 x 8, got size=9"),
        (dict(options={"badnets": {"size": (1, 2)}}), r"for the option size .* got \(1, 2\)"),
        (dict(options={"badnets": {"value": ("a",)}}), "need a number for the option value"),
        (dict(options={"badnets": {"value": (1, 1)}}), r"one a channel \(1\), got shape \(2,\)"),
        (dict(options={"sig": {"amplitude": "a"}}), "need a number for the option amplitude"),
        (dict(std=(0.0,)), r"backdoor: need a positive std, got std=\(0.0,\)"),
        (
            dict(mean=(0.0, 0.0)),
            r"backdoor: need one mean, or one for each of 1 channel\(s\), got 2",
        ),
        (dict(quantise="ceil"), "unknown quantisation 'ceil'"),
        (dict(num_epochs=0), "need num_epochs >= 1"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        backdoor.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def launch(launcher):
    return launcher("backdoor")


@pytest.mark.study
def test_the_launcher_prints_a_table(launch, tmp_path):
    done = launch(
        "--smoke",
        "--options=badnets.size=2,badnets.value=[0.5]",
        f"--workdir={tmp_path}",
        "--compilation_cache=",
    )
    assert done.returncode == 0, done.stderr
    for text in ("Backdoors: digits, mlp, 200 images", "badnets", "success", "Files:"):
        assert text in done.stdout.replace("\n", " "), text
    assert (tmp_path / "figures" / "badnets.png").exists()
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["options"] == {"badnets": {"size": 2, "value": [0.5]}}


@pytest.mark.parametrize(
    "argument, sentence",
    [
        (
            "--options=size=2",
            "--options: need ATTACK.NAME=VALUE with commas between them, got 'size=2'",
        ),
        ("--sources=a", "--sources: need classes with commas, got 'a'"),
        ("--target=12", "need a target from 0 ... 9, got target=12"),
    ],
)
def test_bad_flags_are_one_sentence_and_exit_code_2(launch, tmp_path, argument, sentence):
    done = launch(argument, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and "Traceback" not in done.stderr
