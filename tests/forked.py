"""Command lines in processes that begin with the libraries imported, which takes seconds else.

They are real processes: what is set up before the first array, signals and exit codes are those of
`python -m MODULE`.
"""

import multiprocessing
import multiprocessing.util
import os
import pathlib
import runpy
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["resflax.train", "resflax.run.replay", "resflax.process.command"])
# Now, before a test sets a folder for temporary files whose name is too long for a socket's path.
multiprocessing.util.get_temp_dir()


def xla_flags(devices=1):
    """Those of this process, with another number of host devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


class Result(NamedTuple):
    """What a process left."""

    code: int
    output: str
    errors: str


class Process:
    """A command line at work.

    Args:
      module: what `python -m` is given, or "-c".
      *arguments: of the command line, or the program.
      environment: variables beside those of this process.
    """

    def __init__(self, module, *arguments, environment=None):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [pathlib.Path(self._folder.name, name) for name in ("output", "errors")]
        environment = {**os.environ, "XLA_FLAGS": xla_flags(), **(environment or {})}
        arguments = [str(argument) for argument in arguments]
        target = CONTEXT.Process(target=_run, args=(module, arguments, environment, self._files))
        target.start()
        self._process = target
        self.pid = target.pid

    @property
    def ended(self):
        return self._process.exitcode is not None

    @property
    def output(self):
        return self._files[0].read_text()

    def send(self, number):
        os.kill(self.pid, number)

    def wait_for(self, path, seconds=100):
        """Returns once there is such a file."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert not self.ended, self.finish()
            assert time.monotonic() < deadline, f"{path} has not come in {seconds} s"
            time.sleep(0.005)

    def finish(self, seconds=120):
        """The result, once it has ended, as it must within so many seconds."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        texts = [file.read_text() for file in self._files]
        self._folder.cleanup()
        assert code is not None, f"it goes on after {seconds} s: {texts}"
        return Result(code, *texts)


def run(module, *arguments, environment=None):
    """The result of a command line."""
    return Process(module, *arguments, environment=environment).finish()


def _run(module, arguments, environment, files):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    if module == "-c":
        exec(arguments[0], {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
