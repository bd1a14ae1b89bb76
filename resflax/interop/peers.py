"""torchvision and timm beside us: imported, and their networks filled with telling numbers.

For comparisons only; reading and writing weights needs neither library.
"""

import contextlib
import importlib
from typing import Any

# Declarations live as long as this does.
_declared: list[Any] = []


def load(library: str) -> Any:
    """Imports torchvision or timm (which imports torchvision), whatever the build of torch.

    torchvision has operators of detectors in a compiled part that must match the build of torch;
    beside another build, one for CPUs say, its import fails. Classifiers do not use them, so that
    their declaration is enough.
    """
    import torch

    with contextlib.suppress(RuntimeError):
        return importlib.import_module(library)
    if not _declared:
        _declared.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _declared[0].define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return importlib.import_module(library)


def build(library: str, name: str, **arguments: Any) -> Any:
    """A network of a library, with random weights of its own."""
    if library == "timm":
        return load("timm").create_model(name, **arguments)
    models = load("torchvision").models
    if name in ("googlenet", "inception_v3"):
        # Its initialisation takes long, and is replaced here anyway.
        arguments = {"init_weights": False, **arguments}
    return models.get_model(name, **arguments)


def fill(network: Any, image_size: int = 128, seed: int = 0) -> Any:
    """Fills a network with random numbers under which a mistake in its copy shows in the logits.

    No array is constant, scales of both signs included (a pool before such a norm is another than
    the one after), and the signal neither dies nor grows, however deep the network: norms have,
    nearly, the statistics of random images.

    Args:
      network: a torch module, from NCHW images to logits; it is changed, and left in evaluation
        mode.
      image_size: of those images, pixels.
      seed: of torch's generator.
    """
    import torch
    from torch import nn

    torch.manual_seed(seed)
    norms: list[Any] = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    # Residual branches as strong as their shortcuts make a deep network chaotic: it would magnify
    # the rounding of float32 a thousand times.
    blocks = [m for m in network.modules() if hasattr(m, "downsample")]
    last = [getattr(b, "bn3", getattr(b, "bn2", None)) for b in blocks]
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                signs = torch.where(torch.rand_like(module.weight) < 0.25, -1.0, 1.0)
                module.weight.uniform_(0.7, 1.3).mul_(signs)
                if module in last:
                    module.weight.mul_(0.3)
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.normal_(0, 0.2)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        network.train()(torch.randn(8, 3, image_size, image_size))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            deviation = norm.running_var.sqrt()
            norm.running_mean += 0.2 * deviation * torch.randn_like(deviation)
            norm.running_var *= torch.empty_like(deviation).uniform_(0.7, 1.4)
    return network.eval()
