"""advjax against PyTorch: the shares of the classes on planes through images (Model X-ray).

    PYTHONPATH=. python benchmarks/boundary.py
    PYTHONPATH=. python benchmarks/boundary.py --tasks=grey --num_planes=5
    PYTHONPATH=. python benchmarks/boundary.py --smoke        # does it run?

Prints a table and writes benchmarks/results/boundary_BACKEND.{md,csv,json}. All sides have the same
weights, images and planes and return the share of each class on each plane; how far their shares
are apart is part of the table. The narrow network is that of our own GTSRB zoo of seven attacks.
The peers:

- torch, in memory: the points of a plane as one tensor, then the network, 1,000 at a time;
- torch, loader: a Dataset that makes one point at a time, in a DataLoader with two workers, as the
  public programs do it. It is timed on the first plane alone, and its times are that of one plane
  times the number of planes.

PyTorch comes with `make peers`; without it only our times are printed. Five minutes on two idle CPU
cores.
"""

import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

# At the end of the path: a competitor's process starts without this folder.
sys.path.append(str(pathlib.Path(__file__).resolve().parent))
import turns


class Task(NamedTuple):
    """A CNN of two 3x3 convolutions with pooling, and dense 100."""

    title: str
    shape: tuple[int, int, int]
    num_classes: int
    features: tuple[int, int] = (16, 32)


TASKS = {
    "grey": Task("CNN, 28x28x1, 10 classes", (28, 28, 1), 10),
    "colour": Task("CNN, 32x32x3, 43 classes", (32, 32, 3), 43),
    # That of the zoo in launch/presets/zoo_gtsrb_seven.flags.
    "narrow": Task("CNN (8, 16), 32x32x3, 43 classes", (32, 32, 3), 43, (8, 16)),
}
EXPANSION = 5.0
BATCH = 1000


# ------------------------------------------------------------------------ a competitor's process


