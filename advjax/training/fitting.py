"""`fit` and `fit_many`: a training run is a pure function of its key, so many of them vmap."""

import functools
import inspect
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from advjax.core import checks, losses, metrics, parallel, random
from advjax.core.descriptions import described
from advjax.core.io import PathLike
from advjax.core.typing import Array, Key, LogitsFn
from advjax.data import Dataset
from advjax.training.augment import Augmentation
from advjax.training.checkpoints import Checkpoints

_SECONDS_PER_CALL = 1.0  # how often the progress bar moves


class Fitted(NamedTuple):
    """What training returns.

    Attributes:
      variables: the module's variables, for `advjax.bind`; from `fit_many` with a leading model
        axis on every leaf, so that `bind` gives a stack.
      loss: mean training loss of each epoch, f32[epochs] or f32[models, epochs].
      accuracy: mean training accuracy of each epoch, like `loss`: on the images of the loss's last
        own call of the network, such as the adversarial ones.
    """

    variables: Any
    loss: Array
    accuracy: Array


class _State(NamedTuple):
    step: Array
    params: Any
    statistics: Any  # the other collections, such as batch_stats
    opt_state: Any
    loss_sums: jax.Array  # f32[epochs]
    correct_sums: jax.Array  # f32[epochs]


def cross_entropy(key: Key, logits_fn: LogitsFn, x: Array, y: Array) -> Array:
    """The standard training loss: cross-entropy on the clean images.

    Args:
      key: not used.
      logits_fn: classifier in training mode.
      x: images, f32[b, h, w, c] in [0, 1].
      y: labels, int32[b].

    Returns:
      f32[b].
    """
    del key
    return losses.cross_entropy(logits_fn(x), y)


class TrainingClassifier:
    """A network in training mode, as the `logits_fn` of a loss.

    Each call of the loss moves the running statistics, the last one also gives the training
    accuracy. Calls from inside another transformation cannot do either; what attacks inside a loss
    should call is `inference(logits_fn)`. `share_done` says how far the training is.
    """

    def __init__(
        self, module: nn.Module, params: Any, statistics: Any, key: Key, share_done: ArrayLike = 1.0
    ):
        self._module, self._params, self._key = module, params, key
        self._trace = jax.extend.core.get_opaque_trace_state()
        takes_train = "train" in inspect.signature(module.__call__).parameters
        self._options: dict[str, Any] = {"train": True} if takes_train else {}
        self._num_calls = 0
        self.statistics = statistics
        self.share_done = share_done
        self.logits: Array | None = None

    def __call__(self, x: Array) -> Array:
        key = jax.random.fold_in(self._key, self._num_calls)
        self._num_calls += 1
        logits, statistics = self._module.apply(
            {"params": self._params, **self.statistics}, x,
            mutable=list(self.statistics), rngs={"dropout": key}, **self._options,
        )  # fmt: skip
        logits = jnp.asarray(logits)
        if jax.extend.core.get_opaque_trace_state() == self._trace:
            self.statistics, self.logits = dict(statistics), logits
        return logits

    def inference(self, x: Array) -> Array:
        return jnp.asarray(self._module.apply({"params": self._params, **self.statistics}, x))


def inference(logits_fn: LogitsFn) -> LogitsFn:
    """The classifier of a training loss in inference mode, for the attack inside the loss.

    Args:
      logits_fn: what `fit` hands to a loss; any other classifier is returned as it is.

    Returns:
      The same weights without dropout and with the running statistics, which it does not move.
    """
    return getattr(logits_fn, "inference", logits_fn)


def share_done(logits_fn: LogitsFn) -> ArrayLike:
    """How far the training is, for a loss that changes on its way.

    Args:
      logits_fn: what `fit`, `fit_many` or `universality.train_architectures` hands to a loss.

    Returns:
      The share of the steps that are done, f32[] from 0 to 1; 1 for any other classifier.
    """
    return getattr(logits_fn, "share_done", 1.0)


