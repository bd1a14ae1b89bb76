"""Runs of several real processes on this machine; what a host sees of the others is the network."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import forked
import jax
import numpy as np
import pytest

import resflax
from resflax import evaluate
from resflax.process import distributed

ROOT = pathlib.Path(__file__).parent.parent

# 20 steps, one evaluation of 50 images in batches of 32, one checkpoint.
FLAGS = (
    "--config.model.bn_axis=global",
    "--config.train.epochs=10",
    "--config.eval.every_epochs=10",
    "--config.checkpoint.every_epochs=10",
    # Smooth: where rounding moves an activation over the kink of a ReLU, the gradient jumps.
    "--config.model.act=silu",
)
# More steps than a test waits for, a checkpoint every two.
ENDLESS = ("--config.train.epochs=10000",)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


PROGRAM = ("-m", "resflax.main")


def launch(*flags, devices=1, environment=(), program=PROGRAM):
    """A process of the plain run, with so many host devices."""
    options = forked.xla_flags(devices)
    return subprocess.Popen(
        [sys.executable, *program, "--config", "tests/plain.py", *flags],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": options, "JAX_PLATFORMS": "cpu", **dict(environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch_all(workdir, count, devices, *flags, own=()):
    """All processes of a run; `own` are flags of the last one."""
    place = ("--coordinator", f"localhost:{free_port()}", "--num_processes", str(count))
    common = (*flags, *place, "--workdir", str(workdir))
    last = count - 1
    return [
        launch(*common, "--process_id", str(i), *(own if i == last else ()), devices=devices)
        for i in range(count)
    ]


def outcome(group, seconds=900):
    """Exit codes, outputs and errors, once all have ended."""
    try:
        ends = [process.communicate(timeout=seconds) for process in group]
    finally:
        for process in group:
            process.kill()
    return [p.returncode for p in group], [out for out, _ in ends], [err for _, err in ends]


def complete(workdir, count, devices, *flags):
    group = launch_all(workdir, count, devices, *flags) if count > 1 else []
    group = group or [launch(*flags, "--workdir", str(workdir), devices=devices)]
    codes, outputs, errors = outcome(group)
    assert codes == [0] * count, errors
    return outputs


def wait_for(path, group):
    while not path.exists():
        assert all(process.poll() is None for process in group), outcome(group)
        time.sleep(0.05)


def error_lines(errors):
    """What the processes themselves said was wrong."""
    return [[line for line in text.splitlines() if line.startswith("error: ")] for text in errors]


def difference(a, b):
    a, b = resflax.restore(a), resflax.restore(b)
    assert a.step == b.step == 20
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), *map(of, (a, b)))))


def of(run):
    return jax.tree.map(np.asarray, run.variables)


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    complete(workdir, 1, 1, *FLAGS)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes with a device each, as SLURM starts them; and their outputs."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, complete(workdir, 2, 1, *FLAGS, "--expect_devices=2")


@pytest.mark.long
def test_two_processes_compute_what_one_does(one, two):
    assert difference(one, two[0]) < 1e-5
    for name in ("eval/loss", "eval/top1", "eval/top5"):
        assert result_of(two[0])[name] == pytest.approx(result_of(one)[name], rel=1e-5)


@pytest.mark.long
def test_the_first_process_tells_the_topology_and_the_others_are_silent(two):
    first, second = ([x for x in out.splitlines() if "[Gloo]" not in x] for out in two[1])
    assert first[0] == "2 processes, 2 devices (cpu), 1 in each process"
    assert first[1] == f"  {socket.gethostname()}: 2 devices, of processes 0, 1"
    assert second == []


@pytest.mark.long
def test_every_image_counts_once_where_shares_are_uneven(two):
    # Of the second batch of 32, one process has 16 of the 50 images and the other 2.
    again = evaluate.evaluate_run(two[0])
    assert again["loss"] == pytest.approx(result_of(two[0])["eval/loss"], rel=1e-5)
    assert again["top1"] == pytest.approx(result_of(two[0])["eval/top1"])


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped_and_the_other_way_round(two):
    before = result_of(two[0])
    (output,) = complete(two[0], 1, 1, *FLAGS)
    assert "resumed after step 20 of 20" in output
    assert result_of(two[0])["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)
    output, _ = complete(two[0], 2, 1, *FLAGS)
    assert "resumed after step 20 of 20" in output
    assert result_of(two[0])["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "count", "devices"),
    [
        ("jit", 2, 1),
        ("pmap", 2, 1),
        ("shard_map", 2, 4),
        ("jit", 2, 4),
        ("pmap", 2, 4),
        ("shard_map", 1, 8),
        ("jit", 1, 8),
        ("pmap", 1, 8),
    ],
)
def test_every_mode_over_any_processes_computes_what_one_device_does(
    one, tmp_path, mode, count, devices
):
    complete(tmp_path / "run", count, devices, *FLAGS, f"--config.parallel.mode={mode}")
    assert difference(one, tmp_path / "run") < 1e-5
    assert result_of(tmp_path / "run")["eval/loss"] == pytest.approx(
        result_of(one)["eval/loss"], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "jit", "pmap"])
def test_averages_loops_host_data_and_several_steps_in_a_call(tmp_path, mode):
    """Whatever else is laid over the devices, in one run."""
    flags = (
        *FLAGS,
        f"--config.parallel.mode={mode}",
        "--config.train.ema_decay=0.9",
        "--config.train.steps_per_call=4",
        "--config.train.grad_accumulation=2",
        "--config.model.name=cifar_resnet20",
        "--config.model.depth=20",
        "--config.model.cardinality=1",
        "--config.model.base_width=64",
        "--config.model.scan=2",
        "--config.data.placement=host",
    )
    complete(tmp_path / "one", 1, 1, *flags)
    complete(tmp_path / "two", 2, 1, *flags)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "jit", "pmap"])
def test_weights_are_laid_over_all_processes(two, tmp_path, mode):
    flags = (*FLAGS, f"--config.init_from={two[0]}", f"--config.parallel.mode={mode}")
    complete(tmp_path / "one", 1, 1, *flags)
    complete(tmp_path / "two", 2, 1, *flags)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert difference(two[0], tmp_path / "two") > 1e-4


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_the_same_command_goes_on(two, tmp_path):
    # Its checkpoints are closer; its steps are those of the other run.
    often = ("--config.eval.every_epochs=1", "--config.checkpoint.every_epochs=1")
    flags = (*FLAGS, *often)
    group = launch_all(tmp_path / "run", 2, 1, *flags)
    wait_for(tmp_path / "run/checkpoints/2", group)
    group[1].send_signal(signal.SIGTERM)
    codes, _, errors = outcome(group)
    if codes != [0, 0]:  # or it had come to its end
        assert codes == [143, 143], errors
        assert all(f"--workdir {tmp_path / 'run'} goes on" in text for text in errors)
        assert not (tmp_path / "run/result.json").exists()
        output, _ = complete(tmp_path / "run", 2, 1, *flags)
        assert "resumed after step" in output
    assert difference(two[0], tmp_path / "run") == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_dies_the_others_end_and_name_it(tmp_path, victim):
    group = launch_all(tmp_path / "run", 2, 1, *ENDLESS)
    wait_for(tmp_path / "run/checkpoints/2", group)
    group[victim].kill()
    survivor = group[1 - victim]
    try:
        _, errors = survivor.communicate(timeout=60)
    finally:
        survivor.kill()
    assert survivor.returncode == -signal.SIGABRT
    # Without a leader, jax may end the process before its own error is printed.
    assert victim == 0 or distributed.BROKEN in errors
    assert ("the leader task" if victim == 0 else "Task 1 heartbeat timeout") in errors.replace(
        distributed.BROKEN, ""
    )
    group[victim].communicate()


# The process that fails does so when it opens its data, or reads the metrics of its third step.
FAILING = """
import runpy, sys
from resflax import errors
from resflax.run import progress
from resflax.data import sources

