"""The attacks once more in plain NumPy, float64, with the gradient of the network by hand."""

import functools

import jax
import numpy as np
import pytest

from advjax import attacks, balls
from tests import helpers

PARAMS = {name: value.astype(np.float64) for name, value in helpers.mlp_params(0).items()}
X = helpers.images(5, 6)
EPSILON = np.float32([0, 0.02, 0.05, 0.1, 0.2, 0.4])


def forward(x):
    """Images [b, d] to logits and the cross-entropy's gradient in the image, given labels."""
    hidden = x @ PARAMS["w1"] + PARAMS["b1"]
    return hidden, np.maximum(hidden, 0) @ PARAMS["w2"] + PARAMS["b2"]


def loss_and_gradient(x, y):
    hidden, logits = forward(x)
    shifted = logits - logits.max(1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(p[rows, y])
    p[rows, y] -= 1
    return logits.argmax(1), loss, ((p @ PARAMS["w2"].T) * (hidden > 0)) @ PARAMS["w1"].T


def ascend(x, y, epsilon, step_size, num_steps, norm, sign):
    """Steepest ascent of `sign` times the loss; each image's best, success before loss."""
    x = x.reshape(len(x), -1).astype(np.float64)
    epsilon, step_size = epsilon[:, None].astype(np.float64), step_size[:, None]
    z, best, best_rank = x, x.copy(), [(-1, -np.inf)] * len(x)
    for step in range(num_steps + 1):
        answer, loss, gradient = loss_and_gradient(z, y)
        gradient = gradient * sign
        for i in range(len(x)):
            success = answer[i] != y[i] if sign > 0 else answer[i] == y[i]
            if (success, sign * loss[i]) > best_rank[i]:
                best_rank[i], best[i] = (success, sign * loss[i]), z[i]
        if step == num_steps:
            return best
        if norm == "linf":
            # No sign that rounding could turn; exactly zero where no hidden unit is on.
            assert np.abs(gradient)[gradient != 0].min() > 1e-7
            delta = np.clip(z + step_size * np.sign(gradient) - x, -epsilon, epsilon)
        else:
            length = np.sqrt((gradient**2).sum(1, keepdims=True))
            delta = z + step_size * gradient / length - x
            length = np.sqrt((delta**2).sum(1, keepdims=True))
            delta = delta * np.minimum(1, epsilon / np.maximum(length, 1e-30))
        z = np.clip(x + delta, 0, 1)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(
    "attack, norm, relative, num_steps",
    [
        (attacks.fgsm, "linf", 1.0, 1),
        (attacks.fgm, "l2", 1.0, 1),
        (functools.partial(attacks.bim, num_steps=6), "linf", 1.25 / 6, 6),
        (
            functools.partial(attacks.pgd, num_steps=6, ball=balls.l2, random_start=False),
            "l2",
            2.5 / 6,
            6,
        ),
    ],
    ids=["fgsm", "fgm", "bim", "pgd-l2"],
)
def test_equals_numpy(attack, norm, relative, num_steps, targeted):
    y = forward(X.reshape(len(X), -1).astype(np.float64))[1].argmax(1).astype(np.int32)
    y = (y + 1) % helpers.NUM_CLASSES if targeted else y
    run = jax.jit(functools.partial(attack, targeted=targeted))
    x_adv = run(jax.random.key(0), helpers.mlp_network(0), X, y, EPSILON)
    helpers.assert_in_ball_and_box(x_adv, X, norm, EPSILON)
    expected = ascend(X, y, EPSILON, EPSILON * relative, num_steps, norm, -1 if targeted else 1)
    assert np.abs(expected.reshape(X.shape) - X).max() > 0.1
    # Float32 against float64. linf: a few sums near one, 6e-8 each. l2: where the network is sure,
    # the gradient is a difference 1 - p, right to 6e-8 / (1 - p), which is up to 1e-4 here, and a
    # step turns by that; steps are at most 0.2 long.
    atol = 1e-6 if norm == "linf" else 5e-5
    np.testing.assert_allclose(x_adv, expected.reshape(X.shape), rtol=0, atol=atol)
