"""Which steps of a run are dispatched together, and after which it is evaluated and saved."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Calendar:
    """The steps of a run.

    Attributes:
      total_steps: of the whole run.
      steps_per_epoch: of its data.
      steps_per_call: dispatched together where nothing is due before.
      eval_epochs: between evaluations.
      save_epochs: between checkpoints, each of which is evaluated.
    """

    total_steps: int
    steps_per_epoch: int
    steps_per_call: int
    eval_epochs: int
    save_epochs: int

    def saves(self, step: int) -> bool:
        """Whether the state after a step is saved."""
        return self._due(step, self.save_epochs)

    def evaluates(self, step: int) -> bool:
        """Whether the state after a step is evaluated."""
        return self.saves(step) or self._due(step, self.eval_epochs)

    def calls(self, step: int) -> Iterator[int]:
        """How many steps each dispatch takes, after a step.

        `steps_per_call`; where an evaluation, a checkpoint or the end is nearer than that, one: so
        there are two programs to compile, whatever the lengths of epochs and runs.
        """
        intervals = [e * self.steps_per_epoch for e in (self.eval_epochs, self.save_epochs)]
        while step < self.total_steps:
            left = [steps - step % steps for steps in intervals]
            fits = self.steps_per_call <= min(*left, self.total_steps - step)
            count = self.steps_per_call if fits else 1
            yield count
            step += count

    def _due(self, step: int, epochs: int) -> bool:
        return step % (epochs * self.steps_per_epoch) == 0 or step == self.total_steps
