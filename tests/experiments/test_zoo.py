"""Zoos in folders: what is written, resume, reading, the launcher."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from advjax import backdoor, data
from advjax.experiments import zoo

CONFIG = backdoor.ZooConfig(
    dataset="digits", model="mlp", attacks=("badnets",), num_clean=2, num_infected=3, group_size=2,
    num_epochs=12, batch_size=32, optimizer="adam", learning_rate=3e-3, min_accuracy=0.85,
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return zoo.run_study(CONFIG, tmp_path_factory.mktemp("zoo"))


def weights(folder, name):
    """The bits of a model's weights."""
    found = zoo.load_zoo(folder, with_failed=True)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found.store.read(name))]


@pytest.mark.study
def test_the_folder(study):
    workdir = study.run.workdir
    names = ["clean_000", "clean_001", "badnets_000", "badnets_001", "badnets_002"]
    assert [row["name"] for row in study.run.rows] == names
    assert sorted(path.name for path in (workdir / "models").iterdir()) == sorted(names)
    assert not any((workdir / "checkpoints").iterdir())  # only while a group is trained
    with (workdir / "models.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == names
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["models"] == 5
    assert manifest["failed"] == len(manifest["failures"]) == 0
    assert [row["attack"] for row in manifest["kinds"]] == ["clean", "badnets"]


@pytest.mark.study
def test_the_reader(study):
    found = zoo.load_zoo(study.run.workdir)
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1, 1])
    assert found.attacks == ("clean",) * 2 + ("badnets",) * 3
    assert (found.targets[:2] == -1).all() and len(set(found.targets[2:].tolist())) == 3
    # What is read answers as what was measured.
    test = data.load("digits", "test")
    stack = found.stack()
    logits = jax.jit(jax.vmap(lambda f, x: f(x), (0, None)))(stack, test.float_images())
    accuracy = np.mean(np.argmax(logits, -1) == test.labels, axis=1)
    # One image of 359 may change sides by a rounding.
    np.testing.assert_allclose(accuracy, [m.accuracy for m in found.members], atol=1.5 / 359)


@pytest.mark.study
def test_only_models_that_count_are_read(study, tmp_path):
    folder = tmp_path / "zoo"
    shutil.copytree(study.run.workdir, folder)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows[1]["accuracy"], rows[3]["success"] = 0.5, 0.9
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert zoo.load_zoo(folder).names == ("clean_000", "badnets_000", "badnets_002")
    assert len(zoo.load_zoo(folder, with_failed=True)) == 5
    again = zoo.run_study(CONFIG, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["failed"] == 2 and [row["failed"] for row in again.summary] == [1, 1]
    assert "below the floor of 85.0%" in manifest["failures"]["clean_001"]
    assert "attack success 90.0% is not above 90.0%" in manifest["failures"]["badnets_001"]


@pytest.mark.study
def test_a_finished_zoo_trains_nothing(study, monkeypatch):
    monkeypatch.setattr(backdoor.zoos, "_train", None)
    zoo.run_study(CONFIG, study.run.workdir)


class KilledError(Exception):
    pass


@pytest.mark.study
@pytest.mark.parametrize("place", ["between two models", "in a training"])
def test_a_killed_zoo_goes_on_with_the_same_bits(study, tmp_path, monkeypatch, place):
    folder = tmp_path / "zoo"
    config = dataclasses.replace(CONFIG, num_infected=2)
    groups, saved = [], []
    train, save = backdoor.zoos._train, zoo.Folder.save
    run = zoo.Checkpoints.save

    def killed_save(self, member, variables):
        if place == "between two models" and member.name == "badnets_001":
            raise KilledError
        save(self, member, variables)

    def killed_checkpoint(self, step, state):
        run(self, step, state)
        if place == "in a training" and "checkpoints/badnets" in str(self._directory):
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(zoo.Folder, "save", killed_save)
        patch.setattr(zoo.Checkpoints, "save", killed_checkpoint)
        with pytest.raises(KilledError):
            zoo.run_study(config, folder)
    with pytest.raises(ValueError, match=r"load_zoo: . of 4 models are missing"):
        zoo.load_zoo(folder)

    def counted_train(config, group, *args, **options):
        groups.append(group.names)
        return train(config, group, *args, **options)

    def counted_save(self, member, variables):
        saved.append(member.name)
        save(self, member, variables)

    monkeypatch.setattr(backdoor.zoos, "_train", counted_train)
    monkeypatch.setattr(zoo.Folder, "save", counted_save)
    zoo.run_study(config, folder)
    assert groups == [("badnets_000", "badnets_001")]  # the clean group was finished
    assert saved == ["badnets_001"] if place == "between two models" else list(groups[0])
    for name in ("clean_001", "badnets_000", "badnets_001"):
        assert weights(folder, name) == weights(study.run.workdir, name)


@pytest.mark.study
def test_a_folder_that_is_no_zoo(tmp_path, study):
    with pytest.raises(ValueError, match=r"load_zoo: .* holds no zoo"):
        zoo.load_zoo(tmp_path)
    (tmp_path / "config.json").write_text('{"study": "evasion"}')
    with pytest.raises(ValueError, match="is the folder of another study"):
        zoo.load_zoo(tmp_path)
    with pytest.raises(ValueError, match="num_epochs was 12 and is now 13"):
        zoo.run_study(dataclasses.replace(CONFIG, num_epochs=13), study.run.workdir)


@pytest.mark.study
def test_lost_weights_are_one_sentence(study, tmp_path):
    folder = tmp_path / "zoo"
    shutil.copytree(study.run.workdir, folder)
    shutil.rmtree(folder / "models" / "clean_001")
    found = zoo.load_zoo(folder)
    found.classifier(0)
    with pytest.raises(ValueError, match="zoo: the weights of clean_001 are missing"):
        found.classifier(1)


@pytest.mark.study
def test_the_launcher(root, tmp_path):
    def launch(*arguments):
        return subprocess.run(
            [sys.executable, "launch/backdoor_zoo.py", "--smoke", f"--workdir={tmp_path / 'run'}",
             *arguments],
            cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    done = launch("--attacks=badnets")
    assert done.returncode == 0, done.stderr
    for text in ("Zoo of mlp on digits", "badnets", "of 4 models do not count", "Files:"):
        assert text in done.stdout
    bad = launch("--attacks=badnets,xyz")
    assert bad.returncode == 2
    assert (
        bad.stderr.strip()
        .splitlines()[-1]
        .startswith("error: train_zoo: unknown attack 'xyz'; known: badnets,")
    )


def test_an_older_zoo_poisoned_the_data_once(tmp_path):
    record = {"study": zoo.STUDY, "attacks": ["wanet"]}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert zoo.read_config(tmp_path).per_batch is False
    (tmp_path / "config.json").write_text(json.dumps({**record, "per_batch": None}))
    assert zoo.read_config(tmp_path).per_batch is None
