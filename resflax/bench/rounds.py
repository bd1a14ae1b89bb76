"""Contenders in turn, A B A B, so that what slows the machine for a while slows all of them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

# Before each turn: the threads of another library wait busily for a moment after their work.
PAUSE_SECONDS = 0.02

# Steps after the first that are not counted: until the memory that the process keeps is large
# enough, each of them has pages mapped anew, which can double its time.
WARM_UP = 6


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a contender costs beside the time of a step.

    Attributes:
      trace_seconds: from Python to what the compiler takes, where the two are apart.
      compile_seconds: of the compiler; None where nothing is compiled.
      memory: bytes at most in use, by who says so.
    """

    trace_seconds: float | None = None
    compile_seconds: float | None = None
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Contender(Protocol):
    """A network that is ready to run on its batch."""

    def run(self, steps: int) -> None:
        """Runs so many steps, one after the other, and waits for the last."""

    def costs(self) -> Costs:
        """Known once it has run."""


class Entry(NamedTuple):
    """A contender that is yet to be built, which may take minutes, or fail.

    Attributes:
      peer: whose network: 'resflax' or a peer's name.
      form: in which of several ways the peer computes it, or ''.
      build: allocates and compiles it.
    """

    peer: str
    form: str
    build: Callable[[], Contender]

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.peer} {self.form}".rstrip()


@dataclasses.dataclass
class Result:
    """What was measured of one contender.

    Attributes:
      peer, form: see Entry.
      seconds: of a step, in every round.
      single: whether it was so slow that its first step is all that was measured.
      failure: one line, where it did not run.
      costs: beside time.
    """

    peer: str
    form: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    single: bool = False
    failure: str = ""
    costs: Costs = dataclasses.field(default_factory=Costs)

    @property
    def median(self) -> float:
        """Of `seconds`."""
        return statistics.median(self.seconds)


class Ratio(NamedTuple):
    """A peer's time over ours, round by round: above 1 we are faster.

    Attributes:
      median: of the rounds.
      lower, upper: quartiles; None where the peer was measured once.
    """

    median: float
    lower: float | None
    upper: float | None


def ratio(ours: Result, theirs: Result) -> Ratio:
    """Compares the times of two contenders of the same rounds."""
    if theirs.single or ours.single:
        return Ratio(theirs.median / ours.median, None, None)
    ratios = [t / o for o, t in zip(ours.seconds, theirs.seconds, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, lower, upper)


def measure(
    entries: Sequence[Entry],
    *,
    repeats: int,
    steps: int,
    max_seconds: float,
    tell: Callable[[str], None],
) -> list[Result]:
    """Builds the contenders, and times them in turn.

    Args:
      entries: the contenders. Each is built and warmed up before the next is built.
      repeats: rounds, at least 2.
      steps: in a contender's turn; the time of one is the turn's, divided.
      max_seconds: a contender whose first step takes longer has no more turns.
      tell: is told what goes on.

    Returns:
      A result for each entry, in their order.
    """
    results: list[Result] = []
    running: list[tuple[Result, Contender]] = []
    for entry in entries:
        tell(f"{entry.name}: set-up")
        result = Result(entry.peer, entry.form)
        results.append(result)
        try:
            contender = entry.build()
            first = _seconds_per_step(contender, 1)
            if first <= max_seconds:
                contender.run(WARM_UP)
        except RuntimeError as error:  # out of memory; or its compiler failed
            result.failure = (str(error).strip() or type(error).__name__).splitlines()[0]
            tell(f"{entry.name} failed: {result.failure}")
            continue
        result.costs = contender.costs()
        if first > max_seconds:
            result.single, result.seconds = True, [first]
            continue
        running.append((result, contender))
    for number in range(1, repeats + 1):
        for result, contender in running:
            tell(f"round {number} of {repeats}: {result.peer} {result.form}".rstrip())
            time.sleep(PAUSE_SECONDS)
            result.seconds.append(_seconds_per_step(contender, steps))
    return results


def _seconds_per_step(contender: Contender, steps: int) -> float:
    start = time.perf_counter()
    contender.run(steps)
    return (time.perf_counter() - start) / steps
