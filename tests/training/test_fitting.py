"""Training: exact resume, many models as one program, statistics, augmentation, bad input."""

import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import advjax
from advjax import attacks, data, models, parallel, training

NET = models.make("mlp", num_classes=10, hidden=(16,))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train").take(200)


fit = functools.partial(training.fit, num_epochs=3, batch_size=32, progress=False)
fit_many = functools.partial(training.fit_many, num_epochs=3, batch_size=32, progress=False)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_learns_and_reports_loss_and_accuracy(digits):
    fitted = fit(KEY, NET, digits, num_epochs=40, optimizer=optax.adam(1e-2))
    assert fitted.loss.shape == fitted.accuracy.shape == (40,)
    assert fitted.loss[-1] < 0.1 < 2 < fitted.loss[0] and fitted.accuracy[-1] > 0.98
    logits = advjax.bind(NET, fitted.variables)(digits.float_images())
    assert np.mean(np.argmax(logits, -1) == digits.labels) > 0.98


def test_same_key_same_weights_other_key_others(digits):
    first = fit(KEY, NET, digits)
    assert_equal(first, fit(KEY, NET, digits))
    other = fit(jax.random.key(1), NET, digits)
    assert not np.array_equal(first.loss, other.loss)


def test_each_epoch_visits_every_example_once():
    seen = []

    def spying(key, logits_fn, x, y):
        jax.debug.callback(lambda v: seen.extend(np.asarray(v).tolist()), y)
        return training.cross_entropy(key, logits_fn, x, y)

    dataset = data.Dataset(
        np.zeros((12, 2, 2, 1), np.uint8), np.arange(12, dtype=np.int32), 12, "n", "train",
        tuple(map(str, range(12))),
    )  # fmt: skip
    fit(KEY, models.make("mlp", 12), dataset, loss_fn=spying, num_epochs=2, batch_size=4)
    jax.effects_barrier()
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("stop_after, over_devices", [(1, False), (3, False), (2, True)])
def test_resume_is_exact(digits, tmp_path, monkeypatch, stop_after, over_devices):
    """Stopped after a few checkpoints and called again: the weights of an unbroken run."""
    net = models.make("cnn", 10, features=(2, 2), hidden=8, dropout_rate=0.1)
    options = dict(augment=training.augment.random_flip, num_epochs=2)
    fit = functools.partial(training.fit, KEY, batch_size=32, progress=False)
    if over_devices:
        options |= dict(method="map", mesh=parallel.make_mesh(devices=jax.devices()[:2]))
        keys = jax.random.split(KEY, 2)
        fit = functools.partial(training.fit_many, keys, batch_size=32, progress=False)
    unbroken = fit(net, digits, **options)
    save, count = training.fitting.Checkpoints.save, []

    def save_and_stop(self, step, state):
        save(self, step, state)
        count.append(step)
        if len(count) == stop_after:
            raise InterruptionError

    monkeypatch.setattr(training.fitting.Checkpoints, "save", save_and_stop)
    options |= dict(checkpoint_dir=tmp_path / "c", checkpoint_every=0.0)
    with pytest.raises(InterruptionError):
        fit(net, digits, **options)
    assert 0 < count[-1] < 12  # in the middle: 6 steps an epoch
    monkeypatch.setattr(training.fitting.Checkpoints, "save", save)
    assert_equal(fit(net, digits, **options), unbroken)
    assert_equal(fit(net, digits, **options), unbroken)  # nothing left to do: only restored
    assert len(list((tmp_path / "c").glob("step_*"))) == 1


_SCRIPT = """
import sys, jax, numpy as np
from advjax import data, models, training
dataset = data.load(sys.argv[1], "train[:%d]" % int(sys.argv[4]), data_dir=sys.argv[2])
fitted = training.fit(jax.random.key(3), models.make(sys.argv[5], dataset.num_classes), dataset,
    num_epochs=1, batch_size=64, checkpoint_dir=sys.argv[3], checkpoint_every=0.0,
    augment=training.augment.chain(training.augment.random_crop(2), training.augment.random_flip))
np.savez(sys.argv[3] + ".npz", *jax.tree.leaves(fitted.variables), fitted.loss)
"""


