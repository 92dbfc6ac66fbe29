"""Studies of detectors: rows, resume, re-readings, pictures, bad input, the launchers."""

import csv
import dataclasses
import json
import re
import shutil
import types

import numpy as np
import pytest
import rich.console

from advjax import backdoor, boundary, detectors
from advjax.experiments import xray, xray_figures, xray_map, zoo
from advjax.experiments.runs import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A zoo of two clean and two infected networks."""
    path = tmp_path_factory.mktemp("zoos") / "zoo"
    config = dataclasses.replace(zoo.smaller(xray._own_zoo(True)), attacks=("badnets",))
    zoo.run_study(config, path)
    return path


@pytest.fixture(scope="module")
def config(folder):
    return xray.Config(
        zoo=str(folder), detectors=("model_xray", "mm_bd"), num_planes=3, densities=(15, 20),
        expansions=(5.0, 0.5), with_failed=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, xray.run_study(config, workdir)


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert rows == study.run.rows
    assert len(rows) == 4 * (4 + 1)  # four models, two densities by two expansions and MM-BD
    assert not any(row["error"] for row in rows)
    assert len(list((workdir / "surveys").glob("*.npz"))) == 16
    for name in ("roc", "scores", "readings"):
        assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {row["detector"] for row in table(workdir / "auroc.csv")} == {
        "xray_entropy", "xray_area", "mm_bd",
    }  # fmt: skip


@pytest.mark.study
def test_the_tables_are_readings_of_the_surveys(finished):
    """Scores and an AUROC by hand, from the stored surveys."""
    workdir, study = finished
    models = [row for row in study.run.rows if row["detector"] == "mm_bd"]
    labels = [row["is_infected"] for row in models]
    mine = [
        row for row in study.readings if row["reading"] == "xray_entropy" and row["order"] == 2.0
    ]
    assert len(mine) == 1
    base = read(workdir, models[0]["model"], 15, 5.0)
    said = detectors.read_survey(base, order=2.0)
    shares = base.shares.astype(float)
    np.testing.assert_allclose(said.score, np.mean(np.log((shares**2).sum(1))), rtol=1e-5)
    varied = [
        row for row in study.readings
        if row["varies"] == "expansion" and row["reading"] == "xray_entropy"
    ]  # fmt: skip
    assert [row["expansion"] for row in varied] == [0.5]
    ten = []
    for row in models:
        found = read(workdir, row["model"], 15, 0.5)
        ten.append(float(detectors.read_survey(found).score))
    assert varied[0]["auroc"] == detectors.auroc(ten, labels)


def read(workdir, name, density, expansion):
    with np.load(workdir / "surveys" / f"{name}_{density}_{expansion:g}.npz") as arrays:
        return boundary.Survey(**arrays)


@pytest.mark.study
def test_an_interrupted_study_goes_on_with_the_same_numbers(finished, config, tmp_path):
    _, study = finished
    other = tmp_path / "b"
    calls, judge = [], detectors.judge

    def failing(*args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return judge(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detectors, "judge", failing)
        xray.run_study(config, other)
    assert len((other / "results.jsonl").read_text().splitlines()) == 5
    again = xray.run_study(config, other)

    def numbers(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert numbers(again.run.rows) == numbers(study.run.rows)
    assert again.readings == study.readings


@pytest.mark.study
def test_a_map_of_one_model(folder, tmp_path):
    options = xray_map.smaller(xray_map.Config(zoo=str(folder), name="badnets_001"))
    study = xray_map.run_study(options, tmp_path / "zoo")
    assert study.name == "badnets_001"
    assert (tmp_path / "zoo/figures/map.png").read_bytes().startswith(b"\x89PNG")
    shares = [float(row["mean_share"]) for row in table(tmp_path / "zoo/shares.csv")]
    np.testing.assert_allclose(sum(shares), 1, atol=1e-5)
    assert int(np.argmax(shares)) == study.target_label
    by_path = dataclasses.replace(
        options, zoo="", name="", checkpoint=str(folder / "models" / "badnets_001"), model="mlp"
    )
    again = xray_map.run_study(by_path, tmp_path / "path")
    assert (again.entropy, again.area) == (study.entropy, study.area)
    steps = tmp_path / "steps"  # as a training leaves them that was killed while it saved
    shutil.copytree(folder / "models" / "badnets_001", steps)
    (steps / "step_1.orbax-checkpoint-tmp-5").mkdir()
    of_steps = dataclasses.replace(by_path, checkpoint=str(steps))
    assert xray_map.run_study(of_steps, tmp_path / "killed").area == study.area
    wrong = dataclasses.replace(by_path, model="cnn")
    with pytest.raises(ValueError, match="does not hold a cnn for digits"):
        xray_map.run_study(wrong, tmp_path / "wrong")


@pytest.mark.study
@pytest.mark.parametrize(
    "change, message",
    [
        ({"zoo": "nowhere"}, "nowhere holds no zoo"),
        ({"detectors": ("eyes",)}, "unknown detector 'eyes'"),
        ({"num_images": 2}, "need num_images >= 3"),
        ({"densities": (1,)}, "need density >= 2"),
        ({"expansions": ()}, "at least one of expansions"),
        ({"own": "none"}, "unknown own 'none'"),
    ],
)
def test_bad_input_writes_nothing(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        xray.run_study(dataclasses.replace(config, **change), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def written_zoo(path, num_clean, num_infected, accuracy=1.0):
    """The folder of a zoo as far as it is read before any model is: no weights."""
    made = dataclasses.replace(
        zoo.smaller(xray._own_zoo(True)), num_clean=num_clean, num_infected=num_infected,
        attacks=("badnets",),
    )  # fmt: skip
    run = Run(path, made, study=zoo.STUDY, key_columns=zoo.KEY_COLUMNS)
    for group in made.groups:
        is_clean = group.kind == "clean"
        for name in group.names:
            member = backdoor.Member(
                name, group.kind, -1 if is_clean else 0, (-1,) * 10 if is_clean else (0,) * 10,
                accuracy, None if is_clean else 1.0, None, 1.5,
            )  # fmt: skip
            run.append([member._asdict()])
    return path


@pytest.mark.parametrize(
    "given, with_failed, message",
    [
        ((0, 2), True, "need clean and infected models, got 0 and 2 in PATH."),
        ((2, 0), True, "need clean and infected models, got 2 and 0 in PATH."),
        ((2, 2, 0.5), False, "got 0 and 0 in PATH that count; --with_failed takes those that do"),
    ],
)
def test_a_zoo_without_clean_or_infected_models_writes_nothing(
    tmp_path, given, with_failed, message
):
    path = written_zoo(tmp_path / "zoo", *given)
    with pytest.raises(ValueError, match=re.escape(message.replace("PATH", str(path)))):
        xray.run_study(xray.Config(zoo=str(path), with_failed=with_failed), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_going_on_tries_failures_again_and_refuses_other_models(tmp_path, monkeypatch):
    path, workdir = written_zoo(tmp_path / "zoo", 2, 2), tmp_path / "a"
    asked = []

    def mm_bd(key, name, *_, **__):
        asked.append(name)
        if len(asked) in (2, 3):
            raise RuntimeError("out of memory")
        return detectors.Detection(float(name[-1]), 0, {})

    monkeypatch.setattr(backdoor.Zoo, "classifier", lambda self, index: self.names[index])
    monkeypatch.setattr(detectors, "mm_bd", mm_bd)
    config = xray.Config(zoo=str(path), detectors=("mm_bd",))
    failed = xray.run_study(config, workdir).run.rows
    assert [bool(row["error"]) for row in failed] == [False, True, True, False]
    again = xray.run_study(config, workdir).run.rows
    assert asked[4:] == ["clean_001", "badnets_000"]
    assert not any(row["error"] for row in again)
    assert len(again) == 4
    assert [json.loads(line) for line in (workdir / "results.jsonl").open()] == again
    rows = [json.loads(line) for line in (path / "results.jsonl").open()]
    rows[1]["accuracy"] = 0.99  # as if it had been trained again
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = f"holds results of other models than are now in {path}, such as another clean_001"
    with pytest.raises(ValueError, match=re.escape(message)):
        xray.run_study(config, workdir)
    assert [json.loads(line) for line in (workdir / "results.jsonl").open()] == again


def test_a_failed_model_x_ray_is_counted_and_a_folder_takes_more_readings(tmp_path, monkeypatch):
    """Failures are under both readings; orders, limits, expansions may change, planes may not."""
    path, workdir = written_zoo(tmp_path / "zoo", 3, 3), tmp_path / "a"
    asked = []

    def model_xray(key, name, *_, expansion, **__):
        asked.append((name, expansion))
        if name == "badnets_001":
            raise RuntimeError("out of memory")
        last = int(name[-1]) / 10
        shares = np.tile([0.5 + last, 0.25, *[0.0] * 7, 0.25 - last], (3, 1))
        labels = np.tile(np.arange(3, dtype=np.int32), (3, 1))
        survey = boundary.Survey(shares, labels, labels, np.full((3, 3), np.nan), labels)
        return detectors.Detection(0.0, 0, survey._asdict())

    monkeypatch.setattr(backdoor.Zoo, "classifier", lambda self, index: self.names[index])
    monkeypatch.setattr(detectors, "model_xray", model_xray)
    config = xray.Config(zoo=str(path), num_planes=3, expansions=(5.0, 0.5), orders=(10.0,))
    study = xray.run_study(config, workdir)
    assert len(asked) == 12
    assert study.num_failed == 1
    for name in xray.READINGS:
        assert study.summaries[name].num_failed == 1
    assert {row["failed_models"] for row in table(workdir / "auroc.csv")} == {"1"}
    console = rich.console.Console(record=True, width=200)
    xray.print_study(study, config, console)
    printed = console.export_text()
    assert "xray_area failed on 1 model(s)" in printed
    assert "model_xray failed 1 time(s) at further densities or expansions" in printed

    asked.clear()
    more = dataclasses.replace(config, expansions=(5.0, 2.0), orders=(2.0,), limits=(0.7,))
    again = xray.run_study(more, workdir)
    assert sorted(asked) == sorted(
        [("badnets_001", 5.0)] + [(name, 2.0) for name in backdoor_names(again)]
    )
    assert {row["order"] for row in again.readings} == {2.0}
    assert {row["expansion"] for row in again.readings} == {5.0, 2.0}
    assert json.loads((workdir / "config.json").read_text())["orders"] == [2.0]
    with pytest.raises(ValueError, match="num_planes was 3 and is now 2"):
        xray.run_study(dataclasses.replace(more, num_planes=2), workdir)


def backdoor_names(study):
    return dict.fromkeys(row["model"] for row in study.run.rows)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"expansions": (1 / 3, 0.333333)}, "need expansions that differ"),
        ({"densities": (20, 20)}, "need densities that differ"),
        ({"num_shadows": 1}, "need num_shadows >= 2"),
    ],
)
def test_settings_that_cannot_be_told_apart_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        xray.Config(**change).check()


def test_a_map_needs_a_zoo_for_a_name():
    with pytest.raises(ValueError, match="need a zoo for a model's name, got name='badnets_003'"):
        xray_map.Config(name="badnets_003").check()
    with pytest.raises(ValueError, match="need at least one of expansions"):
        xray_map.Config(expansions=()).check()


def test_a_map_of_points_without_a_class(tmp_path):
    plane = boundary.plane(*np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), density=4)
    labels = np.full((4, 4), -1, np.int32)
    labels[0] = 1
    said = types.SimpleNamespace(class_names=("a", "b", "c"))
    assert xray_map._scores(labels, np.arange(3), said) == "75.0% without a class"
    assert xray_map._scores(np.abs(labels), np.arange(3), said) == "RE 0.00, ATS 0.00"
    path = tmp_path / "map.png"
    xray_figures.label_maps([labels], [plane], [[0, 1, 2]], said.class_names, ["t"], path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.study
def test_in_a_folder_of_another_configuration_nothing_is_trained(config, tmp_path):
    (tmp_path / "config.json").write_text('{"study": "power_law"}')
    with pytest.raises(ValueError, match="belongs to another configuration"):
        xray.run_study(dataclasses.replace(config, zoo=""), tmp_path)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("xray", "--detectors=eyes", "unknown detector 'eyes'"),
        ("xray_map", "--zoo=nowhere", "nowhere holds no zoo"),
        ("xray_map", "--coordinator=localhost:1", "need a launcher that can split its work"),
    ],
)
def test_the_launchers_refuse(launcher, name, wrong, message, tmp_path):
    """That they run is a stage of .ci/run."""
    refused = launcher(name)("--smoke", f"--workdir={tmp_path}/a", wrong)
    assert refused.returncode == 2
    assert message in refused.stderr
