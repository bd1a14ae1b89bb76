"""Between the loop and its observers: reads each step's metrics, averages, checks and reports."""

import math
import time
from collections.abc import Callable

from resflax.console import Console
from resflax.writers import MetricWriter


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is infinite or not a number."""


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
        """
        self._console = console
        self._writer = writer
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._learning_rate = learning_rate
        self._sums: dict[str, float] = {}
        self._count = 0
        self._seconds_per_step = 0.0
        self._compiled: set[int] = set()
        self.seconds = 0.0
        self._clock = time.monotonic()

    def epoch(self, step: int) -> float:
        """Epochs done after so many steps."""
        return step / self._steps_per_epoch

    def steps(self, step: int, metrics: list[dict[str, float]], waited: bool = False) -> None:
        """Takes the metrics of the updates of one call, which made the run `step` steps long.

        Args:
          step: the last of them.
          metrics: of each.
          waited: whether the devices had nothing to do until their data came: 'train/data_wait' is
            the share of such steps.

        Raises:
          NonFiniteError: if a loss or a gradient is not finite.
        """
        self._tick(len(metrics))
        for i, one in enumerate(metrics):
            self._step(step - len(metrics) + 1 + i, one | {"data_wait": float(waited)})

    def _step(self, step: int, metrics: dict[str, float]) -> None:
        # The gradient too: it spoils the parameters one step before the loss shows it, or for good
        # behind a ReLU that turns NaN into zero.
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(metrics[name]):
                raise NonFiniteError(
                    f"the {what} of step {step} (epoch {self.epoch(step):.2f}) is {metrics[name]}; "
                    "the last checkpoint is of an earlier step, and good. A lower config.optim.lr, "
                    "more config.optim.warmup_epochs or config.optim.clip_norm may help."
                )
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        means = {f"train/{name}": total / self._count for name, total in self._sums.items()}
        means["train/lr"] = float(self._learning_rate(step - 1))
        if self._seconds_per_step:
            means["train/seconds_per_step"] = self._seconds_per_step
            means["train/images_per_second"] = self._batch_size / self._seconds_per_step
        self._console.progress(step, self._total_steps, self.epoch(step), means)
        if step % self._every_steps == 0 or step == self._total_steps:
            if self._writer is not None:
                self._writer.write(step, self.epoch(step), means)
            self._sums, self._count = {}, 0

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
            f"epoch {self.epoch(step):6.2f}  step {step:>6}  eval loss {metrics['loss']:.4f}  "
            f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}{'  best' if is_best else ''}"
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