def _train_in_a_process(arguments, kill_at_checkpoint: bool):
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    if kill_at_checkpoint:
        folder = pathlib.Path(arguments[2])
        while process.poll() is None and not list(folder.glob("step_*[0-9]")):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=400)
    return process.returncode, stderr


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("digits", marks=pytest.mark.slow),
        pytest.param("cifar10", marks=pytest.mark.study),
    ],
)
def test_killed_and_started_again_ends_with_the_same_weights(name, tmp_path, request):
    """SIGKILL in the middle of an epoch; the progress bar goes on where it was."""
    data_dir = request.getfixturevalue("tfds_dir") if name == "cifar10" else tmp_path
    size, model = (768, "resnet8") if name == "cifar10" else (1400, "cnn")
    code, stderr = _train_in_a_process((name, data_dir, tmp_path / "a", size, model), False)
    assert code == 0 and "loss=" in stderr and "accuracy=" in stderr and "100%" in stderr, stderr
    killed = (name, data_dir, tmp_path / "b", size, model)
    assert _train_in_a_process(killed, True)[0] == -signal.SIGKILL
    assert not (tmp_path / "b.npz").exists()
    assert _train_in_a_process(killed, False)[0] == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a.files == b.files
        for key in a.files:
            np.testing.assert_array_equal(a[key], b[key])


def weighted(key, logits_fn, x, y, weight):
    return weight * training.cross_entropy(key, logits_fn, x, y)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(module=models.make("mlp", 10, hidden=(17,))), "module was"),
        (dict(batch_size=16), "batch_size was 32 and is now 16"),
        (dict(num_epochs=4), "num_epochs was 3 and is now 4"),
        (dict(key=jax.random.key(9)), "key was"),
        (dict(optimizer=optax.sgd(0.1, momentum=0.9)), "state was"),
        (dict(optimizer=optax.adam(2e-3)), "optimizer was"),
        (dict(augment=training.augment.random_crop(4)), "augment was"),
        (dict(loss_fn=functools.partial(weighted, weight=np.float32(2))), "loss_fn was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(digits, tmp_path, change, sentence):
    arguments = dict(
        key=KEY, module=NET, dataset=digits, checkpoint_dir=tmp_path,
        augment=training.augment.random_crop(2),
        loss_fn=functools.partial(weighted, weight=np.float32(1)),
    )  # fmt: skip
    fit(**arguments)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"belong to another run: {sentence}") as caught:
        fit(**arguments | change)
    assert "\n" not in str(caught.value)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))


def test_a_sweep_of_other_values_is_refused(digits, tmp_path):
    def sweep(rates):
        return fit_many(
            jax.random.split(KEY, 2), NET, digits, optimizer=optax.adam,
            hyperparameters={"optimizer": {"learning_rate": rates}}, checkpoint_dir=tmp_path,
        )  # fmt: skip

    first = sweep([1e-3, 2e-3])
    assert_equal(first, sweep([1e-3, 2e-3]))
    with pytest.raises(ValueError, match="belong to another run: hyperparameters was"):
        sweep([1e-3, 3e-3])


def test_a_damaged_checkpoint_is_one_sentence(digits, tmp_path):
    fit(KEY, NET, digits, checkpoint_dir=tmp_path)
    (step,) = tmp_path.glob("step_*")
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"step_18 cannot be read \(\w+\); delete it"):
        fit(KEY, NET, digits, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("method", ["vmap", "map"])
def test_many_models_equal_one_by_one(digits, method):
    keys = jax.random.split(KEY, 3)
    many = fit_many(keys, NET, digits, method=method)
    for i, key in enumerate(keys):
        # One product of a batch of models may round otherwise than one model's: 18 steps of Adam.
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-4, rtol=1e-3),
            many, fit(key, NET, digits),
        )  # fmt: skip


