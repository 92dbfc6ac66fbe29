"""Forms of `advjax.models.layers.conv2d` against `lax.conv_general_dilated`, as ratios of time.

    python benchmarks/conv.py [--repeats 5] [--shapes cnn1,cnn2]

Prints, per shape, the time of the "lax" form in milliseconds and then the speed of each form
relative to it (above 1 is faster), for the forward pass, the gradient with respect to the images
(attacks) and with respect to the kernel (training). Every measurement is one `fori_loop` of
several passes, because attacks and training are loops and XLA's CPU compiler treats the body of a
loop differently from the top level of a program. Forms take turns within a repeat, and the minimum
over the repeats counts, so other work on the machine disturbs little. Takes about fifteen minutes
on two cores, nearly all of it in the "lax" gradients. Recorded results: benchmarks/results/conv.md.
"""

import argparse
import os
import platform
import time

import jax
from jax import lax

from advjax.models import layers

# name: (batch, height, width, channels, features, kernel size, stride, groups)
SHAPES = {
    "cnn1": (512, 28, 28, 1, 16, 3, 1, 1),
    "cnn2": (512, 14, 14, 16, 32, 3, 1, 1),
    "stem3": (128, 32, 32, 3, 16, 3, 1, 1),
    "res16": (128, 32, 32, 16, 16, 3, 1, 1),
    "res16s2": (128, 32, 32, 16, 32, 3, 2, 1),
    "res32": (128, 16, 16, 32, 32, 3, 1, 1),
    "res64": (128, 8, 8, 64, 64, 3, 1, 1),
    "short64s2": (128, 16, 16, 32, 64, 1, 2, 1),
    "wide128": (32, 16, 16, 128, 128, 3, 1, 1),
    "wide512": (32, 4, 4, 512, 512, 3, 1, 1),
    "point": (128, 8, 8, 64, 128, 1, 1, 1),
    "depth3": (128, 16, 16, 64, 64, 3, 1, 64),
    "depth5s2": (128, 16, 16, 64, 64, 5, 2, 64),
    "digits1": (512, 8, 8, 1, 16, 3, 1, 1),
    "patch4": (128, 32, 32, 3, 64, 4, 4, 1),
}
FORMS = ("lax", "swapped", "crossed", "phases", "slices", "taps", "images", "auto")
PASSES = 2  # not 1, which XLA would take out of the loop
SLOW = 1.0  # seconds: a program as slow as this is timed once


def programs(shape, form):
    """(forward, image gradient, kernel gradient) as jitted loops, and their arguments."""
    b, h, w, c, features, size, stride, groups = shape
    key_x, key_k, key_g = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (b, h, w, c))
    kernel = jax.random.normal(key_k, (size, size, c // groups, features)) / size

    def conv(x, kernel):
        padding = 0 if size == stride else size // 2
        return layers.conv2d(x, kernel, strides=stride, padding=padding, groups=groups, form=form)

    g = jax.random.normal(key_g, jax.eval_shape(conv, x, kernel).shape)

    # Each pass depends on the one before, so that XLA cannot hoist it out of the loop.
    def forward(x, kernel, g):
        return lax.fori_loop(0, PASSES, lambda _, x: x + 1e-9 * conv(x, kernel).mean(), x)

    def grad_images(x, kernel, g):
        linear = jax.vjp(lambda x: conv(x, kernel), x)[1]
        return lax.fori_loop(0, PASSES, lambda _, g: g + 1e-9 * linear(g)[0].mean(), g)

    def grad_kernel(x, kernel, g):
        linear = jax.vjp(lambda k: conv(x, k), kernel)[1]
        return lax.fori_loop(0, PASSES, lambda _, g: g + 1e-9 * linear(g)[0].mean(), g)

    return [jax.jit(f) for f in (forward, grad_images, grad_kernel)], (x, kernel, g)


def seconds(f, args):
    """Wall time of one pass."""
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return (time.perf_counter() - start) / PASSES


def measure(shape, repeats):
    """{form: [forward, image gradient, kernel gradient] in seconds}."""
    ready, best = {}, {}
    for form in FORMS:
        functions, args = programs(shape, form)
        ready[form] = [f.lower(*args).compile() for f in functions], args
        best[form] = [seconds(f, args) for f in ready[form][0]]
    slow = {form: [t * PASSES > SLOW for t in best[form]] for form in FORMS}
    for form in FORMS:  # the first run was cold
        best[form] = [t if s else float("inf") for t, s in zip(best[form], slow[form], strict=True)]
    for _ in range(repeats):
        for form, (functions, args) in ready.items():
            for i, f in enumerate(functions):
                if not slow[form][i]:
                    best[form][i] = min(best[form][i], seconds(f, args))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
        f"{device.platform} {device.device_kind}, jax {jax.__version__}\n"
    )
    columns = [f"{form} {part}" for form in FORMS[1:] for part in ("f", "x", "k")]
    print("| shape | lax f, x, k (ms) | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name in args.shapes.split(","):
        best = measure(SHAPES[name], args.repeats)
        base = best["lax"]
        cells = [f"{base[i] / best[form][i]:.2f}" for form in FORMS[1:] for i in range(3)]
        times = ", ".join(f"{1e3 * t:.1f}" for t in base)
        print(f"| {name} | {times} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
