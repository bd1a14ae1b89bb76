"""resflax: the residual-network laboratory for JAX.

model = resflax.create_model("se_resnext50_32x4d", num_classes=1000)
run = resflax.restore("runs/...")
logits = run.model.apply(run.variables, run.preprocess(images), train=False)
"""

import pathlib
from typing import TYPE_CHECKING

from resflax.models import count, create_model, list_models

if TYPE_CHECKING:
    from resflax.checkpoint import Run

__version__ = "0.1.0"
__all__ = ["count", "create_model", "list_models", "restore"]


def restore(workdir: str | pathlib.Path, step: int | None = None, *, best: bool = False) -> "Run":
    """Restores the network of a run: see resflax.checkpoint.restore_model."""
    # Imported here: orbax takes longer to import than all networks, and few scripts need it.
    from resflax import checkpoint

    return checkpoint.restore_model(workdir, step, best=best)
