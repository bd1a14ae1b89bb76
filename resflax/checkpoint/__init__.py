"""Checkpoints: saved while a run trains, verified, and restored to go on or into a script."""

from resflax.checkpoint.manifest import DamageError, facts
from resflax.checkpoint.restored import Run, restore_model
from resflax.checkpoint.saver import Checkpointer, SaveError, snapshot
from resflax.checkpoint.store import CheckpointError, configs

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamageError",
    "Run",
    "SaveError",
    "configs",
    "facts",
    "restore_model",
    "snapshot",
]
