"""Several processes of one run on this machine: what a cluster does, without one.

python -m launch.local --processes 2 --devices 4 -- python -m resflax.main --config FILE.py ...

Each process has so many host devices, and is told of the others by flags at the end of its command.
What it prints has its number in front. When one of them fails, the others are stopped. Exit code:
that of the first that failed, 128 and the number of the signal if one ended it, or 2 for bad input.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from launch import signals
from resflax.process.arguments import Parser, fail

# jax.distributed takes SIGTERM for the notice of a preemption, and a process that waits for a lost
# one does not come to act on it: after so many seconds SIGKILL follows.
_STAGES = ((signal.SIGTERM, 20.0),)

# Seconds that the others have to end by themselves, where all were asked to.
_GRACE = 20.0

_DEVICES_FLAG = "--xla_force_host_platform_device_count"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line's command in so many processes; returns the exit code."""
    options = _parser().parse_args(argv)
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if xla_flags and not xla_flags.lstrip().startswith("-"):
        fail(f"XLA_FLAGS names a file, {xla_flags}; give it the flags themselves.")
    coordinator = f"127.0.0.1:{_free_port()}"
    with signals.noted() as received:
        processes: list[subprocess.Popen[str]] = []
        environment = os.environ | host_devices(options.devices, xla_flags)
        for i in range(options.processes):
            command = [*options.command, *membership(coordinator, options.processes, i)]
            try:
                processes.append(_start(command, environment))
            except OSError as error:
                signals.end(processes, _STAGES, received)
                fail(f"{command[0]}: {error.strerror}.")
        readers = [thread for i, process in enumerate(processes) for thread in _relay(i, process)]
        code = _wait(processes, received)
        for reader in readers:
            reader.join(timeout=10.0)  # what a process has started may keep its output open
    return code


def membership(coordinator: str, num_processes: int, process_id: int) -> list[str]:
    """The flags that tell resflax.main of the other processes; none to a single one.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: in all.
      process_id: of this one, from 0.
    """
    if num_processes == 1:
        return []
    return [
        f"--coordinator={coordinator}",
        f"--num_processes={num_processes}",
        f"--process_id={process_id}",
    ]


def host_devices(count: int, xla_flags: str = "") -> dict[str, str]:
    """The environment in which jax has so many devices on the CPU.

    Args:
      count: of devices.
      xla_flags: to be kept.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",  # lines come when they are printed
        "XLA_FLAGS": f"{xla_flags} {_DEVICES_FLAG}={count}".strip(),
    }


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch.local",
        usage="%(prog)s --processes N --devices M -- COMMAND ...",
        description=__doc__.partition(":")[0] + ".",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--processes", type=_count, default=1, metavar="N", help="how many; default: 1")
    add("--devices", type=_count, default=1, metavar="M", help="of each process; default: 1")
    add("command", nargs="+", metavar="COMMAND", help="such as python -m resflax.main ...")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more.")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # so that Ctrl-C comes to it from here alone, once
    )


def _relay(number: int, process: subprocess.Popen[str]) -> list[threading.Thread]:
    """Passes on what a process prints, with its number in front of each line."""

    def read(source: IO[str], target: IO[str]) -> None:
        try:
            for line in source:
                target.write(f"[{number}] {line.rstrip()}\n")  # in one piece
                target.flush()
        except BrokenPipeError:  # nobody reads on: neither do we, and the process will notice
            source.close()

    streams = [(process.stdout, sys.stdout), (process.stderr, sys.stderr)]
    threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in streams]
    for thread in threads:
        thread.start()
    return threads


def _wait(processes: Sequence[subprocess.Popen[str]], received: Sequence[int]) -> int:
    """Waits for all, passes signals on, and stops the others when one has failed.

    Returns:
      The exit code.
    """
    failed: dict[int, int] = {}  # codes by process, of those that failed first
    passed_on, deadline = 0, math.inf
    while True:
        codes = [process.poll() for process in processes]
        if not failed and any(codes):
            failed = {i: code for i, code in enumerate(codes) if code}
            _tell(failed, alive=None in codes)
            # Those that were asked to stop may be about to.
            deadline = time.monotonic() + (_GRACE if received else 0.0)
        if None not in codes:
            break
        for number in received[passed_on:]:
            passed_on += 1
            for process in processes:
                process.send_signal(number)
        if time.monotonic() >= deadline:
            signals.end(processes, _STAGES, received)
        time.sleep(signals.POLL)
    code = next(iter(failed.values()), 0)
    return code if code >= 0 else 128 - code


def _tell(failed: Mapping[int, int], *, alive: bool) -> None:
    endings = (f"process {i} {signals.ending(code)}" for i, code in failed.items())
    others = "; the others are stopped" if alive else ""
    print(f"{', '.join(endings)}{others}.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
