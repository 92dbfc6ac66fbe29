"""The fooling rate: changed answers, whatever the labels, and no answer is no change."""

import jax.numpy as jnp
import numpy as np
import pytest

from advjax import evaluation
from tests import helpers

X = helpers.images(0, 21)
NETWORK = helpers.mlp_network(0)


def test_counts_changed_answers():
    x_adv = helpers.images(1, 21)
    changed = np.asarray(NETWORK(X)).argmax(-1) != np.asarray(NETWORK(x_adv)).argmax(-1)
    expected = np.float32(changed.sum()) / np.float32(21)
    assert 0 < expected < 1
    for batch_size in (None, 4):
        rate = evaluation.fooling_rate(NETWORK, X, x_adv, batch_size=batch_size)
        assert rate == expected and rate.shape == ()
    assert evaluation.fooling_rate(NETWORK, X, X) == 0


def test_one_perturbation_is_added_and_clipped():
    delta = np.full(helpers.SHAPE, 0.7, np.float32)
    assert evaluation.fooling_rate(NETWORK, X, delta) == evaluation.fooling_rate(
        NETWORK, X, np.clip(X + delta, 0, 1)
    )
    assert evaluation.fooling_rate(NETWORK, X, 0 * delta) == 0


def test_no_answer_is_no_change():
    nan = lambda x: NETWORK(x) * jnp.nan
    only_dark = lambda x: jnp.where(jnp.max(x) < 1, NETWORK(x), jnp.nan)
    assert evaluation.fooling_rate(nan, X, 1 - X) == 0
    assert evaluation.fooling_rate(only_dark, X * 0.5, X * 0 + 1) == 0
    assert evaluation.fooling_rate(only_dark, X * 0 + 1, X * 0.5) == 0


@pytest.mark.parametrize(
    "x, x_adv, sentence",
    [
        (X, X[:3], r"fooling_rate: need images of shape \(21, 4, 4, 1\) or one perturbation"),
        (X, X * 255, r"fooling_rate: need images in \[0, 1\]"),
        (np.uint8(X), X, "fooling_rate: need float images"),
        (X[:0], X[:0], "fooling_rate: need at least one image"),
        (X, np.full(helpers.SHAPE, np.nan), r"need images in \[0, 1\], got values in \[nan"),
    ],
)
def test_bad_input_is_one_sentence(x, x_adv, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluation.fooling_rate(NETWORK, x, x_adv)