def make_weights(task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random ones, by layer: kernels as flax has them."""
    rng = np.random.default_rng(0)
    (height, width, channels), (one, two) = task.shape, task.features
    shapes = {
        "conv1": (3, 3, channels, one), "conv2": (3, 3, one, two),
        "dense1": (height // 4 * (width // 4) * two, 100), "dense2": (100, task.num_classes),
    }  # fmt: skip
    return {
        name: (
            rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32),
            rng.normal(0, 0.1, shape[-1]).astype(np.float32),
        )
        for name, shape in shapes.items()
    }


def make_triples(task: Task, num_planes: int) -> np.ndarray:
    """Three images a plane, f32[n, 3, h, w, c]."""
    rng = np.random.default_rng(1)
    return rng.uniform(0, 1, (num_planes, 3, *task.shape)).astype(np.float32)


def basis(triple: np.ndarray, density: int) -> tuple[np.ndarray, ...]:
    """Origin, directions and coordinates of a plane, in NumPy, for the peers."""
    origin, x2, x3 = triple.astype(np.float64)
    first = (x2 - origin) / np.linalg.norm(x2 - origin)
    along = np.sum((x3 - origin) * first)
    second = x3 - origin - along * first
    height = np.linalg.norm(second)
    corners = np.array([[0, 0], [np.linalg.norm(x2 - origin), 0], [along, height]])
    low, high = corners.min(0), corners.max(0)
    margin = EXPANSION * (high - low)
    grid = np.linspace(low - margin, high + margin, density, axis=1).astype(np.float32)
    parts = (origin, first, second / height)
    return *(part.astype(np.float32) for part in parts), *grid


def shares_of(shares: np.ndarray) -> dict:
    """What a side says: the shares on its planes."""
    return {"shares": shares.tolist()}


class Advjax:
    """Our side: all planes in one program, on one device or spread over the cores."""

    packages = ("advjax", "jax", "jaxlib", "flax")

    def __init__(self, threads: int):
        import os

        import jax

        from advjax import parallel

        if os.environ.get("JAX_PLATFORMS") == "cpu":
            parallel.use_cores(threads)
        self.about: dict[str, Any] = {"backend": jax.default_backend()}

    def prepare(self, task: Task, order: dict):
        import functools

        import jax

        import advjax
        from advjax import boundary, models, parallel

        weights = make_weights(task)
        params = {name: {"kernel": k, "bias": b} for name, (k, b) in weights.items()}
        model = models.make("cnn", task.num_classes, features=task.features)
        logits_fn = advjax.bind(model, {"params": params})
        triples = make_triples(task, order["num_planes"])
        mesh = parallel.make_mesh() if order["method"] == "cores" else None
        num_padded = parallel.padded(len(triples), mesh.size) if mesh else len(triples)
        x = parallel.place(np.resize(triples, (num_padded, *triples.shape[1:])), mesh, axis=0)

        @jax.jit
        def all_shares(logits_fn, x):
            def shares(triple):
                plane = boundary.plane(*triple, expansion=EXPANSION, density=order["density"])
                labels = boundary.label_map(logits_fn, plane, batch_size=BATCH)
                return boundary.region_shares(labels, task.num_classes)

            if mesh is None:
                return jax.lax.map(shares, x)
            parts = x.reshape(mesh.size, -1, *x.shape[1:])
            return jax.vmap(functools.partial(jax.lax.map, shares))(
                parallel.place(parts, mesh, axis=0)
            ).reshape(len(x), -1)

        logits_fn = parallel.place(logits_fn, mesh)
        return lambda: np.asarray(all_shares(logits_fn, x))[: len(triples)], shares_of


class Torch:
    """PyTorch, with the points in memory or from a loader."""

    packages = ("torch",)

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.torch = torch
        self.about: dict[str, Any] = {"threads": torch.get_num_threads()}

    def network(self, task: Task):
        torch = self.torch
        weights = make_weights(task)
        (height, width, channels), (one, two) = task.shape, task.features
        net = torch.nn.Sequential(
            torch.nn.Conv2d(channels, one, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(one, two, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(two * (height // 4) * (width // 4), 100), torch.nn.ReLU(),
            torch.nn.Linear(100, task.num_classes),
        )  # fmt: skip
        layers = [layer for layer in net if hasattr(layer, "weight")]
        for layer, (name, (kernel, bias)) in zip(layers, weights.items(), strict=True):
            if name == "dense1":  # flattened as h, w, c there and as c, h, w here
                maps = kernel.reshape(height // 4, width // 4, two, 100)
                kernel = maps.transpose(2, 0, 1, 3).reshape(-1, 100)
            order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            layer.weight.data = torch.from_numpy(kernel.transpose(order).copy())
            layer.bias.data = torch.from_numpy(bias)
        return net.eval()

    def prepare(self, task: Task, order: dict):
        torch = self.torch
        net, triples = self.network(task), make_triples(task, order["num_planes"])
        density = order["density"]

        def tensors(triple):
            origin, first, second, across, down = basis(triple, density)
            images = [
                torch.from_numpy(v.transpose(2, 0, 1).copy()) for v in (origin, first, second)
            ]
            return *images, torch.from_numpy(across), torch.from_numpy(down)

        def shares(labels):
            return np.bincount(labels, minlength=task.num_classes) / len(labels)

        def in_memory():
            found = []
            with torch.inference_mode():
                for triple in triples:
                    origin, first, second, across, down = tensors(triple)
                    a = across.repeat_interleave(density)[:, None, None, None]
                    b = down.repeat(density)[:, None, None, None]
                    points = origin + a * first + b * second
                    labels = [net(part).argmax(1) for part in points.split(BATCH)]
                    found.append(shares(torch.cat(labels).numpy()))
            return np.stack(found)

        class Points(torch.utils.data.Dataset):
            def __init__(self, triple):
                self.parts = tensors(triple)

            def __len__(self):
                return density**2

            def __getitem__(self, index):
                origin, first, second, across, down = self.parts
                return origin + across[index // density] * first + down[index % density] * second

        def loader():
            points = torch.utils.data.DataLoader(Points(triples[0]), batch_size=500, num_workers=2)
            with torch.inference_mode():
                labels = [net(part).argmax(1) for part in points]
            return shares(torch.cat(labels).numpy())[None]

        if order["method"] == "in memory":
            return in_memory, shares_of
        return loader, lambda shares: {**shares_of(shares), "scale": len(triples)}


def columns(line: turns.Line, lines: list[turns.Line]) -> dict[str, str]:
    """How much faster than the loader, and how far the shares are from PyTorch's in memory."""
    by_method = {other.method: other for other in lines}
    reference = np.array(by_method.get("in memory", lines[0]).found["shares"])
    shares = np.array(line.found["shares"])
    loader = by_method.get("loader")
    return {
        "loader / this, wall": f"{loader.wall / line.wall:.1f}" if loader else "",
        "shares apart": f"{np.abs(shares - reference[: len(shares)]).max():.1e}",
    }


if __name__ == "__main__":
    turns.Benchmark(
        program=__file__, description=__doc__, title="Planes of Model X-ray against PyTorch",
        stem="boundary", tasks=TASKS, sides={"advjax": Advjax, "torch": Torch},
        contenders=(
            ("advjax", "map"), ("advjax", "cores"), ("torch", "in memory"), ("torch", "loader"),
        ),
        settings={"num_planes": 20, "density": 100}, smoke={"num_planes": 2, "density": 20},
        columns=columns,
    ).main()  # fmt: skip