def load(*rest):
    raise {error}

def steps(self, step, *rest):
    if step == 3:
        raise {error}

if {early}:
    sources.load = load
else:
    progress.Progress.steps = steps
sys.argv[0] = "resflax.main"
runpy.run_module("resflax.main", run_name="__main__", alter_sys=True)
"""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("victim", "error", "code", "text", "early"),
    [
        (1, "RuntimeError('a bug')", 1, "RuntimeError: a bug", False),
        (1, "errors.UserError('mend it')", 2, "mend it", True),
        slow(0, "RuntimeError('a bug')", 1, "RuntimeError: a bug", False),
        slow(1, "errors.UserError('mend it')", 2, "mend it", False),
        slow(0, "OSError(28, 'No space left', 'file')", 2, "No space left", False),
    ],
)
@pytest.mark.long
def test_where_one_fails_the_others_end_with_its_error(tmp_path, victim, error, code, text, early):
    place = ("--coordinator", f"localhost:{free_port()}", "--num_processes", "2")
    flags = (*ENDLESS, *place, "--workdir", str(tmp_path / "run"))
    failing = ("-c", FAILING.format(error=error, early=early))
    group = [
        launch(*flags, "--process_id", str(i), program=failing if i == victim else PROGRAM)
        for i in range(2)
    ]
    codes, _, errors = outcome(group, seconds=300)
    assert codes == [code] * 2, errors
    assert all(text in said for said in errors)
    assert ("Traceback" in errors[victim]) == (code == 1)
    assert f"error: process {victim} failed: " in errors[1 - victim]


LISTENS = """
import pathlib
from resflax.process import distributed
distributed.start(distributed.Place({!r}, 1, 0), 60)
port = f":{{{!r}:04X}}"
for table in ("tcp", "tcp6"):
    for line in pathlib.Path("/proc/net", table).read_text().splitlines():
        _, local, _, state, *_ = line.split()
        if local.endswith(port) and state == "0A":
            print(local.removesuffix(port))
