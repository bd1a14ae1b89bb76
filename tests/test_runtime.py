import os
import platform
import subprocess
import sys
import types

import pytest

from resflax.process import runtime

FLAG = "--xla_cpu_experimental_ynn_fusion_type="

# Convolutions that take a quarter of a second to compile, and what became of them.
PROGRAM = """
import jax
from jax import numpy as jnp
from resflax import runtime
runtime.configure()

def network(x):
    for _ in range(20):
        kernel = jnp.ones((3, 3, x.shape[-1], x.shape[-1] + 1))
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        x = jnp.sort(x, axis=1)
    return x

compiled = jax.jit(network).lower(jnp.ones((8, 16, 16, 16))).compile()
print("ynn" in compiled.as_text(), jax.config.jax_compilation_cache_dir)
"""


def start(tmp_path, **environment):
    """Whether a process's convolutions are YNNPACK's, its cache, and what it wrote to stderr."""
    unset = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    defaults = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | defaults | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    ynn, cache = process.stdout.split()
    return ynn == "True", cache, process.stderr


@pytest.mark.long
def test_convolutions_are_not_left_to_ynnpack(tmp_path):
    assert not start(tmp_path)[0]
    assert start(tmp_path, XLA_FLAGS=f"{FLAG}+individual_convolution")[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{FLAG}-individual_convolution"),
        (" --xla_cpu_x=1 ", f"--xla_cpu_x=1 {FLAG}-individual_convolution"),
        # The user's own choice, and a file of flags, to which nothing can be added.
        (f"{FLAG}-individual_dot", f"{FLAG}-individual_dot"),
        ("/etc/xla_flags", "/etc/xla_flags"),
    ],
)
def test_the_flag_is_added_to_the_users(monkeypatch, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    runtime.configure()
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_CONVOLUTION_FLAG", "xla_cpu_of_another_jaxlib"),
        # The beginning of a flag is none.
        ("_CONVOLUTION_FLAG", "xla_cpu_experimental_ynn_fusion"),
        ("_CONVOLUTION_VALUE", "of_another_jaxlib"),
    ],
)
def test_a_jaxlib_that_does_not_know_the_flag_gets_none(monkeypatch, name, value):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_x=1")
    monkeypatch.setattr(runtime, name, value)
    runtime.configure()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_x=1"


def test_a_jaxlib_that_cannot_be_read_gets_no_flag(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(runtime.jaxlib, "__path__", [str(tmp_path)])
    runtime.configure()
    monkeypatch.setattr(runtime.jaxlib, "__path__", [str(tmp_path / "nothing")])
    runtime.configure()
    assert "XLA_FLAGS" not in os.environ


@pytest.mark.parametrize("plugin", ["jax_plugins", "libtpu"])
def test_an_accelerators_host_is_no_cpus(monkeypatch, tmp_path, plugin):
    (tmp_path / plugin).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for platforms, only_cpu in ((None, False), ("cuda,cpu", False), ("cpu", True)):
        config = types.SimpleNamespace(values={"jax_platforms": platforms})
        monkeypatch.setattr(runtime.jax, "config", config)
        # Only asked: to configure this process for an accelerator would change the tests after it.
        assert runtime._only_cpu() == only_cpu


FAULTS = """
import resource
FIRST
def use():
    for _ in range(10):
        b"x" * 2**26
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the malloc of glibc")
def test_memory_is_mapped_once():
    def faults(first):
        command = [sys.executable, "-c", FAULTS.replace("FIRST", first)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    # 640 MiB are 163,840 pages of 4 KiB.
    assert faults("") > 100_000
    assert faults("from resflax import runtime; runtime.configure()") < 1000


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")]
)
def test_a_malloc_that_the_user_tunes_is_left_alone(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.ctypes, "CDLL", None)  # to call it would be an error
    runtime.configure()


@pytest.mark.long
def test_what_a_process_compiles_the_next_one_finds(tmp_path):
    first = start(tmp_path)
    folder = tmp_path / "cache/resflax/xla"
    assert first[1:] == (str(folder), "")
    (kept,) = folder.glob("jit_network*-cache")
    written = kept.stat().st_mtime_ns
    assert start(tmp_path) == first
    assert list(folder.glob("jit_network*")) == [kept]
    assert kept.stat().st_mtime_ns == written


COUNT = """
import jax
from resflax import runtime
runtime.configure()
programs = runtime.count_programs()
jax.jit(lambda x: x * x)(2.0)
print(programs.compiled, programs.cached)
"""


@pytest.mark.long
def test_programs_are_counted_as_compiled_or_read(tmp_path):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    outputs = [
        subprocess.run(
            [sys.executable, "-c", COUNT],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert int(outputs[0][0]) > 0
    assert outputs == [[outputs[0][0], "0"], ["0", outputs[0][0]]]


@pytest.mark.long
def test_the_users_cache_stays(tmp_path):
    mine = tmp_path / "mine"
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(mine))[1] == str(mine)
    assert list(mine.iterdir())
    assert start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[1] == "None"
    assert not (tmp_path / "cache").exists()


@pytest.mark.long
def test_a_cache_that_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "cache").write_text("a file")
    _, cache, errors = start(tmp_path)
    assert cache == "None"
    assert errors.count("Warning") == 1
    assert "XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR" in errors


@pytest.mark.parametrize("works", [True, False])
def test_a_process_whose_output_is_full_goes_on(works):
    program = (
        "from resflax import runtime; import sys; import rich.console\n"
        f"if {works}: runtime.keep_going_unheard()\n"
        "print('x'); rich.console.Console().print('y'); print('z', file=sys.stderr)"
    )
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=full, check=False
        )
    assert (process.returncode == 0) == works
