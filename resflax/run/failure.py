"""The step at which a run came to its end because of numbers that are not finite."""

import dataclasses
import json
import pathlib
import types
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from resflax.checkpoint import leaves
from resflax.data.pipeline import TrainBatches
from resflax.errors import UserError
from resflax.run import workdir as workdir_lib
from resflax.run.progress import NonFiniteError
from resflax.train_state import TrainState

FILE = workdir_lib.FAILURE


class FailureError(UserError):
    """There is no such record, or it cannot be read; the message says which."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is known of the step.

    Attributes:
      step: whose update was skipped, or after which a parameter was not finite; the first is 1.
      loss: of its batch, nats.
      grad_norm: of the gradient.
      indices: of the training examples in its batch, over all processes.
      key: data of the random key of the step.
      layer_norms: of the gradient, by the parameters' paths.
      array: path of the first parameter or running statistic that was not finite after the step,
        if an update spoilt it; None if the update was skipped.
    """

    step: int
    loss: float
    grad_norm: float
    indices: list[int]
    key: list[int]
    layer_norms: dict[str, float]
    array: str | None = None

    def write(self, workdir: pathlib.Path) -> pathlib.Path:
        """Leaves it in the run's directory; returns the file."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        workdir_lib.write_atomically(workdir / FILE, text)
        return workdir / FILE

    @classmethod
    def read(cls, workdir: pathlib.Path) -> Self:
        """That of a run.

        Raises:
          FailureError: if there is none.
        """
        try:
            return cls(**json.loads((workdir / FILE).read_text()))
        except FileNotFoundError:
            raise FailureError(f"{workdir} has no {FILE}: no step of this run failed.") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise FailureError(f"{workdir / FILE} cannot be read: {error}.") from None


def recorder(
    workdir: pathlib.Path, batches: TrainBatches, state: TrainState
) -> Callable[..., None]:
    """For an ExitStack: where a NonFiniteError ends it, its step is recorded.

    Args:
      workdir: of the run.
      batches: of its training data.
      state: of the run, any one; its key and its parameters' names are looked at.
    """
    names = list(leaves.by_path(state.params))
    # On the host: the state's arrays are given to the first step.
    key_data = np.asarray(jax.random.key_data(state.key))

    def record(
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if not isinstance(error, NonFiniteError) or jax.process_index() != 0:
            return
        key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(key_data)), error.step - 1)
        failure = Failure(
            step=error.step,
            loss=float(error.metrics["loss"]),
            grad_norm=float(error.metrics["grad_norm"]),
            indices=batches.indices(error.step),
            key=jax.random.key_data(key).tolist(),
            layer_norms=dict(
                zip(names, np.asarray(error.metrics["layer_norms"]).tolist(), strict=True)
            ),
            array=error.array,
        )
        try:
            said = f"{failure.write(workdir)} tells of the step, and --replay repeats it."
        except workdir_lib.WorkdirError as unwritten:
            said = str(unwritten)
        error.args = (f"{error} {said}",)

    return record
