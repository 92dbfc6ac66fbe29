"""The studies of universality: rows, resume, bad input, the launchers."""

import dataclasses
import json

import numpy as np
import pytest

from advjax import universality
from advjax.experiments import architecture_search, entropy, logit_differences, power_law
from tests import helpers

POWER_LAW = power_law.Config(
    model="mlp", num_examples=200, num_epochs=3, num_networks=3, max_width=40,
    population_attacks=("fgsm",), population_train=320, population_examples=200,
    population_epochs=5, ceiling=0.6,
)  # fmt: skip
GAPS = logit_differences.Config(
    models=("mlp",), num_examples=200, num_responses=100, num_epochs=3, batch_size=32, share=0.2,
    small_epsilons=(0.1, 0.2),
)  # fmt: skip
ENTROPY = entropy.Config(
    models=("mlp",), bases=("clean",), attacks=("least_likely",), num_examples=200, num_epochs=10,
    batch_size=32, num_epsilons=3, optimizer="sgd", learning_rate=0.05, seeds=2,
)  # fmt: skip
SEARCH = architecture_search.Config(
    experiments=("clean",), controllers=("evolution",), num_rounds=2, num_children=3,
    num_train=256, num_validation=100, num_epochs=1,
)  # fmt: skip
STUDIES = {
    "power_law": (power_law, POWER_LAW, ("exponents.png", "curves.png")),
    "logit_gaps": (
        logit_differences, GAPS,
        ("densities.png", "responses.png", "mean_field.png", "linearity.png"),
    ),
    "entropy": (entropy, ENTROPY, ("least_likely.png",)),
    "architecture_search": (architecture_search, SEARCH, ("children.png", "rounds.png")),
}  # fmt: skip


@pytest.mark.study
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_everything_and_goes_on_where_it_stopped(name, tmp_path):
    module, config, figures = STUDIES[name]
    study = module.run_study(config, tmp_path)
    complete = (tmp_path / "results.jsonl").read_bytes()
    rows = [json.loads(line) for line in complete.splitlines()]
    assert rows == study.run.rows
    for figure in figures:
        assert (tmp_path / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    check_rows(name, rows)
    # The last group, network or round is done again.
    keep = {"power_law": 3, "logit_gaps": 1, "entropy": 0, "architecture_search": 3}[name]
    (tmp_path / "results.jsonl").write_bytes(b"".join(complete.splitlines(True)[:keep]))
    module.run_study(config, tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == complete


def check_rows(name, rows):
    if name == "power_law":
        assert sorted(row["network"] for row in rows) == [-1, -1, -1, -1, 0, 1, 2]
        for row in rows:
            assert np.all(np.diff(row["errors"]) >= 0)
            assert row["exponent"] is None or row["exponent_low"] <= row["exponent_high"]
        assert sum(row["exponent"] is not None for row in rows) >= 4
    elif name == "logit_gaps":
        iid, network = rows
        np.testing.assert_allclose(iid["exponents"][0], 0, atol=0.15)  # the smallest fifth bends
        assert network["explained_variances"][1] > 0.9
        assert network["num_small"][0] < network["num_small"][1]
    elif name == "entropy":
        assert [row["seed"] for row in rows] == [0, 0, 1, 1]
        for plain, regularised in zip(rows[::2], rows[1::2], strict=True):
            assert regularised["median_gap"] > plain["median_gap"]
            assert min(plain["accuracy"], regularised["accuracy"]) > 0.9
    else:
        assert [row["child"] for row in rows] == list(range(6))
        assert all(row["adversarial_accuracy"] <= row["clean_accuracy"] for row in rows)


@pytest.mark.parametrize(
    "name, change, sentence",
    [
        ("power_law", dict(kind="tree"), "unknown kind 'tree'"),
        ("power_law", dict(ceiling=0.0), "need 0 < ceiling <= 1, got ceiling=0.0"),
        ("power_law", dict(num_networks=0, near_perfect=False), "at least one network, got none"),
        ("power_law", dict(max_width=10), "need 30 <= max_width <= 2000 for fully_connected"),
        ("power_law", dict(population_attacks=()), "at least one of population_attacks, got none"),
        ("power_law", dict(population_attacks=("bim",)), "unknown attack 'bim'; known: fgm, fgsm"),
        ("logit_gaps", dict(models=()), "at least one data set, one model"),
        ("logit_gaps", dict(share=2.0), "need 0 < share <= 1, got share=2.0"),
        ("entropy", dict(bases=("trades",)), "unknown base 'trades'; known: clean, step_ll, pgd"),
        ("entropy", dict(num_epsilons=1), "need num_epsilons >= 2"),
        ("entropy", dict(optimizer="lion"), "unknown optimizer 'lion'; known: adam, sgd"),
        ("architecture_search", dict(controllers=("grid",)), "unknown controller 'grid'"),
        ("architecture_search", dict(num_train=1400), r"num_train \+ num_validation <= 1438"),
    ],
)
def test_a_bad_configuration_is_one_sentence(name, change, sentence, tmp_path):
    module, config, _ = STUDIES[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        module.run_study(dataclasses.replace(config, **change), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d" / "results.jsonl").exists()


@pytest.mark.parametrize("name", list(STUDIES))
def test_the_launchers_refuse(launcher, tmp_path, name):
    """That they run is a stage of .ci/run."""
    bad = launcher(name)("--num_epochs=0", f"--workdir={tmp_path / 'bad'}")
    assert bad.returncode == 2
    assert bad.stderr.strip().splitlines()[-1].startswith("error: ")


def test_the_last_responses_are_not_lost():
    network, x = helpers.mlp_network(0), helpers.images(0, 7)
    response = logit_differences._responses(network, x, 3)
    expected = universality.linear_response(network, x)
    for leaf, other in zip(response, expected, strict=True):
        assert leaf.shape == other.shape
        # Sums of other batches.
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)
