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
    import optax

    from resflax.checkpoint import Run
    from resflax.data.given import Given
    from resflax.losses import Distillation, Loss

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


def restore(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    *,
    best: bool = False,
    config_file: str | None = None,
    model: "nn.Module | None" = None,
) -> "Run":
    """Restores the network of a run: see resflax.checkpoint.restore_model.

    Args:
      workdir: of the run; nothing in it is imported.
      step: of the checkpoint; None: the latest that is not damaged.
      best: instead of the latest, the one with the best evaluation.
      config_file: FILE.py that the run was made with, if that defines get_model: see resflax.parts.
      model: instead, the network itself.

    Raises:
      UserError: if there is no such run or checkpoint, or it is of another network.
    """
    # Imported here: orbax takes longer to import than all networks, and few scripts need it.
    from resflax import checkpoint
    from resflax.parts import Parts

    if config_file is not None and model is not None:
        raise UserError("restore: config_file and model exclude each other.")
    parts = Parts.of_objects(model=model) if config_file is None else Parts.of_file(config_file)
    return checkpoint.restore_model(pathlib.Path(workdir), step, best=best, parts=parts)


def train_and_evaluate(
    config: "ml_collections.ConfigDict",
    workdir: str | os.PathLike[str],
    model: "nn.Module | None" = None,
    loss: "Loss | Distillation | None" = None,
    optimizer: "optax.GradientTransformation | None" = None,
    dataset: "Given | None" = None,
) -> dict[str, float]:
    """Trains the network that a config describes, or goes on where `workdir` stopped.

    Args:
      config: see resflax.config.
      workdir: the run's directory; the same one resumes, with the same parts.
      model: a network of one's own, instead of the one of `config.model`: a flax.linen module,
        (images [N, H, W, C], train=...) -> logits [N, K].
      loss: from logits [N, K] and targets, classes [N] or probabilities [N, K], to [N].
      optimizer: that takes mean gradients; its learning rate is its own.
      dataset: images and labels, instead of those of `config.data`: see resflax.data.given.

    Returns:
      'eval/loss' (nats), 'eval/top1' and 'eval/top5' (fractions) after the last step, 'best/top1'
      and 'best/step', and 'seconds'.

    Raises:
      UserError: for bad input; nothing was overwritten. See resflax.train.train_and_evaluate.
    """
    from resflax import train
    from resflax.data import given
    from resflax.parts import Parts
    from resflax.process import arguments

    folder = pathlib.Path(os.path.realpath(arguments.path(pathlib.Path(workdir))))
    parts = Parts.of_objects(model, loss, optimizer, dataset)
    return train.train_and_evaluate(given.described(config, dataset), folder, parts)


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