def test_many_models_with_their_own_hyperparameters_and_data(digits):
    def weighted(key, logits_fn, x, y, weight):
        return weight * training.cross_entropy(key, logits_fn, x, y)

    keys = jnp.stack([KEY, KEY, KEY])
    fitted = fit_many(
        keys, NET, digits, loss_fn=weighted, optimizer=optax.sgd,
        hyperparameters={
            "optimizer": {"learning_rate": [0.1, 0.0, 0.1]}, "loss": {"weight": [1.0, 1.0, 0.5]}
        },
    )  # fmt: skip
    assert fitted.loss[0, -1] < fitted.loss[0, 0]
    assert np.ptp(fitted.loss[1]) < 0.2  # nothing learnt; batches differ
    alone = fit(KEY, NET, digits, optimizer=optax.sgd(0.05))
    # Half the weight is half the learning rate.
    np.testing.assert_allclose(2 * fitted.loss[2], alone.loss, rtol=1e-4)
    turned = data.Dataset(
        digits.images[:, ::-1].copy(), digits.labels, 10, "turned", "train", digits.class_names
    )
    two = fit_many(keys[:2], NET, [digits, turned])
    np.testing.assert_allclose(two.loss[1], fit(KEY, NET, turned).loss, rtol=1e-4)


def test_options_of_a_loss_are_one_program_and_part_of_the_run(digits, tmp_path):
    traces = []

    def loss_fn(key, logits_fn, x, y, weight):
        traces.append(0)
        return weighted(key, logits_fn, x, y, weight)

    adam = optax.adam(1e-3)
    first, second = (
        fit(KEY, NET, digits, loss_fn=loss_fn, loss_options={"weight": weight}, optimizer=adam)
        for weight in (1.0, 0.0)
    )
    assert len(traces) == 1
    plain = fit(KEY, NET, digits, optimizer=adam)
    np.testing.assert_allclose(first.loss, plain.loss, rtol=1e-5)
    assert np.all(np.asarray(second.loss) == 0)
    options = {"num_epochs": 1, "loss_fn": weighted, "checkpoint_dir": tmp_path}
    fit(KEY, NET, digits, loss_options={"weight": 1.0}, **options)
    with pytest.raises(ValueError, match="hyperparameters was"):
        fit(KEY, NET, digits, loss_options={"weight": 2.0}, **options)


@pytest.mark.parametrize("method", ["map", "vmap"])
def test_devices_do_not_change_models(digits, method):
    """Each lives on one device, so nothing is summed in another order; ten fill eight twice."""
    keys = jax.random.split(KEY, 10)
    options = {"method": method, "loss_fn": weighted, "num_epochs": 2}
    options["hyperparameters"] = {"loss": {"weight": np.linspace(0.5, 2, 10, dtype=np.float32)}}
    one = fit_many(keys, NET, digits, **options)
    many = fit_many(keys, NET, digits, mesh=parallel.make_mesh(), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, many)
    own = [dataclasses.replace(digits, labels=(digits.labels + i) % 10) for i in range(3)]
    mesh = parallel.make_mesh(devices=jax.devices()[:2])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        fit_many(keys[:3], NET, own, method=method),
        fit_many(keys[:3], NET, own, method=method, mesh=mesh),
    )  # fmt: skip


def test_devices_do_not_change_the_result(digits):
    mesh = parallel.make_mesh()
    # A batch over eight devices: gradients are summed in another order, 18 steps of Adam.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3),
        fit(KEY, NET, digits, mesh=mesh), fit(KEY, NET, digits),
    )  # fmt: skip


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


def test_running_statistics_follow_the_calls_of_the_loss(digits):
    def adversarial(key, logits_fn, x, y):
        # The calls of the attack do not count.
        x_adv = attacks.pgd(key, training.inference(logits_fn), x, y, 0.1, num_steps=2)
        return training.cross_entropy(key, logits_fn, jax.lax.stop_gradient(x_adv), y)

    def brighter(key, logits_fn, x, y):
        logits_fn(jnp.clip(x + 0.5, 0, 1))
        return training.cross_entropy(key, logits_fn, x, y)

    one = functools.partial(fit, KEY, Normed(), digits, num_epochs=1, batch_size=200)
    means = [
        np.asarray(one(loss_fn=loss_fn).variables["batch_stats"]["BatchNorm_0"]["mean"])
        for loss_fn in (training.cross_entropy, adversarial, brighter)
    ]
    pixels = digits.float_images().reshape(200, -1)
    # One step from 0 with momentum 0.5 is half the mean; a second call in the loss halves again.
    np.testing.assert_allclose(means[0], 0.5 * pixels.mean(0), atol=1e-6)
    assert 0 < np.abs(means[1] - means[0]).max() <= 0.05 + 1e-6  # half of epsilon = 0.1
    bright = np.clip(pixels + 0.5, 0, 1).mean(0)
    np.testing.assert_allclose(means[2], 0.25 * bright + 0.5 * pixels.mean(0), atol=1e-6)