class _Program(NamedTuple):
    """The pure part of a run: everything static, and functions of arrays."""

    module: nn.Module
    loss_fn: Callable[..., Array]
    optimizer: Any
    augment: Augmentation | None
    num_epochs: int
    batch_size: int
    steps_per_epoch: int
    mesh: Mesh | None  # to split the batch over

    def _parts(self, hyperparameters) -> tuple[Callable[..., Array], Any]:
        loss_fn, optimizer = self.loss_fn, self.optimizer
        if "loss" in hyperparameters:
            loss_fn = functools.partial(loss_fn, **hyperparameters["loss"])
        if "optimizer" in hyperparameters:
            optimizer = optimizer(**hyperparameters["optimizer"])
        return loss_fn, optimizer

    def init(self, key: Key, images: Array, hyperparameters) -> _State:
        x = as_float(images[:1])
        variables = dict(self.module.init(random.named(key, "init"), x))
        params = variables.pop("params")
        _, optimizer = self._parts(hyperparameters)
        sums = jnp.zeros(self.num_epochs, jnp.float32)
        step = jnp.zeros((), jnp.int32)
        return _State(step, params, variables, optimizer.init(params), sums, sums)

    def run(self, state: _State, key: Key, images, labels, hyperparameters, stop) -> _State:
        """Goes on until step `stop`, which lies in the same epoch."""
        loss_fn, optimizer = self._parts(hyperparameters)
        epoch = state.step // self.steps_per_epoch
        key_order = jax.random.fold_in(random.named(key, "order"), epoch)
        order = jax.random.permutation(key_order, images.shape[0])

        def step(number, state: _State) -> _State:
            key_step = jax.random.fold_in(random.named(key, "step"), number)
            key_augment, key_loss, key_dropout = jax.random.split(key_step, 3)
            first = (number % self.steps_per_epoch) * self.batch_size
            rows = jax.lax.dynamic_slice(order, (first,), (self.batch_size,))
            x, y = as_float(images[rows]), labels[rows]
            if self.mesh is not None:
                x, y = parallel.place((x, y), self.mesh, axis=0)
            if self.augment is not None:
                x = self.augment(key_augment, x)

            def mean_loss(params):
                logits_fn = TrainingClassifier(
                    self.module, params, state.statistics, key_dropout,
                    number / (self.num_epochs * self.steps_per_epoch),
                )  # fmt: skip
                loss = loss_fn(key_loss, logits_fn, x, y)
                if loss.shape != y.shape:
                    raise ValueError(
                        f"fit: loss_fn must return one value an image, {y.shape}, got {loss.shape}."
                    )
                logits = logits_fn.logits
                is_judged = logits is not None and logits.shape[:1] == y.shape
                correct = metrics.is_correct(logits, y) if is_judged else jnp.full(y.shape, jnp.nan)
                return jnp.mean(loss), (logits_fn.statistics, jnp.sum(correct, dtype=jnp.float32))

            (loss, (statistics, correct)), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
                state.params
            )
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            state = _State(
                number + 1,
                optax.apply_updates(state.params, updates),
                statistics,
                opt_state,
                state.loss_sums.at[epoch].add(loss * self.batch_size),
                state.correct_sums.at[epoch].add(correct),
            )
            return parallel.place(state, self.mesh)

        return jax.lax.fori_loop(state.step, stop, step, state)


def as_float(images: Array) -> Array:
    """Stored images, uint8 or float, as float images in [0, 1]."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _lift(function, axes, method: str | None):
    """The function over a leading model axis of the arguments that `axes` marks."""
    if method is None:
        return function
    if method == "vmap":
        return jax.vmap(function, in_axes=axes)

    def mapped(*args):
        moving = [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]

        def one(values):
            values = iter(values)
            return function(
                *(next(values) if axis == 0 else arg for arg, axis in zip(args, axes, strict=True))
            )

        return jax.lax.map(one, moving)

    return mapped


def _spread(function, axes, mesh: Mesh | None):
    """The function with each device's own part of the models; nothing is summed over devices."""
    if mesh is None:
        return function
    split, whole = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    specs = tuple(split if axis == 0 else whole for axis in axes)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)


@functools.lru_cache(maxsize=8)
def _compiled(
    program: _Program, method: str | None, data_axis: int | None, model_mesh: Mesh | None
):
    """`init` and `run` over models, compiled once for all runs of one program."""
    model_axis = None if method is None else 0

    def over_models(function, axes):
        return _spread(_lift(function, axes, method), axes, model_mesh)

    init = over_models(program.init, (model_axis, data_axis, model_axis))
    run_axes = (model_axis, model_axis, data_axis, data_axis, model_axis, None)
    run = over_models(program.run, run_axes)
    return jax.jit(init), jax.jit(run, donate_argnums=0)


