"""CIFAR's ResNets in PyTorch, which neither torchvision nor timm has. Needs torch."""

import dataclasses
from typing import Any

import flax.linen as nn
import torch
from torch.nn import functional

from resflax.errors import UserError
from resflax.models import residual
from resflax.models.resnet import ResNet

# Fields of a ResNet that the twin has too, or that change nothing but how ours is computed.
_KNOWN = {
    "stage_sizes", "num_classes", "block", "num_filters", "stem_filters", "cardinality",
    "base_width", "stride_in", "shortcut", "se_reduction", "bn_momentum", "bn_epsilon",
    "kernel_init", "zero_init_last", "form", "scan", "packed", "remat", "axis_name", "dtype",
    "parent", "name",
}  # fmt: skip


class Twin(torch.nn.Module):
    """The same network as ours, on images [N, C, H, W]; its modules have the names of ours.

    Args:
      model: a ResNet with the stem of 'cifar'.

    Raises:
      UserError: if that has something which the twin does not know.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not isinstance(model, ResNet) or model.stem != "cifar":
            raise UserError("it is no ResNet of CIFAR's")
        unknown = [
            f"{field.name}={getattr(model, field.name)!r}"
            for field in dataclasses.fields(model)
            if field.name not in _KNOWN | {"stem"} and getattr(model, field.name) != field.default
        ]
        if model.shortcut not in ("A", "B", "none"):
            unknown.append(f"shortcut={model.shortcut!r}")
        if unknown:
            raise UserError(f"its twin does not know {', '.join(unknown)}")
        channels = model.stem_filters or model.num_filters
        self.stem = _Stem(model, channels)
        blocks = []
        for stage, size in enumerate(model.stage_sizes, 2):
            for number in range(1, size + 1):
                branch = model.branch(stage, 2 if number == 1 and stage > 2 else 1)
                block = _Block(model, channels, branch)
                self.add_module(f"stage{stage}_block{number}", block)
                blocks.append(block)
                channels = branch[-1].filters
        # A plain list: as modules they have their names already.
        self._blocks = tuple(blocks)
        self.head = torch.nn.Linear(channels, model.num_classes)

    def forward(self, images: Any) -> Any:
        """[N, C, H, W] -> logits [N, num_classes]."""
        x = self.stem(images)
        for block in self._blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class _Stem(torch.nn.Module):
    def __init__(self, model: ResNet, channels: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = _norm(model, channels)

    def forward(self, images: Any) -> Any:
        return functional.relu(self.norm(self.conv(images)), inplace=True)


class _Block(torch.nn.Module):
    def __init__(self, model: ResNet, channels: int, branch: residual.Branch):
        super().__init__()
        stride = max(spec.stride for spec in branch)
        filters = branch[-1].filters
        self._layers = []
        width = channels
        for i, spec in enumerate(branch, 1):
            conv = torch.nn.Conv2d(
                width,
                spec.filters,
                spec.kernel_size,
                spec.stride,
                spec.kernel_size // 2,
                groups=spec.groups,
                bias=False,
            )
            norm = _norm(model, spec.filters)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", norm)
            self._layers.append((conv, norm))
            width = spec.filters
        self.se = _Gate(filters, model.se_reduction) if model.se_reduction else None
        self.shortcut = _shortcut(model, channels, filters, stride)

    def forward(self, x: Any) -> Any:
        y = x
        for conv, norm in self._layers[:-1]:
            y = functional.relu(norm(conv(y)), inplace=True)
        conv, norm = self._layers[-1]
        y = norm(conv(y))
        if self.se is not None:
            y = self.se(y)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return functional.relu(y, inplace=True)


class _Gate(torch.nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.squeeze = torch.nn.Linear(channels, channels // reduction)
        self.excite = torch.nn.Linear(channels // reduction, channels)

    def forward(self, y: Any) -> Any:
        gates = self.excite(functional.relu(self.squeeze(y.mean((2, 3)))))
        return y * torch.sigmoid(gates)[:, :, None, None]


class _ZeroPadded(torch.nn.Module):
    """Option A."""

    def __init__(self, more: int, stride: int):
        super().__init__()
        self._more, self._stride = more, stride

    def forward(self, x: Any) -> Any:
        return functional.pad(
            x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, 0, self._more)
        )


class _Projection(torch.nn.Module):
    def __init__(self, model: ResNet, channels: int, filters: int, stride: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, filters, 1, stride, bias=False)
        self.norm = _norm(model, filters)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))


def _shortcut(model: ResNet, channels: int, filters: int, stride: int) -> Any:
    if model.shortcut == "none":
        return None
    if stride == 1 and channels == filters:
        return torch.nn.Identity()
    if model.shortcut == "A":
        return _ZeroPadded(filters - channels, stride)
    return _Projection(model, channels, filters, stride)


def _norm(model: ResNet, channels: int) -> Any:
    return torch.nn.BatchNorm2d(channels, model.bn_epsilon, 1 - model.bn_momentum)
