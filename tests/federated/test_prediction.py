"""Whether the predicted model is nearer to the next one than the present model is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import aggregation, data, federated, models, poisoning
from advjax.experiments import recordings
from advjax.poisoning import prediction

KEY = jax.random.key(0)
NUM_ROUNDS = 16


def ratio(path, alpha):
    """The mean error of the prediction over that of the present model."""
    path = jnp.asarray(path, jnp.float32)
    historical = jnp.linalg.norm(jnp.diff(path, axis=0), axis=1)
    return float(jnp.mean(prediction.errors(path, alpha=alpha)) / jnp.mean(historical))


@pytest.fixture(scope="module", params=["digits", "mnist"])
def paths(request):
    """The global models of a run without attack and of one under I-FMPA, f32[rounds, d]."""
    try:
        train, test = (data.load(request.param, s, download=False) for s in ("train", "test"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    train = train.take(min(2000, len(train)))
    partition = federated.partition_iid(KEY, train.labels, 10)
    net = models.make("mlp", 10, hidden=(16,))
    task = federated.make_task(net, train, test.take(50), partition)
    search = poisoning.Search(num_steps=10, num_validation=50)
    made = {
        "none": poisoning.stateless(poisoning.no_attack),
        "i_fmpa": poisoning.i_fmpa(search=search),
    }
    recorded = {
        name: recordings.record(attack, lambda context, honest, sent: context.params)
        for name, attack in made.items()
    }
    # One program for both.
    chosen = poisoning.choose({name: attack for name, (attack, _) in recorded.items()})
    for attack in chosen.values():
        history = federated.simulate(
            KEY, task, rule=aggregation.mean, poisoning=attack, num_rounds=NUM_ROUNDS,
            num_byzantine=2, eval_every=NUM_ROUNDS, progress=False,
            local=federated.FedAvg(learning_rate=0.05, num_epochs=1, batch_size=20),
        )  # fmt: skip
        assert history.accuracy[-1] > 0.3  # it learns
    jax.effects_barrier()
    return {
        name: np.stack([kept[number] for number in range(NUM_ROUNDS)])
        for name, (_, kept) in recorded.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["none", "i_fmpa"])
def test_the_prediction_beats_the_present_model(paths, attack):
    # With whole epochs of local work a round goes on as the last ones did.
    assert ratio(paths[attack], 0.5) < 1
    assert ratio(paths[attack], 0.7) < 1
    # A long memory is still in the first rounds, whose steps are the largest.
    assert ratio(paths[attack], 0.1) > ratio(paths[attack], 0.5)


@pytest.mark.parametrize("alpha", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("cosine", [0.05, 0.15, 0.3, 0.6])
def test_noise_decides(alpha, cosine):
    """A constant step with noise, as late in training, where the cosine of two steps is the share
    of the signal in their squares.

    The prediction is `g + sum_j h_j step_{t - j}` with `h_j = (1 - alpha)^j ((j + 2) alpha - 1)`,
    which sum to 1, so it cancels the signal and adds their squares to the noise.
    """
    rng = np.random.default_rng(0)
    num_rounds, d = 120, 2000
    signal = np.full(d, np.sqrt(cosine / d))
    steps = signal + np.sqrt((1 - cosine) / d) * rng.normal(size=(num_rounds, d))
    path = jnp.asarray(np.cumsum(steps, axis=0), jnp.float32)
    late = prediction.errors(path, alpha=alpha)[40:]  # the start is forgotten
    j = np.arange(200)
    h = (1 - alpha) ** j * ((j + 2) * alpha - 1)
    np.testing.assert_allclose(h.sum(), 1)
    expected = np.sqrt((1 - cosine) * (1 + np.sum(h**2)))
    # The lengths of 80 vectors of 2000 random entries: 1 / sqrt(4000) each, their mean far less.
    np.testing.assert_allclose(np.mean(late), expected, rtol=0.01)
    historical = np.mean(np.linalg.norm(steps[41:], axis=1))
    is_better = cosine > np.sum(h**2) / (1 + np.sum(h**2))
    assert (np.mean(late) < historical) == is_better


def test_errors_in_numpy():
    path = np.random.default_rng(0).normal(size=(6, 3))
    see = functools.partial(prediction.see, alpha=0.3, warmup=2)
    history, expected = prediction.start(path[0]), []
    for present, following in itertools.pairwise(path):
        history = see(history, jnp.asarray(present, jnp.float32))
        predicted = np.asarray(prediction.predict(history, alpha=0.3))
        expected.append(np.linalg.norm(predicted - following))
    errors = prediction.errors(jnp.asarray(path, jnp.float32), alpha=0.3, warmup=2)
    np.testing.assert_allclose(errors, expected, rtol=1e-4)  # float32, values of order one
    # vmap over alpha: one program for a table.
    alphas = jnp.float32([0.3, 0.7])
    table = jax.vmap(lambda alpha: prediction.errors(jnp.float32(path), alpha=alpha))(alphas)
    np.testing.assert_allclose(table[1], prediction.errors(jnp.float32(path), alpha=0.7), rtol=1e-4)
