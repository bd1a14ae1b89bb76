"""Several processes in one run: how they find each other, what they have, and what they agree on.

A process is started for each host or for each accelerator, all by the same command:

    python -m resflax.main ... --coordinator node1:5000 --num_processes 2 --process_id 0

or, where SLURM, Kubernetes, Open MPI or a Cloud TPU starts them, with --processes auto. The first
one, number 0, is the coordinator too. A process that fails tells the others, which print its error
and end with its exit code (see `together`). If a process is killed, jax ends the others
HEARTBEAT_SECONDS later and names it ("Task 1" is process 1, "the leader task" process 0).
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from resflax import compat
from resflax.errors import UserError

MODES = ("off", "auto", "manual")

# After so long without a sign of life a process is dead; and so long one that is done, or has
# failed, waits for the others to come to their end. Together under a minute.
HEARTBEAT_SECONDS = 25
SHUTDOWN_SECONDS = 25

# Seconds that the processes of a run have to end by themselves after one of them has failed.
GRACE_SECONDS = 5
_FAILURE = "resflax/failure"  # its key in the store that the processes share

# What an error of jax may mean beside what it says.
BROKEN = (
    "Perhaps another process of the run died: if so, jax says which one ('Task N'; 'the leader "
    f"task' is process 0) within {HEARTBEAT_SECONDS} s. The same command, in all processes, goes "
    "on from the last checkpoint."
)

# Bytes of the texts that processes tell each other.
_TEXT = 4096
_HOST = 256


class ProcessError(UserError):
    """The processes cannot run together; the message says why, and what to look at."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among several, where no scheduler tells it.

    Attributes:
      coordinator: HOST:PORT of process 0, where the others reach it.
      num_processes: of the run.
      process_id: of this one, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def __post_init__(self) -> None:
        """Raises ProcessError if there is no such place."""
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ProcessError(
                f"--coordinator {self.coordinator!r} must be HOST:PORT, such as node1:5000."
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ProcessError(
                f"--process_id {self.process_id} must be at least 0 and less than --num_processes "
                f"{self.num_processes}."
            )


def start(place: Place | None, seconds: int) -> None:
    """Waits until all processes of the run are there; before the first jax array.

    Args:
      place: of this process; None: as jax finds it under SLURM, Kubernetes, Open MPI, Cloud TPU.
      seconds: to wait; after that the process ends with one line and exit code 2, at once:
        what waits in jax cannot be interrupted, and would abort.

    Raises:
      ProcessError: if there is nothing to be found, or the coordinator cannot be started.
    """
    arguments = {} if place is None else dataclasses.asdict(place)
    if place is not None:
        arguments["coordinator_address"] = address = arguments.pop("coordinator")
        if _is_loopback(address):  # jax would listen on all interfaces, to whoever comes
            arguments["coordinator_bind_address"] = address
        # Each takes all accelerators it sees; only a scheduler's processes share those of a host.
        arguments["cluster_detection_method"] = "deactivate"
    with _patience(place, seconds):
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ProcessError(_why_not(place, error)) from None


def require_devices(expected: int | None = None) -> None:
    """Raises ProcessError if there are not as many as expected, or not as many in each process.

    Args:
      expected: devices of all processes; None: any number.
    """
    count = jax.device_count()
    if expected is not None and count != expected:
        raise ProcessError(
            f"{count} devices ({jax.devices()[0].device_kind}) answer in {jax.process_count()} "
            f"processes, --expect_devices {expected}: see that every process runs and sees its "
            "accelerators, or say how many are right."
        )
    local = collections.Counter(device.process_index for device in jax.devices())
    if len(set(local.values())) > 1:
        uneven = ", ".join(f"process {i} has {local[i]}" for i in sorted(local))
        raise ProcessError(f"every process must have as many devices as the others; {uneven}.")


def topology() -> str:
    """The processes, hosts and devices, to be read: a line, and one for each host."""
    hosts: dict[str, list[int]] = collections.defaultdict(list)
    for process, host in enumerate(_gather(socket.gethostname(), _HOST)):
        hosts[host].append(process)
    lines = [
        f"{jax.process_count()} processes, {jax.device_count()} devices "
        f"({jax.devices()[0].device_kind}), {jax.local_device_count()} in each process"
    ]
    for host, numbers in hosts.items():
        devices = len(numbers) * jax.local_device_count()
        names = ", ".join(map(str, numbers))
        lines.append(f"  {host}: {devices} devices, of processes {names}")
    return "\n".join(lines)


def on_first(do: Callable[[], object]) -> bool:
    """Runs something on the first process; if it refuses, all do.

    Args:
      do: that raises UserError if it cannot be.

    Returns:
      Whether what it returned there is true, on every process.

    Raises:
      UserError: on every process, with the message of the first one's.
    """
    refusal, result = "", False
    if jax.process_index() == 0:
        try:
            result = bool(do())
        except UserError as error:
            if jax.process_count() == 1:
                raise
            refusal = str(error)
    if jax.process_count() > 1:
        refusal = _gather(refusal, _TEXT)[0]
        if refusal:
            raise ProcessError(refusal)
    return agreed(result)


def agreed(value: bool) -> bool:
    """What the first process says, on all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def require_same(text: str, what: str) -> None:
    """Raises ProcessError, on every process, unless all have the same text.

    Args:
      text: of this process.
      what: it is, for the message.
    """
    digests = _gather(hashlib.sha256(text.encode()).hexdigest(), 64)
    different = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ProcessError(
            f"process {different[0]} has another {what} than process 0: start all of them with "
            "the same command."
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A context in which a process that fails ends all processes of the run.

    The failing process stores its error with `tell`. Each process then has GRACE_SECONDS to end by
    itself; after that it prints the error and ends with the failing process's exit code. Errors of
    jax's runtime are not told, and get the note BROKEN: usually they follow from the death of
    another process, and jax names that one.
    """
    if jax.process_count() == 1:
        yield
        return
    fate = _Fate(jax.process_index())
    listener = threading.Thread(target=fate.listen, daemon=True)
    listener.start()
    try:
        yield
    except Exception as error:
        if _is_of_runtime(error):
            if _failure() is not None:
                listener.join()  # which ends this process
            fate.ended.set()
            error.add_note(BROKEN)
            raise
        tell(type(error), error)
        # The caller reports the error, and jax's shutdown may wait for the other processes. The
        # listener, which has read the failure by then, ends this process.
        fate.reported.set()
        fate.sealed.wait(2)
        raise
    except BaseException:
        fate.ended.set()
        raise
    else:
        fate.ended.set()


class _Fate:
    """The end of one process of several: its own, or that of the one that failed first."""

    def __init__(self, process: int):
        """The process with this number runs."""
        self._process = process
        self.ended = threading.Event()  # the run is over
        self.reported = threading.Event()  # this process reports an error of its own
        self.sealed = threading.Event()  # a process has failed, and `listen` knows its error

    def listen(self) -> None:
        """Ends this process GRACE_SECONDS after one has failed; returns if the run ends before."""
        while (failure := _failure()) is None:
            if self.ended.wait(1):
                return
        self.sealed.set()
        number, code, text = json.loads(failure)
        # Process 0 holds the store, so it ends last.
        if self.ended.wait(GRACE_SECONDS if self._process else 2 * GRACE_SECONDS):
            return
        if not self.reported.is_set():
            print(f"error: process {number} failed: {text.strip()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def tell(kind: object, error: BaseException | None, _: object = None) -> None:
    """Stores an error where the other processes see it; an exit callback for an ExitStack.

    Args:
      kind: the class of the error; not used.
      error: that ends this process. None, errors of jax's runtime and requests to stop are not
        stored.
    """
    if not isinstance(error, Exception) or _is_of_runtime(error):
        return
    if jax.process_count() == 1:
        return
    is_bug = not isinstance(error, UserError | OSError)
    text = "".join(traceback.format_exception(error)) if is_bug else str(error)
    failure = json.dumps([jax.process_index(), 1 if is_bug else 2, text])
    # The store refuses a second failure, and all of them once the coordinator is gone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        compat.coordination_client().key_value_set(_FAILURE, failure)


def _is_of_runtime(error: Exception) -> bool:
    """Whether the error may come from a collective whose other side is gone."""
    # Where the value of an array is read, jax raises its status as a ValueError: 'UNKNOWN: Gloo'.
    is_status = isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error)) is not None
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        is_status and not isinstance(error, UserError)
    )


