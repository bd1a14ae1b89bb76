"""resflax: the residual-network laboratory for JAX.

model = resflax.create_model("se_resnext50_32x4d", num_classes=1000)
run = resflax.restore("runs/...")
logits = run.model.apply(run.variables, run.preprocess(images), train=False)
model, variables = resflax.from_torch("resnet50", "model.safetensors")
resflax.train_and_evaluate(config, "runs/mine", dataset={"train_images": images, ...})
"""

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from resflax.errors import UserError
from resflax.models import count, create_model, list_models
from resflax.process import (
    entry,  # noqa: F401  (first: what follows takes seconds to import)
    runtime,
)

if TYPE_CHECKING:
    import flax.linen as nn
    import ml_collections

    from resflax.checkpoint import Run
    from resflax.data.given import Given

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "count",
    "create_model",
    "from_keras",
    "from_torch",
    "list_models",
    "restore",
    "runtime",
    "to_torch",
    "train_and_evaluate",
]


def train_and_evaluate(
    config: "ml_collections.ConfigDict",
    workdir: str | pathlib.Path,
    *,
    dataset: "Given | None" = None,
) -> dict[str, float]:
    """Trains a network, or goes on with a run: see resflax.train.train_and_evaluate."""
    from resflax import train
    from resflax.process import arguments

    where = pathlib.Path(os.path.realpath(arguments.path(workdir)))
    return train.train_and_evaluate(config, where, dataset=dataset)


def restore(workdir: str | pathlib.Path, step: int | None = None, *, best: bool = False) -> "Run":
    """Restores the network of a run: see resflax.checkpoint.restore_model."""
    # Imported here: orbax takes longer to import than all networks, and few scripts need it.
    from resflax import checkpoint

    return checkpoint.restore_model(workdir, step, best=best)


def from_torch(
    name: str,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    num_classes: int | None = None,
    *,
    allow_pickle: bool = False,
    **overrides: Any,
) -> tuple["nn.Module", dict[str, Any]]:
    """A network with torchvision's or timm's weights: see resflax.interop.torch.from_torch."""
    from resflax.interop import torch

    return torch.from_torch(
        name, path_or_state_dict, num_classes, allow_pickle=allow_pickle, **overrides
    )


def from_keras(
    name: str,
    path: str | os.PathLike[str],
    num_classes: int | None = None,
    **overrides: Any,
) -> tuple["nn.Module", dict[str, Any]]:
    """A network with the weights of keras.applications: see resflax.interop.keras.from_keras."""
    from resflax.interop import keras

    return keras.from_keras(name, path, num_classes, **overrides)


def to_torch(
    model: "nn.Module", variables: dict[str, Any], library: str | None = None
) -> dict[str, Any]:
    """Weights as torchvision's or timm's network takes: see resflax.interop.torch.to_torch."""
    from resflax.interop import torch

    return torch.to_torch(model, variables, library)
