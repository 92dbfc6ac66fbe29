"""The study of defensive distillation: rows, resume, gradients, bad input, the launcher."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from advjax.core import losses
from advjax.experiments import distillation
from tests import helpers

CONFIG = dataclasses.replace(
    distillation.smaller(distillation.Config()),
    attacks=("fgsm", "fgsm_scaled", "carlini_wagner_l2"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a"
    return workdir, distillation.run_study(CONFIG, workdir)


def results(workdir):
    return (workdir / "results.jsonl").read_bytes()


@pytest.mark.study
def test_the_run_folder_holds_everything(finished):
    workdir, study = finished
    rows = [json.loads(line) for line in results(workdir).splitlines()]
    assert rows == study.run.rows
    assert [(row["network"], row["attack"]) for row in rows] == [
        (network, attack) for network in distillation.NETWORKS for attack in CONFIG.attacks
    ]
    for name in ("success.png", "gradients.png"):
        assert (workdir / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.study
def test_only_the_gradient_of_the_cross_entropy_is_hidden(finished):
    _, study = finished
    rate = {(row["network"], row["attack"]): row["success_rate"] for row in study.run.rows}
    assert rate["standard", "fgsm"] > 0.9
    assert rate["distilled", "fgsm"] < 0.3
    assert rate["distilled", "fgsm_scaled"] > 0.9
    assert rate["distilled", "carlini_wagner_l2"] > 0.9
    hidden, margin = study.gradients["cross_entropy"], study.gradients["margin"]
    assert np.mean(hidden["distilled"] == 0) > 0.5 > np.mean(hidden["standard"] == 0)
    assert np.all(margin["distilled"] > 0)


@pytest.mark.study
def test_an_interrupted_study_goes_on_with_the_same_numbers(finished):
    workdir, study = finished
    complete = results(workdir)
    lines = complete.splitlines(keepends=True)
    (workdir / "results.jsonl").write_bytes(b"".join(lines[:4]))
    (workdir / "gradients.npz").unlink()
    again = distillation.run_study(CONFIG, workdir)
    assert results(workdir) == complete
    for loss in distillation.GRADIENTS:
        for network in distillation.NETWORKS:
            np.testing.assert_array_equal(
                again.gradients[loss][network], study.gradients[loss][network]
            )


def test_norms_of_gradients_of_a_linear_network():
    """Of tiny gradients too: their squares would be zero in float32."""
    weights = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    x, y = helpers.images(0, 4), np.zeros(4, np.int32)
    for scale in (1.0, 1e-30):
        logits_fn = lambda x, scale=scale: jnp.float32(scale) * helpers.linear((weights, 0), x)
        best = 1 + np.argmax(x.reshape(4, -1) @ weights[:, 1:], axis=-1)
        expected = scale * np.linalg.norm(weights[:, best] - weights[:, :1], axis=0)
        norms = distillation.gradient_norms(losses.margin, logits_fn, x, y)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)  # float32


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(temperature=0.0), "distillation: need a finite temperature > 0, got temperature=0.0"),
        (dict(temperature=-1.0), "need a finite temperature > 0, got temperature=-1.0"),
        (dict(attacks=("cw",)), "unknown attack 'cw'; known: fgsm, pgd"),
        (dict(attacks=()), "need at least one attack, got none"),
        (dict(epsilon=-1.0), "need a finite epsilon >= 0"),
        (dict(num_cw_examples=0), "need num_cw_examples >= 1"),
        (dict(weights="a.npz"), "it trains its networks, so weights of one are of no use"),
    ],
)
def test_a_bad_configuration_is_one_sentence(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        distillation.run_study(dataclasses.replace(CONFIG, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def launch(launcher):
    return launcher("distillation")


@pytest.mark.study
def test_a_bad_flag_is_one_sentence_and_exit_code_2(launch, tmp_path):
    done = launch("--temperature=-3", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: distillation: need a finite temperature > 0, got temperature=-3.0."