def _failure() -> str | None:
    """The error that a process of the run has stored; None if there is none."""
    client = compat.coordination_client()
    try:
        return client.key_value_try_get(_FAILURE) if client else None
    except jax.errors.JaxRuntimeError:  # there is no such key
        return None


def _gather(text: str, size: int) -> list[str]:
    """The texts of all processes, cut to so many bytes; by number."""
    data = np.zeros(size, np.uint8)
    encoded = np.frombuffer(text.encode()[:size], np.uint8)
    data[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(data)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextlib.contextmanager
def _patience(place: Place | None, seconds: int) -> Iterator[None]:
    """Ends the process, with a line, if what is done in it takes longer."""

    def give_up() -> None:
        print(f"error: {_who_is_missing(place, seconds)}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _who_is_missing(place: Place | None, seconds: int) -> str:
    address = place.coordinator if place else compat.coordinator_address()
    if address is None:
        return (
            f"--processes auto: the scheduler did not tell where process 0 is within {seconds} s."
        )
    if _answers(address):
        count = f"{place.num_processes} processes" if place else "processes"
        return (
            f"the coordinator {address} answers, but not all {count} came within {seconds} s "
            "(--start_seconds): see that each of them runs, with a --process_id of its own."
        )
    return (
        f"the coordinator {address} did not answer within {seconds} s (--start_seconds): see that "
        "process 0 runs, that the address is its host's as seen from here, and that no firewall "
        "closes the port."
    )


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except OSError:
        return False


def _why_not(place: Place | None, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    if place is None:
        return (
            f"--processes auto: jax finds no place for this process ({reason}); it looks for the "
            "variables of a SLURM step (srun), Open MPI, Kubernetes or a Cloud TPU. Elsewhere give "
            "--coordinator HOST:PORT --num_processes N --process_id I."
        )
    return f"--coordinator {place.coordinator}: {reason}"
