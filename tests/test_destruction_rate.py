"""The destruction rate on answers made by hand."""

import jax
import numpy as np
import pytest

from advjax import evaluation

CLEAN = np.array([1, 1, 1, 1, 0, 0, 1], bool)
ADVERSARIAL = np.array([0, 0, 0, 1, 0, 1, 0], bool)  # adversarial: the images 0, 1, 2 and 6
PHOTO = np.array([1, 0, 0, 1, 1, 1, 0], bool)


def test_it_counts_only_what_was_right_and_became_wrong():
    assert float(evaluation.destruction_rate(CLEAN, ADVERSARIAL, PHOTO)) == 1 / 4
    assert float(jax.jit(evaluation.destruction_rate)(CLEAN, ADVERSARIAL, PHOTO)) == 1 / 4


def test_it_is_the_published_formula():
    rng = np.random.default_rng(0)
    clean, adversarial, photo = rng.random((3, 100)) < 0.5
    above = sum(
        int(c) * (1 - int(a)) * int(t)
        for c, a, t in zip(clean, adversarial, photo, strict=True)
    )  # fmt: skip
    below = sum(int(c) * (1 - int(a)) for c, a in zip(clean, adversarial, strict=True))
    rate = float(evaluation.destruction_rate(clean, adversarial, photo))
    assert rate == pytest.approx(above / below, rel=1e-6)  # one division in float32


def test_the_ends():
    nothing, everything = np.zeros(7, bool), np.ones(7, bool)
    assert float(evaluation.destruction_rate(CLEAN, ADVERSARIAL, nothing)) == 0
    assert float(evaluation.destruction_rate(CLEAN, ADVERSARIAL, everything)) == 1
    assert np.isnan(evaluation.destruction_rate(CLEAN, everything, PHOTO))
    assert np.isnan(evaluation.destruction_rate(nothing, ADVERSARIAL, PHOTO))


def test_several_transformations():
    photos = np.stack([[PHOTO, ~PHOTO, CLEAN]] * 2)
    rates = evaluation.destruction_rate(CLEAN, ADVERSARIAL, photos)
    np.testing.assert_array_equal(rates, [[0.25, 0.75, 1.0]] * 2)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ((np.int32(CLEAN), ADVERSARIAL, PHOTO), "need arrays of bool, got int32, bool, bool"),
        ((CLEAN, ADVERSARIAL[:3], PHOTO), "got shapes \\(7,\\), \\(3,\\) and \\(7,\\)"),
        ((CLEAN, ADVERSARIAL, PHOTO[:, None]), "and \\(7, 1\\)"),
        ((CLEAN[0], ADVERSARIAL, PHOTO), "got shapes \\(\\), "),
    ],
)
def test_bad_answers_are_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluation.destruction_rate(*given)
    assert "\n" not in str(caught.value)
