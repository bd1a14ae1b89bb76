"""Between the loop and its observers: reads each step's metrics, averages, checks and reports."""

import collections
import math
import time
from collections.abc import Callable
from typing import Any

from resflax import metrics as metrics_lib
from resflax.errors import UserError
from resflax.run.console import Console
from resflax.run.writers import MetricWriter

# A loss above the mean of as many before it by so many of their standard deviations is a spike.
_WINDOW = 100
_SPIKE = 6.0

_NAMES = {"loss": "loss", "grad_norm": "norm of the gradient"}

_ADVICE = (
    "A lower config.optim.lr, more config.optim.warmup_epochs or config.optim.clip_norm may help."
)


class NonFiniteError(UserError, ArithmeticError):
    """The loss or the gradient of a step is not finite, once too often, or a parameter after it.

    Attributes:
      step: whose update was skipped, or after which the parameter was found.
      metrics: of the step.
      array: path of the parameter; None where an update was skipped.
    """

    def __init__(self, message: str, step: int, metrics: dict[str, Any], array: str | None = None):
        super().__init__(message)
        self.step = step
        self.metrics = metrics
        self.array = array


class Progress:
    """Follows a run step by step.

    Attributes:
      seconds: spent in steps, evaluation and saving left out.
    """

    def __init__(
        self,
        console: Console,
        writer: MetricWriter | None,
        learning_rate: Callable[[int], float],
        *,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        every_steps: int,
        num_classes: int = 1000,
        max_skips: int = 0,
    ):
        """Starts the clock.

        Args:
          console: shows every step.
          writer: takes the means of every `every_steps` steps; None: nobody does.
          learning_rate: of the update that follows so many steps.
          total_steps: steps of the run.
          steps_per_epoch: steps in an epoch.
          batch_size: images a step.
          every_steps: steps between two lines of metrics.
          num_classes: of the data set.
          max_skips: updates that may be skipped, in the whole run.
        """
        self._console = console
        self._writer = writer
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._num_classes = num_classes
        self._learning_rate = learning_rate
        self._max_skips = max_skips
        self._last: dict[str, Any] = {}
        self._losses = _Window()
        self._sums: dict[str, float] = {}
        self._count = 0
        self._seconds_per_step = 0.0
        self._compiled: set[int] = set()
        self._look: dict[str, float] = {}
        self.seconds = 0.0
        self._clock = time.monotonic()

    def epoch(self, step: int) -> float:
        """Epochs done after so many steps."""
        return step / self._steps_per_epoch

    def steps(self, step: int, metrics: list[dict[str, Any]], waited: bool = False) -> None:
        """Takes the metrics of the updates of one call, which made the run `step` steps long.

        Args:
          step: the last of them.
          metrics: of each.
          waited: whether the devices had nothing to do until their data came: 'train/data_wait' is
            the share of such steps.

        Raises:
          NonFiniteError: if a loss or a gradient is not finite, and more updates than may be were
            skipped.
        """
        self._tick(len(metrics))
        self._last = metrics[-1]
        for i, one in enumerate(metrics):
            self._step(step - len(metrics) + 1 + i, one | {"data_wait": float(waited)})

    def parameters(self, step: int, not_finite: str | None) -> None:
        """Takes what was found of the parameters after a step, before they are evaluated or saved.

        Args:
          step: the last one whose metrics were taken.
          not_finite: path of the first array that has a number that is not finite, if any.

        Raises:
          NonFiniteError: if there is such an array.
        """
        if not_finite is not None:
            raise NonFiniteError(
                f"{not_finite} is not finite after step {step} (epoch {self.epoch(step):.2f}): an "
                f"update was too large. The state is not saved. {_ADVICE}",
                step,
                self._last,
                not_finite,
            )

    def look(self, step: int, numbers: dict[str, float]) -> None:
        """Takes what was seen of the network's blocks after a step, for the next line of metrics.

        Args:
          step: as 'analysis/step'.
          numbers: written as 'analysis/...'.
        """
        named = {f"analysis/{name}": value for name, value in numbers.items()}
        self._look = {"analysis/step": step, **named}

    def _step(self, step: int, metrics: dict[str, Any]) -> None:
        skipped = int(metrics["skipped"])
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            self._not_finite(step, skipped, metrics)
        else:
            self._flag_spike(step, metrics["loss"])
            for name, value in metrics.items():
                if name not in ("layer_norms", "skipped"):
                    self._sums[name] = self._sums.get(name, 0.0) + value
            self._count += 1
        means = {f"train/{name}": total / self._count for name, total in self._sums.items()}
        if skipped:
            means["train/skipped"] = skipped
        means["train/lr"] = float(self._learning_rate(step - 1))
        if self._seconds_per_step:
            means["train/seconds_per_step"] = self._seconds_per_step
            means["train/images_per_second"] = self._batch_size / self._seconds_per_step
        self._console.progress(step, self._total_steps, self.epoch(step), means)
        if step % self._every_steps == 0 or step == self._total_steps:
            if self._writer is not None:
                self._writer.write(step, self.epoch(step), means | self._look)
            self._look = {}
            self._sums, self._count = {}, 0

    def _not_finite(self, step: int, skipped: int, metrics: dict[str, Any]) -> None:
        name = next(name for name in _NAMES if not math.isfinite(metrics[name]))
        said = (
            f"the {_NAMES[name]} of step {step} (epoch {self.epoch(step):.2f}) is {metrics[name]}"
        )
        if skipped > self._max_skips:
            raise NonFiniteError(
                f"{said}; its update was skipped, and config.train.max_skips is "
                f"{self._max_skips}. {_ADVICE}",
                step,
                metrics,
            )
        self._console.print(
            f"{said}; its update was skipped: {skipped} of at most {self._max_skips}."
        )

    def _flag_spike(self, step: int, loss: float) -> None:
        losses = self._losses
        if losses.is_full and loss > losses.mean + _SPIKE * losses.deviation:
            self._console.print(
                f"the loss of step {step} (epoch {self.epoch(step):.2f}) jumped to {loss:.4f}, "
                f"from {losses.mean:.4f} in the {_WINDOW} steps before."
            )
        losses.append(loss)

    def evaluation(
        self, step: int, metrics: dict[str, float], is_best: bool, bad_images: int = 0
    ) -> None:
        """Reports an evaluation, and leaves the time it took out of the throughput.

        Args:
          step: that it was after.
          metrics: what came out.
          is_best: whether no evaluation was better.
          bad_images: that this process could not read so far.
        """
        if self._writer is not None:
            values = {f"eval/{name}": value for name, value in metrics.items()}
            if bad_images:
                values["data/bad_images"] = bad_images
            self._writer.write(step, self.epoch(step), values)
        self._console.print(
            f"epoch {self.epoch(step):6.2f}  step {step:>6}  "
            f"{metrics_lib.line(metrics, self._num_classes)}{'  best' if is_best else ''}"
        )
        self._clock = time.monotonic()

    def _tick(self, count: int) -> None:
        now = time.monotonic()
        elapsed, self._clock = now - self._clock, now
        self.seconds += elapsed
        if count not in self._compiled:  # the first call of a length
            self._compiled.add(count)
        elif not self._seconds_per_step:
            self._seconds_per_step = elapsed / count
        else:
            self._seconds_per_step += 0.1 * (elapsed / count - self._seconds_per_step)


class _Window:
    """The last numbers of a series, with their mean and deviation in constant time.

    Attributes:
      mean: of the numbers.
    """

    def __init__(self) -> None:
        self._values: collections.deque[float] = collections.deque()
        self.mean = 0.0
        self._squares = 0.0  # sum of the squared distances from the mean

    @property
    def is_full(self) -> bool:
        """Whether there are as many as count."""
        return len(self._values) == _WINDOW

    @property
    def deviation(self) -> float:
        """Their standard deviation."""
        return math.sqrt(max(0.0, self._squares) / len(self._values))

    def append(self, value: float) -> None:
        """Adds a number, in the place of the oldest where the window is full.

        Welford's update (1962), which, unlike a sum of squares, keeps the deviation of numbers that
        differ little.
        """
        if not self.is_full:
            self._values.append(value)
            step = value - self.mean
            self.mean += step / len(self._values)
            self._squares += step * (value - self.mean)
            return
        old, mean = self._values.popleft(), self.mean
        self._values.append(value)
        self.mean += (value - old) / _WINDOW
        self._squares += (value - old) * (value - self.mean + old - mean)