def test_augmentations():
    x = jax.random.uniform(KEY, (64, 5, 6, 2))
    flipped = training.augment.random_flip(KEY, x)
    is_flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, x, strict=True)])
    is_same = np.array([np.array_equal(a, b) for a, b in zip(flipped, x, strict=True)])
    assert np.all(is_flipped | is_same) and is_flipped.any() and is_same.any()
    cropped = np.asarray(training.augment.random_crop(1)(KEY, x))
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = set()
    for i, image in enumerate(cropped):
        found = [(r, c) for r in range(3) for c in range(3)
                 if np.array_equal(image, wide[i, r : r + 5, c : c + 6])]  # fmt: skip
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) == 9  # 64 draws miss one of nine with probability 0.5 %, for this key not
    both = training.augment.chain(training.augment.random_flip, training.augment.random_crop(1))
    assert both(KEY, x).shape == x.shape


def test_bad_input_is_one_sentence(digits):
    empty = digits.__class__(
        digits.images[:0], digits.labels[:0], 10, "digits", "train", digits.class_names
    )
    for call, sentence in [
        (lambda: fit(KEY, NET, digits, num_epochs=0), "num_epochs >= 1, got num_epochs=0"),
        (lambda: fit(KEY, NET, digits, batch_size=-1), "batch_size >= 1, got batch_size=-1"),
        (lambda: fit(KEY, NET, digits, optimizer="adam"), "need an optax optimiser, .* got 'adam'"),
        (lambda: fit(KEY, NET, digits, optimizer=optax.adam), "such as optax.adam.* got <fun"),
        (
            lambda: fit_many(KEY[None], NET, digits, optimizer=optax.adam),
            "fit_many: need an optax optimiser",
        ),
        (lambda: fit(0, NET, digits), r"key: need a key such as jax.random.key\(0\), got 0"),
        (lambda: fit(KEY, NET, empty), "at least one example"),
        (lambda: fit(KEY, NET, digits, loss_fn=lambda *a: jnp.zeros(())), "one value an image"),
        (lambda: fit_many(KEY, NET, digits), r"one key a model, \[m\], got shape \(\)"),
        (lambda: fit_many(KEY[None], NET, digits, method="loop"), "known: vmap, map"),
        (
            lambda: fit_many(
                jax.random.split(KEY, 2), NET, digits,
                hyperparameters={"optimizer": {"learning_rate": [1.0]}},
            ),
            r"one learning_rate a model \(2\)",
        ),
        (lambda: fit_many(jax.random.split(KEY, 2), NET, [digits]), "one data set a model"),
        (lambda: fit_many(KEY[None][:0], NET, digits), r"one key a model, \[m\], got shape \(0,\)"),
        (
            lambda: fit_many(
                KEY[None], NET, digits, hyperparameters={"optimizer": {"learning_rate": [1.0]}}
            ),
            "a function that makes one, such as optimizer=optax.adam, got NoneType",
        ),
        (lambda: fit(KEY, models.make("mlp", 3), digits), r"fit: need labels in 0 \.\.\. 2.*got 9"),
        (lambda: fit_many(KEY[None], models.make("mlp", 3), [digits]), "fit_many: need labels in"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            call()


def test_a_batch_larger_than_the_data_is_the_data(digits):
    assert_equal(fit(KEY, NET, digits, batch_size=200), fit(KEY, NET, digits, batch_size=999))


def test_a_loss_is_told_how_far_the_training_is():
    def loss_fn(key, logits_fn, x, y):
        # Its mean over an epoch is that of the shares: (0 + 1 + 2 + 3) / 8, then (4 + ... + 7) / 8.
        return 0 * training.cross_entropy(key, logits_fn, x, y) + training.share_done(logits_fn)

    network, images = models.make("mlp", 10, hidden=(4,)), data.load("digits", "train").take(32)
    fitted = training.fit(
        jax.random.key(0), network, images,
        loss_fn=loss_fn, num_epochs=2, batch_size=8, progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(fitted.loss, [1.5 / 8, 5.5 / 8], rtol=1e-6)
    assert training.share_done(lambda x: x) == 1
