"""The main job: the run folder, resume, bad input, and the launcher as a user starts it."""

import csv
import dataclasses
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import data, parallel
from advjax.experiments import cli, evasion, runs

CONFIG = evasion.Config(
    model="mlp", attacks=("fgsm", "pgd", "fgm"), epsilons=(0.0, 0.1, 0.3), epsilons_l2=(0.0, 1.0),
    num_examples=24, num_epochs=2, num_steps=2, seeds=(0, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, evasion.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    for name in ("curve.png", "examples.png", "fooling.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert len(rows) == 2 * (3 + 3 + 2) and rows == study.run.rows
    with (workdir / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["robust_accuracy"]) for r in table] == [r["robust_accuracy"] for r in rows]
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert {"versions", "devices", "commit", "seed", "seconds"} <= set(manifest)
    assert manifest["versions"]["jax"] == jax.__version__
    for row in rows:
        if row["epsilon"] == 0:
            assert row["robust_accuracy"] == study.clean_accuracy[row["seed"]]
    assert not list(workdir.rglob(".*"))  # no temporary file is left


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1, 40, 300, 1000])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(finished, tmp_path, cut):
    """Results cut off in the middle of a line, as a kill during a write leaves them."""
    workdir, _ = finished
    complete = results(workdir)
    again = tmp_path / "b"
    for path in ("config.json", "checkpoints"):
        target = again / path
        target.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(workdir / path), str(target)], check=True)
    (again / "results.jsonl").write_bytes(complete[:cut] if cut else complete[:-5])
    evasion.run_study(CONFIG, again)
    assert results(again) == complete


def test_a_complete_run_computes_nothing_again(finished, monkeypatch):
    workdir, _ = finished
    before = results(workdir)

    def fail(*_, **__):
        raise AssertionError("attacked again")

    monkeypatch.setattr(evasion.evaluation, "survival", fail)
    evasion.run_study(CONFIG, workdir)
    assert results(workdir) == before


def test_rows_do_not_depend_on_what_else_is_computed_or_on_devices(finished, tmp_path):
    _, study = finished
    config = dataclasses.replace(CONFIG, attacks=("pgd",), seeds=(1,), attack_batch_size=16)
    alone = evasion.run_study(config, tmp_path / "c", mesh=parallel.make_mesh())
    expected = [r for r in study.run.rows if r["attack"] == "pgd" and r["seed"] == 1]
    assert alone.run.rows == expected


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(dataset="imagenet"), "unknown data set 'imagenet'; known: digits, mnist"),
        (dict(model="resnet"), "unknown model 'resnet'; known: mlp, cnn"),
        (dict(attacks=("fgsm", "gsm")), "unknown attack 'gsm'; known: fgsm"),
        (dict(attacks=()), "at least one attack"),
        (dict(method="fast"), "unknown method 'fast'; known: auto, map"),
        (dict(epsilons=(0.1, -0.1)), "finite epsilons >= 0"),
        (dict(num_examples=0), "num_examples >= 1"),
        (dict(num_steps=0), "num_steps >= 1"),
        (dict(weights="nowhere.npz"), "nowhere.npz"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        evasion.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    if "weights" not in change:
        assert not (tmp_path / "d").exists()


def test_a_folder_of_another_configuration_is_refused_and_kept(finished):
    workdir, _ = finished
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="belongs to another configuration: num_epochs was 2"):
        evasion.run_study(dataclasses.replace(CONFIG, num_epochs=3), workdir)
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("config.json", "{", "not a JSON file"),
        ("config.json", "[]", "not a configuration"),
        ("results.jsonl", "{}\n", "rows of another study"),
        ("results.jsonl", "what\n", "not JSON"),
    ],
)
def test_damaged_or_foreign_files_are_told(finished, tmp_path, name, content, sentence):
    workdir, _ = finished
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        evasion.run_study(CONFIG, tmp_path)
    assert (tmp_path / name).read_text() == content


def test_results_without_a_configuration_are_not_overwritten(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"without their config\.json"):
        evasion.run_study(CONFIG, tmp_path)


def test_a_network_that_returns_nan_is_told(tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=1e30, seeds=(0,))
    with pytest.raises(ValueError, match="logits that are not finite for 24 of 24"):
        evasion.run_study(config, tmp_path)


def test_error_and_confidence():
    logits_fn = jax.tree_util.Partial(lambda x: x.reshape(-1, 2) * 4)
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5], [0.0, 0.0]]).reshape(4, 1, 2, 1)
    result = evasion.error_and_confidence(logits_fn, x, jnp.array([0, 0, 0, 0]))
    assert result.error == 0.5
    softmax = np.mean([1 / (1 + np.exp(-4)), 1 / (1 + np.exp(-2))])
    assert result.mean_confidence == pytest.approx(softmax, rel=1e-6)
    none = evasion.error_and_confidence(logits_fn, x[:1], jnp.array([0]))
    assert none.error == 0 and np.isnan(none.mean_confidence)


