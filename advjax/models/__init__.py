"""Networks by name: `models.make(name, num_classes)` gives a flax module, images to logits.

Every model maps images f32[b, h, w, c] in [0, 1] to logits f32[b, k] and normalises inside
(fields `mean` and `std`). `module.apply(variables, x)` is the inference mode; `train=True` uses
batch statistics and dropout. Half-precision images meet float32 weights and give float32 logits;
with half-precision weights too, the logits are half precision.
"""

import dataclasses
from typing import Any

import flax.linen as nn

from advjax.core import checks
from advjax.models.alexnet import AlexNet
from advjax.models.mobilenet import NANO, MobileNetV3
from advjax.models.resnet import PreActResNet, ResNet
from advjax.models.small import CNN, MLP, from_reference_npz
from advjax.models.vgg import VGG
from advjax.models.vit import ViT

_BUILDERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mlp": (MLP, {}),
    "cnn": (CNN, {}),
    "resnet20": (ResNet, {}),
    "vgg16": (VGG, {}),
    "preact_resnet18": (PreActResNet, {}),
    "preact_resnet34": (PreActResNet, {"stages": (3, 4, 6, 3)}),
    "mobilenet_v3_large": (MobileNetV3, {}),
    "vit_b16": (ViT, {}),
    # The networks of the federated studies; mlp_512 is 784-512-10 on MNIST, whose mean
    # and deviation it takes off.
    "mlp_512": (MLP, {"hidden": (512,), "mean": 0.1307, "std": 0.3081}),
    "cnn_512": (CNN, {"hidden": 512}),
    "alexnet": (AlexNet, {}),
    # Small relatives for CPUs and tests; they also fit the 8x8 digits.
    "resnet8": (ResNet, {"blocks": 1}),
    "vgg_nano": (VGG, {"stages": ((32,), (64,), (128,))}),
    "preact_resnet_nano": (PreActResNet, {"stages": (1, 1, 1), "width": 16}),
    "mobilenet_v3_nano": (MobileNetV3, {"blocks": NANO, "last": 256, "total_stride": 4}),
    "vit_nano": (
        ViT,
        {"patch": 4, "width": 64, "depth": 4, "heads": 4, "mlp_width": 128},
    ),
}

NAMES = tuple(_BUILDERS)

__all__ = ["NAMES", "from_reference_npz", "make"]


def make(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network by name.

    Args:
        name: one of `NAMES`.
        num_classes: number of logits.
        **options: fields of the network, among them `mean=` and `std=` (numbers, or one per
            channel); the defaults come with the name.

    Returns:
        A flax linen module: `variables = module.init(key, x)`, `logits = module.apply(variables,
        x)`.

    Raises:
        ValueError: unknown name or option, or fewer than one class.

    Example:
        >>> import jax
        >>> from advjax import models
        >>> net = models.make("cnn", 10)
        >>> x = jax.numpy.zeros((1, 8, 8, 1))
        >>> net.apply(net.init(jax.random.key(0), x), x).shape
        (1, 10)
    """
    if name not in _BUILDERS:
        raise ValueError(f"make: unknown model {name!r}; known: {', '.join(NAMES)}.")
    checks.at_least("make", "num_classes", num_classes, 1)
    module, defaults = _BUILDERS[name]
    known = [
        f.name
        for f in dataclasses.fields(module)
        if f.name not in ("num_classes", "parent", "name")
    ]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"make: model {name!r} has no option {unknown[0]!r}; known: {', '.join(known)}."
        )
    return module(num_classes=num_classes, **{**defaults, **options})
