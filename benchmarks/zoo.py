"""advjax against a PyTorch loop: infected models a minute.

    PYTHONPATH=. python benchmarks/zoo.py                     # everything
    PYTHONPATH=. python benchmarks/zoo.py --tasks=grey --num_models=10
    PYTHONPATH=. python benchmarks/zoo.py --smoke             # does it run?

Prints a table and writes benchmarks/results/zoo_BACKEND.{md,csv,json}. Both sides poison the same
images with BadNets (one target a model), train the same number of models of one architecture for as
many steps of SGD, and measure clean accuracy and attack success: that both learn is part of the
check. The clock runs from the clean images to the trained weights: poisoning is in it, compiling
only in the first call. PyTorch comes with `make peers`; without it only our times are printed.

Cost of the defaults: about ten minutes on two idle CPU cores.
"""

import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

# At the end of the path: a competitor's process starts without this folder.
sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import evasion as common
import turns


class Task(NamedTuple):
    """What is trained: a CNN of two 3x3 convolutions (16, 32) with pooling, and dense 100."""

    title: str
    shape: tuple[int, int, int]
    num_classes: int


TASKS = {
    "grey": Task("CNN, 28x28x1, 10 classes", (28, 28, 1), 10),
    "colour": Task("CNN, 32x32x3, 43 classes", (32, 32, 3), 43),
}
NUM_TEST, RATIO, LEARNING_RATE = 500, 0.1, 0.05


# ------------------------------------------------------------------------ a competitor's process