def test_fooling_image_moves_noise_toward_the_target(finished):
    _, study = finished
    fooling = study.fooling
    shape = data.info("digits").image_shape
    assert fooling.image.shape == fooling.noise.shape == shape
    assert float(jnp.max(jnp.abs(fooling.image - fooling.noise))) <= 0.25


def test_the_fooling_image_is_what_it_is_said_to_be():
    weights = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)

    def logits_fn(x):
        return x.reshape(len(x), -1) @ weights

    fooling = evasion.fooling_image(jax.random.key(0), logits_fn, (4, 4, 1), 2, 0.1)
    (logits,) = np.asarray(logits_fn(fooling.image[None]), np.float64)
    assert fooling.answer == logits.argmax()
    share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert fooling.confidence == pytest.approx(share.max(), rel=1e-5)
    noise = jax.random.uniform(jax.random.key(0), (64, 4, 4, 1))
    assert np.any(np.all(noise == fooling.noise, axis=(1, 2, 3)))
    assert 0 < fooling.share_called < 1


def test_a_radius_that_is_given_twice_is_one_row():
    assert evasion.Config(epsilons=(0.1, 0.0, 0.1)).epsilons_of("linf") == (0.1, 0.0)


def test_ranges_and_lists():
    assert cli.parse_range("e", "0:1:3") == (0.0, 0.5, 1.0)
    assert cli.parse_range("e", "8/255, 0.5") == (8 / 255, 0.5)
    assert cli.parse_whole("w", "10:30:3") == (10, 20, 30)
    assert cli.parse_seeds("3,1,3") == (3, 1)
    assert cli.parse_names("a, b,a") == ("a", "b")
    for text in ("", "a", "0:1", "0:1:1", "1/0", "0:1:x"):
        with pytest.raises(ValueError, match="--e: need FIRST:LAST:COUNT"):
            cli.parse_range("e", text)
    for text in ("2.5", "nan", "inf"):
        with pytest.raises(ValueError, match="--w: need whole numbers"):
            cli.parse_whole("w", text)
    for text in ("", "x", "-1", "0.5"):
        with pytest.raises(ValueError, match="--seeds: need whole numbers"):
            cli.parse_seeds(text)


def test_csv_has_all_columns():
    assert runs.to_csv([{"a": 1}, {"a": 2, "b": "x,y"}]) == 'a,b\n1,\n2,"x,y"\n'


@pytest.fixture(scope="module")
def launch(launcher):
    return launcher("evasion")


def test_help_comes_without_loading_jax(launch):
    done = launch("--help")
    assert done.returncode == 0 and "--epsilons" in done.stdout and "--coordinator" in done.stdout


SMALL = (
    "--smoke", "--model=mlp", "--attacks=fgsm,pgd", "--num_examples=8", "--num_epochs=1",
    "--compilation_cache=",
)  # fmt: skip


@pytest.fixture(scope="module")
def launched(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("launched")
    return workdir, launch(*SMALL, f"--workdir={workdir}")


@pytest.mark.study
def test_the_launcher_prints_a_table(launched):
    workdir, done = launched
    assert done.returncode == 0, done.stderr
    for text in ("Robust accuracy in linf", "fgsm", "pgd", "mean confidence", "89.4%", "Files:"):
        assert text in done.stdout.replace("\n", " "), text
    assert (workdir / "figures" / "curve.png").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--attacks=nonsense"], "unknown attack 'nonsense'; known: fgsm"),
        (["--epsilons=1:2"], "--epsilons: need FIRST:LAST:COUNT"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--num_epochs=many"], "num_epochs"),
        (["stray"], "unexpected argument 'stray'"),
        (["--coordinator=localhost:1"], "need 0 <= process_id < num_processes"),
        (["--dataset=mnist", "--data_dir=/nowhere"], "mnist"),
    ],
)
def test_bad_flags_are_one_sentence_and_exit_code_2(launch, tmp_path, arguments, sentence):
    done = launch(*SMALL, f"--workdir={tmp_path / 'w'}", *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_two_processes_equal_one(launched, root, tmp_path):
    """Two processes on loopback split each batch; the rows are those of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                sys.executable, str(root / "launch" / "evasion.py"), *SMALL,
                f"--workdir={tmp_path / 'two'}",
                f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert results(tmp_path / "two") == results(launched[0])
    assert "Robust accuracy" in outputs[0][0] and "Robust accuracy" not in outputs[1][0]