def _describe(
    program: _Program, key: Key, arrays: Sequence[Array], hyperparameters: Any, state: _State
) -> dict:
    """What a run is, as far as it can be told: enough to refuse another run's checkpoint."""
    shapes = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda s: s, state))[0]
    return {
        "module": " ".join(repr(program.module).split()),
        "loss_fn": described(program.loss_fn),
        "augment": described(program.augment),
        "hyperparameters": fingerprint(hyperparameters),
        "num_epochs": program.num_epochs,
        "batch_size": program.batch_size,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "data": fingerprint(arrays),
        "state": {jax.tree_util.keystr(path): f"{s.dtype}{list(s.shape)}" for path, s in shapes},
        "optimizer": described(program.optimizer),
    }


def fingerprint(arrays: Any) -> int:
    """A number that tells trees of arrays apart."""
    number = 0
    for array in jax.tree.leaves(arrays):
        if jax.dtypes.issubdtype(getattr(array, "dtype", None), jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        number = zlib.crc32(np.ascontiguousarray(array).data, number)
    return number


def _train(
    program: _Program,
    key: Key,
    images: Array,
    labels: Array,
    hyperparameters: Mapping[str, Any],
    *,
    method: str | None,
    data_axis: int | None,
    model_mesh: Mesh | None,
    checkpoint_dir: PathLike | None,
    checkpoint_every: float,
    progress: bool,
    caller: str,
) -> Fitted:
    try:
        init, run = _compiled(program, method, data_axis, model_mesh)
    except TypeError:  # a module or an optimiser that cannot be hashed
        init, run = _compiled.__wrapped__(program, method, data_axis, model_mesh)
    described = (images, labels), jax.tree.map(np.asarray, dict(hyperparameters))
    images, labels = (
        parallel.place(array, program.mesh or model_mesh, axis=data_axis if model_mesh else None)
        for array in (jnp.asarray(images), jnp.asarray(labels))
    )
    key, hyperparameters = parallel.place(
        (key, hyperparameters), program.mesh or model_mesh, axis=0 if model_mesh else None
    )
    state = init(key, images, hyperparameters)
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(
            checkpoint_dir, _describe(program, key, *described, state), caller="fit"
        )
        restored = checkpoints.restore(state)
        state = state if restored is None else restored

    def current_step() -> int:
        return int(np.asarray(jax.tree.leaves(state.step)[0]).ravel()[0])

    is_shared = checkpoints is not None or parallel.is_global(program.mesh or model_mesh)
    total = program.num_epochs * program.steps_per_epoch
    done, chunk, saved_at = current_step(), 1, time.monotonic()
    is_quiet = not (progress and parallel.is_main_process()) or done == total
    with tqdm(total=total, initial=done, desc=caller, unit="step", disable=is_quiet) as bar:
        while done < total:
            epoch = done // program.steps_per_epoch
            stop = min(done + chunk, (epoch + 1) * program.steps_per_epoch)
            started = time.monotonic()
            state = run(state, key, images, labels, hyperparameters, stop)
            seen = (stop - epoch * program.steps_per_epoch) * program.batch_size
            shown = {"epoch": f"{epoch + 1}/{program.num_epochs}"}
            shown["loss"] = f"{np.mean(np.asarray(state.loss_sums)[..., epoch]) / seen:.4f}"
            accuracy = np.mean(np.asarray(state.correct_sums)[..., epoch]) / seen
            if not np.isnan(accuracy):  # an autoencoder has none
                shown["accuracy"] = f"{accuracy:.2%}"
            bar.set_postfix(shown, refresh=False)
            bar.update(stop - done)
            seconds = max(time.monotonic() - started, 1e-4)
            # The first call compiles; from then on aim at one call a second.
            chunk = 2 if done == 0 else max(1, round((stop - done) * _SECONDS_PER_CALL / seconds))
            done = stop
            is_due = time.monotonic() - saved_at >= checkpoint_every
            if is_shared:
                chunk, is_due = parallel.agree(chunk, is_due)
            if checkpoints is not None and (is_due or done == total):
                checkpoints.save(done, state)
                saved_at = time.monotonic()
    seen = program.steps_per_epoch * program.batch_size
    fitted = Fitted(
        {"params": state.params, **state.statistics},
        state.loss_sums / seen,
        state.correct_sums / seen,
    )
    num_diverged = np.sum(~np.isfinite(np.asarray(fitted.loss)[..., -1]))
    if num_diverged:
        logging.warning(
            "%s: the loss of %d model(s) is not finite at the end.", caller, num_diverged
        )
    return fitted


def _program(
    caller: str,
    module,
    num_examples,
    loss_fn,
    optimizer,
    num_epochs,
    batch_size,
    augment,
    mesh,
    *,
    makes_optimizer=False,
) -> _Program:
    checks.at_least(caller, "num_epochs", num_epochs, 1)
    checks.at_least(caller, "batch_size", batch_size, 1)
    if num_examples == 0:
        raise ValueError(f"{caller}: need at least one example, got an empty data set.")
    batch_size = min(batch_size, num_examples)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    if not (makes_optimizer or hasattr(optimizer, "update")):
        raise ValueError(
            f"{caller}: need an optax optimiser, such as optax.adam(1e-3), got {optimizer!r}."
        )
    return _Program(
        module, loss_fn, optimizer, augment, num_epochs, batch_size,
        num_examples // batch_size, mesh,
    )  # fmt: skip


def _check_labels(caller: str, module: nn.Module, loss_fn: Any, dataset: Dataset) -> None:
    """Labels are classes of the network, where the loss is known to read them as such."""
    reads_classes = loss_fn is cross_entropy or getattr(loss_fn, "reads_classes", False)
    if not reads_classes or not len(dataset):
        return
    x = jax.ShapeDtypeStruct((1, *dataset.image_shape), np.float32)
    logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    highest = int(dataset.labels.max())
    if highest >= logits.shape[-1]:
        raise ValueError(
            f"{caller}: need labels in 0 ... {logits.shape[-1] - 1}, the classes of the network, "
            f"got {highest}."
        )


def fit(
    key: Key,
    module: nn.Module,
    dataset: Dataset,
    *,
    loss_fn: Callable[..., Array] = cross_entropy,
    loss_options: Mapping[str, ArrayLike] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_epochs: int = 10,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    checkpoint_dir: PathLike | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Fitted:
    """Trains a network.

    Each epoch visits the examples in a new order, without the last incomplete batch. Orders,
    augmentation and dropout are functions of the key and the step, so a run that is killed and
    called again with the same arguments ends with the same weights.

    Args:
      key: a key.
      module: flax module, images f32[b, h, w, c] in [0, 1] to logits f32[b, k]; it is called with
        `train=True` if it takes that.
      dataset: training images (uint8, or float in [0, 1]) and labels.
      loss_fn: `(key, logits_fn, x, y, **loss_options) -> f32[b]`; its mean is minimised.
      loss_options: arrays and numbers for the loss that may change from run to run without
        compiling again.
      optimizer: an optax optimiser, schedule included; Adam at 1e-3 if None.
      num_epochs: passes over the data.
      batch_size: images a step; at most the size of the data set is used.
      augment: `(key, x) -> x`, see `training.augment`.
      checkpoint_dir: folder for checkpoints; if it holds one of this run, training goes on there.
      checkpoint_every: seconds between checkpoints; one is always written at the end.
      progress: show a progress bar with loss and accuracy.
      mesh: devices to split each batch over.

    Returns:
      `Fitted(variables, loss, accuracy)`.

    Static: module, loss_fn, optimizer, num_epochs, batch_size, augment, mesh.

    Raises:
      ValueError: a count below 1, an empty data set, labels that are no classes of the network
        (where the loss is `cross_entropy`), or a checkpoint of another run.

    Example:
      >>> import advjax, jax
      >>> from advjax import data, models, training
      >>> net, dataset = models.make("mlp", num_classes=10), data.load("digits", "train")
      >>> fitted = training.fit(jax.random.key(0), net, dataset, num_epochs=2, progress=False)
      >>> bool(fitted.loss[1] < fitted.loss[0])
      True
      >>> logits_fn = advjax.bind(net, fitted.variables)
    """
    _check_labels("fit", module, loss_fn, dataset)
    program = _program(
        "fit",
        module,
        len(dataset.images),
        loss_fn,
        optimizer,
        num_epochs,
        batch_size,
        augment,
        mesh,
    )
    return _train(
        program, random.as_typed(key), dataset.images, dataset.labels,
        {"loss": {name: jnp.asarray(value) for name, value in (loss_options or {}).items()}},
        method=None, data_axis=None, model_mesh=None, checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every, progress=progress, caller="fit",
    )  # fmt: skip


def fit_many(
    keys: Key,
    module: nn.Module,
    dataset: Dataset | Sequence[Dataset],
    *,
    loss_fn: Callable[..., Array] = cross_entropy,
    optimizer: Any = None,
    hyperparameters: Mapping[str, Mapping[str, Any]] | None = None,
    num_epochs: int = 10,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    method: str = "vmap",
    checkpoint_dir: PathLike | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Fitted:
    """Trains many networks of one architecture in one program.

    Args:
      keys: one key a model, [m].
      module: flax module, as for `fit`.
      dataset: one data set for all, or one a model, all of the same shape.
      loss_fn: `(key, logits_fn, x, y, **hyperparameters["loss"]) -> f32[b]`.
      optimizer: an optax optimiser for all; or, with `hyperparameters["optimizer"]`, a function of
        those that makes one, such as `optax.adam`. Adam at 1e-3 if None.
      hyperparameters: per-model values, each array [m, ...]:
        `{"optimizer": {"learning_rate": [...]}, "loss": {"weight": [...]}}`.
      num_epochs: passes over the data.
      batch_size: images a step for each model.
      augment: `(key, x) -> x`.
      method: "vmap" trains them side by side, "map" one after the other; the same result up to
        rounding. "vmap" is the faster one for small networks, "map" needs less memory.
      checkpoint_dir: folder for checkpoints of all models together.
      checkpoint_every: seconds between checkpoints.
      progress: show a progress bar with mean loss and accuracy.
      mesh: devices to spread the models over; each trains its own, side by side or one after the
        other.

    Returns:
      `Fitted` with a leading model axis: `advjax.bind(module, fitted.variables)` is a stack.

    Static: module, loss_fn, optimizer, num_epochs, batch_size, augment, method, mesh.

    Raises:
      ValueError: keys without a model axis, hyper-parameters or data sets that do not fit them, an
        unknown method, or what `fit` raises.

    Example:
      >>> import jax, optax
      >>> from advjax import data, models, training
      >>> fitted = training.fit_many(
      ...     jax.random.split(jax.random.key(0), 2), models.make("mlp", num_classes=10),
      ...     data.load("digits", "train"), optimizer=optax.sgd, num_epochs=1, progress=False,
      ...     hyperparameters={"optimizer": {"learning_rate": [0.0, 0.1]}})
      >>> fitted.loss.shape
      (2, 1)
    """
    keys = random.as_typed(keys)
    if keys.ndim != 1 or not keys.size:
        raise ValueError(f"fit_many: need one key a model, [m], got shape {keys.shape}.")
    checks.known("fit_many", "method", method, ("vmap", "map"))
    num_models = len(keys)
    if parallel.is_global(mesh):
        raise ValueError(
            "fit_many: need a mesh of this process's own devices, got one over "
            f"{jax.process_count()} processes."
        )
    groups: dict[str, dict[str, jax.Array]] = {}
    for group, values in (hyperparameters or {}).items():
        checks.known("fit_many", "group of hyperparameters", group, ("optimizer", "loss"))
        groups[group] = {name: jnp.asarray(value) for name, value in values.items()}
        for name, value in groups[group].items():
            if value.shape[:1] != (num_models,):
                raise ValueError(
                    f"fit_many: need one {name} a model ({num_models}), got shape {value.shape}."
                )
    if "optimizer" in groups and not callable(optimizer):
        raise ValueError(
            "fit_many: hyperparameters of the optimizer need a function that makes one, such as "
            f"optimizer=optax.adam, got {type(optimizer).__name__}."
        )
    data_axis = None
    if isinstance(dataset, Dataset):
        images, labels = dataset.images, dataset.labels
        _check_labels("fit_many", module, loss_fn, dataset)
    else:
        shapes = {d.images.shape for d in dataset}
        if len(dataset) != num_models or len(shapes) != 1:
            raise ValueError(
                f"fit_many: need one data set a model ({num_models}), all of one shape, got "
                f"{len(dataset)} of shapes {sorted(shapes)}."
            )
        for one in dataset:
            _check_labels("fit_many", module, loss_fn, one)
        images = np.stack([d.images for d in dataset])
        labels = np.stack([d.labels for d in dataset])
        data_axis = 0
    # Models that do not fill the mesh are repeated and dropped again.
    rows = np.minimum(
        np.arange(parallel.padded(num_models, 1 if mesh is None else mesh.size)), num_models - 1
    )
    if data_axis == 0:
        images, labels = images[rows], labels[rows]
    program = _program(
        "fit_many", module, images.shape[data_axis == 0], loss_fn, optimizer, num_epochs,
        batch_size, augment, None, makes_optimizer="optimizer" in groups,
    )  # fmt: skip
    fitted = _train(
        program, keys[rows], images, labels, jax.tree.map(lambda v: v[rows], groups),
        method=method, data_axis=data_axis, model_mesh=mesh, checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every, progress=progress, caller="fit_many",
    )  # fmt: skip
    return jax.tree.map(lambda leaf: leaf[:num_models], fitted)
