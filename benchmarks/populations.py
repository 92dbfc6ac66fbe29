"""advjax against a PyTorch loop: small fully connected networks a minute.

    PYTHONPATH=. python benchmarks/populations.py
    PYTHONPATH=. python benchmarks/populations.py --tasks=narrow --num_networks=8
    PYTHONPATH=. python benchmarks/populations.py --smoke     # does it run?

Prints a table and writes benchmarks/results/populations_BACKEND.{md,csv,json}. Both sides train the
same architectures (1 or 2 layers, log-uniform widths, dropout to 0.5) on the same images with Adam
for as many steps; the mean test accuracy is part of the table. Ours are padded to one program a
depth and width (64, 128 or 512), trained side by side (vmap) or one after the other (map). PyTorch
comes with `make peers`; without it only our times are printed. Two to four minutes on two idle CPU
cores.
"""

import pathlib
import sys
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

# At the end of the path: a competitor's process starts without this folder.
sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import evasion as common
import turns


class Task(NamedTuple):
    """Networks of 1 or 2 hidden layers for 28x28 images of ten classes."""

    title: str
    width: tuple[int, int]


TASKS = {
    "narrow": Task("1 or 2 layers of 30 to 128 units", (30, 128)),
    "wide": Task("1 or 2 layers of 400 to 512 units", (400, 512)),
}
NUM_TEST, LEARNING_RATE, SIDE, NUM_CLASSES = 500, 1e-3, 28, 10


# ------------------------------------------------------------------------ a competitor's process


def make_data(num_train: int) -> tuple[np.ndarray, ...]:
    """Images of a class: its prototype under noise. Training, then test images and labels."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(90, 160, (NUM_CLASSES, SIDE, SIDE, 1))
    labels = rng.integers(0, NUM_CLASSES, num_train + NUM_TEST).astype(np.int32)
    noise = rng.normal(0, 30, (len(labels), SIDE, SIDE, 1))
    images = np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)
    return images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]


def draw(task: Task, num_networks: int) -> tuple[np.ndarray, ...]:
    """Depths, widths and dropout rates, as `universality.sample_architectures` distributes them."""
    rng = np.random.default_rng(1)
    low, high = np.log(task.width)
    return (
        rng.integers(1, 3, num_networks).astype(np.int32),
        np.round(np.exp(rng.uniform(low, high, num_networks))).astype(np.int32),
        rng.uniform(0, 0.5, num_networks).astype(np.float32),
    )


class Advjax:
    """Our side."""

    packages = ("advjax", "jax", "jaxlib", "flax", "optax")

    def __init__(self, threads: int):
        del threads
        import jax

        self.about: dict[str, Any] = {"backend": jax.default_backend()}

    def prepare(self, task: Task, order: dict):
        """`() -> networks`, which is timed, and `networks -> mean test accuracy`."""
        import jax

        import advjax
        from advjax import data, evaluation, universality

        images, labels, test_images, test_labels = make_data(order["num_train"])
        names = tuple(map(str, range(NUM_CLASSES)))
        train = data.Dataset(images, labels, NUM_CLASSES, "noise", "train", names)
        depth, width, dropout = draw(task, order["num_networks"])
        index = np.arange(len(depth), dtype=np.int32)
        architectures = universality.Architectures(index, depth, width, dropout)
        groups = universality.group_architectures(
            architectures, NUM_CLASSES, size=order["num_networks"]
        )

        def fit():
            return jax.block_until_ready(list(universality.train_architectures(
                jax.random.key(1), groups, train, num_epochs=order["num_epochs"],
                batch_size=order["batch_size"], method=order["method"],
            )))  # fmt: skip

        def measure(trained):
            x = test_images.astype(np.float32) / 255
            accuracies = []
            for group in trained:
                stack = advjax.bind(group.module, group.variables)
                accuracies.append(jax.vmap(lambda f: evaluation.accuracy(f, x, test_labels))(stack))
            return {"accuracy": float(np.mean(np.concatenate(accuracies)))}

        return fit, measure


class Torch:
    """A plain PyTorch loop over networks, epochs and batches."""

    packages = ("torch",)

    def __init__(self, threads: int):
        import torch

        self.torch, self.threads = torch, threads
        self.about: dict[str, Any] = {}

    def prepare(self, task: Task, order: dict):
        torch, nn = self.torch, self.torch.nn
        images, labels, test_images, test_labels = make_data(order["num_train"])
        x, y = (torch.from_numpy(part) for part in (images, labels))
        x, y = x.flatten(1).float() / 255, y.long()
        loss_fn = nn.CrossEntropyLoss()
        size = order["batch_size"]
        architectures = zip(*map(np.ndarray.tolist, draw(task, order["num_networks"])), strict=True)
        architectures = list(architectures)

        def train(depth, width, dropout, num_batches=None):
            sizes = [x.shape[1], *[width] * depth]
            layers = []
            for inputs, outputs in pairwise(sizes):
                layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
            net = nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))
            optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
            done = 0
            for _ in range(order["num_epochs"]):
                shuffled = torch.randperm(len(x))
                for start in range(0, len(x) - size + 1, size):
                    rows = shuffled[start : start + size]
                    optimizer.zero_grad()
                    loss_fn(net(x[rows]), y[rows]).backward()
                    optimizer.step()
                    done += 1
                    if done == num_batches:
                        return net
            return net.eval()

        # Small networks may be faster on one thread: the peer gets what suits it.
        times = {}
        for threads in dict.fromkeys((1, self.threads)):
            torch.set_num_threads(threads)
            train(2, task.width[1], 0.1, num_batches=3)
            stopwatch = common.Stopwatch()
            train(2, task.width[1], 0.1, num_batches=60)
            times[threads] = stopwatch.read()["wall"]
        torch.set_num_threads(min(times, key=times.__getitem__))

        def fit():
            return [train(*architecture) for architecture in architectures]

        def measure(nets):
            test = torch.from_numpy(test_images).flatten(1).float() / 255
            with torch.no_grad():
                answers = [net(test).argmax(1).numpy() for net in nets]
            return {"accuracy": float(np.mean([answer == test_labels for answer in answers]))}

        return fit, measure


def columns(line: turns.Line, lines: list[turns.Line]) -> dict[str, str]:
    """How well the networks learned."""
    del lines
    return {"accuracy": f"{line.found['accuracy']:.1%}"}


if __name__ == "__main__":
    turns.Benchmark(
        program=__file__, description=__doc__, title="Random networks against a PyTorch loop",
        stem="populations", tasks=TASKS, sides={"advjax": Advjax, "torch": Torch},
        contenders=(("advjax", "vmap"), ("advjax", "map"), ("torch", "loop")),
        settings={"num_networks": 32, "num_train": 2000, "num_epochs": 3, "batch_size": 64},
        smoke={"num_networks": 3, "num_train": 500}, columns=columns,
    ).main()  # fmt: skip