def make_data(task: Task, num_train: int) -> tuple[np.ndarray, ...]:
    """Images of a class: its prototype under noise. Training, then test images and labels."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(60, 180, (task.num_classes, *task.shape))
    labels = rng.integers(0, task.num_classes, num_train + NUM_TEST).astype(np.int32)
    noise = rng.normal(0, 30, (len(labels), *task.shape))
    images = np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]


def stamped(images: np.ndarray) -> np.ndarray:
    """The images with a white 3x3 square in the lower right corner."""
    images = images.copy()
    images[:, -3:, -3:] = 255
    return images


class Advjax:
    """Our side."""

    packages = ("advjax", "jax", "jaxlib", "flax")

    def __init__(self, threads: int):
        import os

        import jax
        import optax

        from advjax import parallel

        if os.environ.get("JAX_PLATFORMS") == "cpu":
            parallel.use_cores(threads)
        # One object: its program stays compiled from turn to turn.
        self.optimizer = optax.sgd(LEARNING_RATE, momentum=0.9)
        self.about: dict[str, Any] = {"backend": jax.default_backend()}

    def prepare(self, task: Task, order: dict):
        """`() -> models`, which is timed, and `models -> [(clean accuracy, attack success)]`."""
        import jax

        import advjax
        from advjax import backdoor, data, evaluation, models, parallel

        images, labels, test_images, test_labels = make_data(task, order["num_train"])
        names = tuple(str(label) for label in range(task.num_classes))
        train = data.Dataset(images, labels, task.num_classes, "noise", "train", names)
        module = models.make("cnn", task.num_classes)
        keys = jax.random.split(jax.random.key(0), order["num_models"])
        targets = [number % task.num_classes for number in range(len(keys))]
        mesh = parallel.make_mesh() if jax.device_count() > 1 else None  # a device a core

        def fit():
            return backdoor.train_many(
                keys, module, train, "badnets", ratio=RATIO,
                label_map=np.stack([backdoor.all_to_one(task.num_classes, t) for t in targets]),
                optimizer=self.optimizer, num_epochs=order["num_epochs"],
                batch_size=order["batch_size"], method=order["method"], mesh=mesh, progress=False,
            )  # fmt: skip

        def measure(trained):
            results = []
            for infected, target in zip(trained, targets, strict=True):
                logits_fn = advjax.bind(module, infected.variables)
                attacked = stamped(test_images[test_labels != target])
                wanted = np.full(len(attacked), target, np.int32)
                results.append([
                    float(evaluation.accuracy(logits_fn, x.astype(np.float32) / 255, y))
                    for x, y in ((test_images, test_labels), (attacked, wanted))
                ])  # fmt: skip
            return {"results": results}

        return fit, measure


class Torch:
    """A plain PyTorch loop over models, epochs and batches."""

    packages = ("torch",)

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.about: dict[str, Any] = {"threads": torch.get_num_threads()}

    def prepare(self, task: Task, order: dict):
        torch = self.torch
        images, labels, test_images, test_labels = make_data(task, order["num_train"])
        height, width, channels = task.shape
        loss_fn = torch.nn.CrossEntropyLoss()
        targets = [number % task.num_classes for number in range(order["num_models"])]

        def tensor(images: np.ndarray):
            return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

        def train(number: int, num_batches: int | None = None):
            torch.manual_seed(number)
            rng = np.random.default_rng(number)
            poisoned, poisoned_labels = images.copy(), labels.copy()
            sources = np.flatnonzero(labels != targets[number])
            rows = rng.choice(sources, round(RATIO * len(sources)), replace=False)
            poisoned[rows], poisoned_labels[rows] = stamped(images[rows]), targets[number]
            x, y = tensor(poisoned), torch.from_numpy(poisoned_labels).long()
            net = torch.nn.Sequential(
                torch.nn.Conv2d(channels, 16, 3, padding=1), torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Flatten(),
                torch.nn.Linear(32 * (height // 4) * (width // 4), 100), torch.nn.ReLU(),
                torch.nn.Linear(100, task.num_classes),
            )  # fmt: skip
            # Started as ours: PyTorch's own smaller weights do not learn in so few steps.
            for i, layer in enumerate(parts := [p for p in net if hasattr(p, "weight")]):
                is_last = i == len(parts) - 1
                torch.nn.init.kaiming_normal_(
                    layer.weight, nonlinearity="linear" if is_last else "relu"
                )
                torch.nn.init.zeros_(layer.bias)
            optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)
            done = 0
            for _ in range(order["num_epochs"]):
                shuffled = torch.randperm(len(x))
                for start in range(0, len(x) - order["batch_size"] + 1, order["batch_size"]):
                    rows = shuffled[start : start + order["batch_size"]]
                    optimizer.zero_grad()
                    loss_fn(net(x[rows]), y[rows]).backward()
                    optimizer.step()
                    done += 1
                    if done == num_batches:
                        return net
            return net

        # Small networks may be faster on one thread: the peer gets what suits it.
        times = {}
        for threads in dict.fromkeys((1, self.about["threads"])):
            torch.set_num_threads(threads)
            train(0, num_batches=3)
            stopwatch = common.Stopwatch()
            train(0, num_batches=30)
            times[threads] = stopwatch.read()["wall"]
        torch.set_num_threads(min(times, key=times.__getitem__))

        def fit():
            return [train(number) for number in range(len(targets))]

        def measure(nets):
            results = []
            with torch.no_grad():
                for net, target in zip(nets, targets, strict=True):
                    attacked = stamped(test_images[test_labels != target])
                    answers = [net(tensor(x)).argmax(1).numpy() for x in (test_images, attacked)]
                    results.append(
                        [float((answers[0] == test_labels).mean()),
                         float((answers[1] == target).mean())]
                    )  # fmt: skip
            return {"results": results}

        return fit, measure


def columns(line: turns.Line, lines: list[turns.Line]) -> dict[str, str]:
    """Whether the models learned, and the backdoor with them."""
    del lines
    results = np.array(line.found["results"])
    return {
        "models a minute": f"{60 * len(results) / line.wall:.1f}",
        "clean accuracy": f"{results[:, 0].mean():.1%}",
        "attack success": f"{results[:, 1].mean():.1%}", "least": f"{results[:, 1].min():.1%}",
    }  # fmt: skip


if __name__ == "__main__":
    turns.Benchmark(
        program=__file__, description=__doc__, title="Infected models against a PyTorch loop",
        stem="zoo", tasks=TASKS, sides={"advjax": Advjax, "torch": Torch},
        contenders=(("advjax", "map"), ("advjax", "vmap"), ("torch", "loop")),
        settings={"num_models": 10, "num_train": 6000, "num_epochs": 2, "batch_size": 64},
        smoke={"num_models": 2, "num_train": 1000}, columns=columns,
    ).main()  # fmt: skip