"""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0"])
def test_a_coordinator_of_this_machine_alone_listens_to_it_alone(host):
    port = free_port()
    result = forked.run("-c", LISTENS.format(f"{host}:{port}", port))
    # 127.0.0.1, the same as an address of IPv6, and ::1, as procfs writes them.
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert result.output, result.errors
    assert (set(result.output.split()) <= loopback) == (host != "0.0.0.0")


@pytest.mark.long
def test_a_coordinator_that_does_not_answer_is_named(tmp_path):
    address = f"localhost:{free_port()}"
    place = ("--coordinator", address, "--num_processes=2", "--process_id=1")
    process = launch(*place, "--start_seconds=2", "--workdir", str(tmp_path / "run"))
    codes, _, (errors,) = outcome([process])
    assert codes == [2]
    assert errors.startswith(f"error: the coordinator {address} did not answer within 2 s")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_coordinator_says_that_others_are_missing(tmp_path):
    place = ("--coordinator", f"localhost:{free_port()}", "--num_processes=2", "--process_id=0")
    process = launch(*place, "--start_seconds=2", "--workdir", str(tmp_path / "run"))
    codes, _, (errors,) = outcome([process])
    assert codes == [2]
    assert "not all 2 processes came within 2 s" in errors
    assert errors.count("\n") == 1


@pytest.mark.long
def test_fewer_devices_than_expected_are_refused_by_all(tmp_path):
    group = launch_all(tmp_path / "run", 2, 1, "--expect_devices=8")
    codes, _, errors = outcome(group)
    assert codes == [2, 2]
    for (line,) in error_lines(errors):
        assert line.startswith("error: 2 devices (cpu) answer in 2 processes, --expect_devices 8")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_what_the_first_process_refuses_all_refuse(tmp_path):
    (tmp_path / "run").write_text("mine")
    codes, _, errors = outcome(launch_all(tmp_path / "run", 2, 1))
    assert codes == [2, 2]
    assert all("is a file" in line for (line,) in error_lines(errors))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.slow
def test_another_config_in_one_process_is_refused_by_all(tmp_path):
    codes, _, errors = outcome(launch_all(tmp_path / "run", 2, 1, own=("--config.seed=1",)))
    assert codes == [2, 2]
    for (line,) in error_lines(errors):
        assert line.startswith("error: process 1 has another config than process 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_with_unequal_devices_are_refused(tmp_path):
    place = ("--coordinator", f"localhost:{free_port()}", "--num_processes=2")
    common = (*place, "--workdir", str(tmp_path / "run"))
    group = [launch(*common, f"--process_id={i}", devices=1 + i) for i in range(2)]
    codes, _, errors = outcome(group)
    assert codes == [2, 2]
    assert all("process 0 has 1, process 1 has 2" in line for (line,) in error_lines(errors))


@pytest.mark.slow
def test_auto_takes_the_place_that_slurm_gives(tmp_path):
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    flags = ("--processes=auto", "--expect_devices=3", "--workdir", str(tmp_path / "run"))
    group = [
        launch(*flags, environment={**slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(2)
    ]
    codes, _, errors = outcome(group)
    assert codes == [2, 2]
    for (line,) in error_lines(errors):
        assert "2 devices (cpu) answer in 2 processes" in line


@pytest.mark.parametrize(
    ("flags", "right"),
    [
        (("--processes=auto", "--workdir=runs/none"), "jax finds no place for this process"),
        (("--processes=sometimes",), "off|auto|manual"),
        (
            ("--coordinator=here:1", "--workdir=runs/none"),
            "manual needs --coordinator, --num_processes and",
        ),
        (("--processes=off", "--num_processes=2"), "--processes off excludes --num_processes"),
        (("--coordinator=here:1", "--num_processes=2", "--process_id=1"), "need --workdir"),
        (("--expect_devices=8",), "1 devices (cpu) answer in 1 processes, --expect_devices 8"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(flags, right):
    result = forked.run("resflax.main", "--config", "tests/plain.py", *flags)
    assert result.code == 2
    assert right in result.errors
    assert result.errors.count("\n") == 1
    assert result.errors.startswith("error: ")


@pytest.mark.parametrize(
    ("place", "right"),
    [
        (("localhost", 2, 0), "must be HOST:PORT"),
        (("localhost:http", 2, 0), "must be HOST:PORT"),
        ((":5000", 2, 0), "must be HOST:PORT"),
        (("localhost:70000", 2, 0), "must be HOST:PORT"),
        (("localhost:5000", 2, 2), "--process_id 2 must be at least 0 and less than"),
        (("localhost:5000", 2, -1), "--process_id -1 must be at least 0"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place, right):
    with pytest.raises(distributed.ProcessError, match=right):
        distributed.Place(*place)
