"""Checkpoints: saved while a run trains, verified, and restored to go on or into a script."""

from resflax.checkpoint.leaves import not_finite
from resflax.checkpoint.manifest import DamageError, facts
from resflax.checkpoint.origin import of_run
from resflax.checkpoint.restored import Run, restore_model
from resflax.checkpoint.saver import Checkpointer, SaveError, snapshot, spoilt
from resflax.checkpoint.store import CheckpointError, configs, quality

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamageError",
    "Run",
    "SaveError",
    "configs",
    "facts",
    "not_finite",
    "of_run",
    "quality",
    "restore_model",
    "snapshot",
    "spoilt",
]
