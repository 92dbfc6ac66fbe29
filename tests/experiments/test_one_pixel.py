"""The one-pixel study: rows, resume, figures, bad input, and the launcher as a user starts it."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest

from advjax.experiments import one_pixel

CONFIG = one_pixel.Config(
    model="mlp", num_examples=20, num_epochs=1, num_pixels=(1, 12), population=12, generations=3,
    num_sources=1, attack_batch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, one_pixel.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    for name in ("success.png", "examples.png", "targeted.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert rows == study.run.rows
    one, twelve = (row for row in rows if row["source"] is None)
    assert one["num_queries"] == 12 * (3 + 1)
    assert one["num_images"] == twelve["num_images"] == round(study.clean_accuracy * 20)
    assert one["num_fooled"] < twelve["num_fooled"] <= twelve["num_images"]
    assert twelve["success_rate"] == twelve["num_fooled"] / twelve["num_images"]
    assert all(row["num_not_answered"] == 0 for row in rows)
    shown = np.load(workdir / "examples" / "12_pixels.npz")
    changed = np.any(shown["x"] != shown["x_adv"], axis=-1).sum((1, 2))
    assert 1 <= changed.max() <= 12
    assert np.all(shown["answers"] != shown["y"])


@pytest.mark.study
def test_every_class_toward_every_other(finished):
    _, study = finished
    pairs = [(r["source"], r["target"]) for r in study.run.rows if r["num_pixels"] == 1]
    pairs = [pair for pair in pairs if pair != (None, None)]
    assert len(set(pairs)) == len(pairs) == 9 * len({source for source, _ in pairs})
    assert all(source != target for source, target in pairs)
    grids = one_pixel.targeted_grids(study.run.rows, 10)
    assert np.all(np.isnan(np.diag(grids[12])))
    assert np.nansum(grids[12]) == sum(
        r["success_rate"]
        for r in study.run.rows
        if r["num_pixels"] == 12 and r["source"] is not None
    )


@pytest.mark.study
def test_interrupted_it_ends_with_the_same_bytes_and_complete_it_attacks_no_more(
    finished, tmp_path, monkeypatch
):
    workdir, _ = finished
    complete = results(workdir)
    again = tmp_path / "b"
    subprocess.run(["cp", "-r", str(workdir), str(again)], check=True)
    (again / "results.jsonl").write_bytes(b"".join(complete.splitlines(True)[:-9]))
    one_pixel.run_study(CONFIG, again)
    assert results(again) == complete

    def fail(*_, **__):
        raise AssertionError("attacked again")

    monkeypatch.setattr(one_pixel, "attacked", fail)
    one_pixel.run_study(CONFIG, again)
    assert results(again) == complete


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(dataset="imagenet"), "unknown data set 'imagenet'; known: digits, mnist"),
        (dict(num_pixels=()), "at least one number of pixels"),
        (dict(num_pixels=(1, 0)), "num_pixels >= 1, got num_pixels=0"),
        (dict(num_pixels=(1.5,)), "num_pixels >= 1, got num_pixels=1.5"),
        (dict(num_pixels=(65,)), "num_pixels <= 64 for digits, got num_pixels=65"),
        (dict(population=3), "population >= 4, got population=3"),
        (dict(generations=0), "generations >= 1"),
        (dict(num_sources=-1), "num_sources >= 0"),
        (dict(strategy="cma"), "unknown strategy 'cma'; known: rand1, best1"),
        (dict(epsilon=-0.1), "finite epsilon >= 0"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        one_pixel.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def launch(launcher):
    return launcher("one_pixel")


@pytest.mark.study
def test_the_launcher_prints_a_table(launch, tmp_path):
    done = launch(
        "--smoke", "--model=mlp", "--num_examples=8", "--num_epochs=1", "--num_pixels=1",
        "--population=8", f"--workdir={tmp_path}", "--compilation_cache=",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("Success of the one-pixel attack", "32 queries", "68.0%", "Files:"):
        assert text in done.stdout.replace("\n", " "), text
    assert (tmp_path / "figures" / "success.png").exists()


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--num_pixels=x", "--num_pixels: need FIRST:LAST:COUNT"),
        ("--num_pixels=1.5", "--num_pixels: need whole numbers, got '1.5'"),
        ("--num_pixels=100", "num_pixels <= 64 for digits"),
        ("--strategy=cma", "unknown strategy 'cma'"),
    ],
)
def test_bad_flags_are_one_sentence_and_exit_code_2(launch, tmp_path, argument, sentence):
    done = launch(argument, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and "Traceback" not in done.stderr
