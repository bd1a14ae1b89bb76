"""Sweeps on SLURM: the script, and, where SLURM is installed, two nodes on this machine."""

import argparse
import contextlib
import dataclasses
import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import forked
import pytest

from launch import here, lock, slurm

ROOT = pathlib.Path(__file__).parent.parent

RESULT = '{"eval/top1": 0.5, "best/top1": 0.5, "seconds": 1.0}'


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    workdir: pathlib.Path
    flags: tuple[str, ...] = ()

    @property
    def command(self):
        command = [sys.executable, "-m", "resflax.main", "--config", "tests/small.py", *self.flags]
        return [*command, "--workdir", str(self.workdir)]


def options(*arguments):
    parser = argparse.ArgumentParser()
    slurm.add_arguments(parser)
    return parser.parse_args(arguments)


def directives(script):
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [line.removeprefix("#SBATCH ") for line in lines]


def test_the_script_is_bash_and_has_a_task_for_each_run(tmp_path):
    folder = tmp_path / "it's a sweep"
    names = ["depth=8,shortcut=A", "$HOME;\"`'"]
    runs = [Run(name, folder / name) for name in names]
    script = slurm.script(runs, options("--parallel", "2", "--time", "4:00:00"))
    assert {"--array=0-1%2", "--time=4:00:00", "--requeue", "--nodes=1"} <= set(directives(script))
    assert "--signal=TERM@120" in directives(script)
    # Each task knows its run, whatever is in the name.
    head = script[: script.index("srun=(")] + 'printf "%s\\n" "$workdir" "${command[@]}"'
    for number, run in enumerate(runs):
        printed = subprocess.run(
            ["bash", "-euc", head],
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert printed == [str(run.workdir), *run.command]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("end", ["\n", "\r", "\x1b", "\udcff"])
@pytest.mark.parametrize("place", ["workdir", "--sbatch=--comment=", "--partition="])
def test_what_would_end_a_line_of_the_script_is_refused(tmp_path, place, end):
    text = f"a{end}touch b"
    folder, flags = (tmp_path / text, []) if place == "workdir" else (tmp_path, [place + text])
    with pytest.raises(slurm.SlurmError, match="must be printable characters in one line"):
        slurm.script([Run("a", folder / "a")], options(*flags))


def test_one_process_takes_all_gpus_of_a_node(tmp_path):
    script = slurm.script(
        [Run("a", tmp_path / "a")], options("--gpus", "4", "--cpus", "32", "--memory", "64")
    )
    wanted = {"--gres=gpu:4", "--ntasks-per-node=1", "--cpus-per-task=32", "--mem=64G"}
    assert wanted <= set(directives(script))
    assert "srun=(--cpus-per-task=32)" in script
    assert "--processes" not in script
    assert "--expect_devices 4" in script


def test_several_nodes_have_a_process_for_each_gpu(tmp_path):
    script = slurm.script(
        [Run("a", tmp_path / "a")],
        options("--nodes", "2", "--gpus", "4", "--cpus", "32", "--sbatch=--account=vision"),
    )
    wanted = {"--nodes=2", "--gres=gpu:4", "--ntasks-per-node=4", "--cpus-per-task=8"}
    assert wanted | {"--account=vision"} <= set(directives(script))
    assert "--processes auto --expect_devices 8" in script
    assert "srun=(--cpus-per-task=8 --wait=" in script


def test_a_machine_without_slurm_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmError, match=r"there is no squeue on this machine") as error:
        slurm.submit([Run("a", tmp_path / "sweep" / "a")], options())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# Two nodes on this machine, without authentication, for this user's processes alone.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=20
MaxArraySize=61
MaxJobCount=50
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# jax looks for the first of them by its name, which is this machine's.
NODES = (socket.gethostname(), f"{socket.gethostname()}x")


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def end(processes):
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of this module's own: commands find it by $SLURM_CONF."""
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("SLURM is not installed: apt-get install slurm-wlm")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    port, *ports = free_ports(1 + len(NODES))
    host = socket.gethostname()
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
        for name, port in zip(NODES, ports, strict=True)
    ]
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host, user=getpass.getuser(), port=port, folder=folder, nodes="\n".join(nodes)
        )
    )
    processes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
        for command in commands:
            with (folder / f"{'-'.join(command)}.log").open("w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        try:
            wait_for(lambda: ask("sinfo", "-h", "-o", "%T %D") == f"idle {len(NODES)}", 60)
            yield folder
            ask("scancel", "--user", getpass.getuser())
            wait_for(lambda: not queue(), 60)
        finally:
            end(processes)


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def queue():
    return ask("squeue", "--noheader", "--array", "--format=%i %T")


def wait_for(condition, seconds=300):
    """Seconds are a limit, for when something is broken; nothing is timed."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"in vain; the queue is {queue() or 'empty'}"
        time.sleep(0.3)


def submit(runs, *arguments):
    assert slurm.submit(runs, options(*arguments)) == 0


def finished(run):
    return (run.workdir / "result.json").exists()


def saved(run):
    """The steps of whole checkpoints."""
    folder = run.workdir / "checkpoints"
    return {int(path.name) for path in folder.glob("*") if path.name.isdecimal()}


def resumed(run):
    return (run.workdir / "log.txt").read_text().count("resumed after step")


def release(run_id, restarts):
    """A requeued task waits for two minutes, unless it is told another time.

    SLURM does not start it in the second in which it ended: it has just revoked its credential.
    """
    wait_for(lambda: f"Restarts={restarts}" in ask("scontrol", "show", "job", run_id))
    wait_for(lambda: f"{run_id} PENDING" in queue())
    ask("scontrol", "update", f"jobid={run_id}", "starttime=now+5")
    wait_for(lambda: f"{run_id} PENDING" not in queue())


LONG = "--config.train.epochs=30"


@pytest.mark.slow
def test_an_array_runs_to_its_end(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "a sweep, 100%"
    runs = [Run(name, folder / name) for name in ("seed=1", "seed=2", "broken", "done")]
    runs[2] = dataclasses.replace(runs[2], flags=("--config.model.shortcut=Z",))
    runs[3].workdir.mkdir(parents=True)
    (runs[3].workdir / "result.json").write_text(RESULT)
    submit(runs, "--parallel", "1", "--cpus", "1", "--time", "30")
    assert "done: done\njob " in capsys.readouterr().out
    wait_for(lambda: not queue())
    assert all(map(finished, runs[:2]))
    assert "top-1" in (runs[0].workdir / "log.txt").read_text()
    assert not list(runs[0].workdir.glob("*err*"))
    # The one that failed says why, there and in its log.
    error = (runs[2].workdir / "error.txt").read_text()
    assert error.count("\n") == 1
    assert error.startswith("config.model: shortcut 'Z' is not one of")
    assert error in (runs[2].workdir / "log.txt").read_text()
    # Nothing was done where one had finished, and only the failed one is submitted again.
    assert [path.name for path in runs[3].workdir.iterdir()] == ["result.json"]
    submit(runs)
    assert ": 1 of 4 runs" in capsys.readouterr().out
    wait_for(lambda: not queue())


@pytest.mark.slow
def test_a_stopped_run_is_requeued_and_resumes(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = Run("long", tmp_path / "sweep" / "long", (LONG,))
    submit([run])
    (script,) = (tmp_path / "sweep" / "slurm").glob("*.sh")
    job = script.stem
    wait_for(lambda: len(saved(run)) > 1)
    # What --signal does ahead of the time limit: to the run, not to the script.
    ask("scancel", "--signal=TERM", f"{job}_0")
    wait_for(lambda: f"{job}_0 PENDING" in queue())
    assert not finished(run)
    # The same command in the meantime submits nothing twice.
    capsys.readouterr()
    submit([run])
    assert capsys.readouterr().out == "long: pending\n"
    with pytest.raises(ValueError, match="SLURM has 1 of its runs, such as long"):
        here.submit([run], argparse.Namespace(parallel=None))
    release(f"{job}_0", 1)
    wait_for(lambda: resumed(run) == 1)
    # SLURM takes the nodes for another job, and gives them back.
    before = max(saved(run))
    wait_for(lambda: max(saved(run)) > before)
    ask("scontrol", "requeue", f"{job}_0")
    release(f"{job}_0", 2)
    wait_for(lambda: not queue())
    assert finished(run)
    assert resumed(run) == 2
    assert not (run.workdir / "error.txt").exists()


@pytest.mark.slow
def test_a_cancelled_run_stays_so_until_it_is_submitted_again(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = Run("long", tmp_path / "sweep" / "long", (LONG,))
    submit([run])
    wait_for(lambda: saved(run))
    ask("scancel", "--user", getpass.getuser())
    wait_for(lambda: not queue())
    assert not finished(run)
    assert not (run.workdir / "error.txt").exists()
    submit([run])
    wait_for(lambda: not queue())
    assert finished(run)
    assert resumed(run) == 1


@pytest.mark.slow
def test_a_run_that_never_gets_further_is_given_up(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = Run("stuck", tmp_path / "sweep" / "stuck")
    stuck = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(Run, "command", [sys.executable, "-c", stuck])
    submit([run])
    (script,) = (tmp_path / "sweep" / "slurm").glob("*.sh")
    release(f"{script.stem}_0", 1)
    wait_for(lambda: not queue())
    assert "longer --time" in (run.workdir / "error.txt").read_text()


@pytest.mark.slow
def test_two_nodes_run_a_process_each(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = Run("both", tmp_path / "sweep" / "both")
    # As resflax.process.distributed does with these flags.
    code = "import sys, jax; jax.distributed.initialize(); print(jax.process_index(), end=' '); "
    code += "print(jax.process_count(), jax.device_count(), *sys.argv[1:])"
    monkeypatch.setattr(Run, "command", [sys.executable, "-c", code])
    monkeypatch.setenv("XLA_FLAGS", forked.xla_flags())  # a device for each process
    submit([run], "--nodes", "2")
    wait_for(lambda: not queue())
    lines = (run.workdir / "log.txt").read_text().splitlines()
    numbers = sorted(line for line in lines if line.endswith("--processes auto"))
    assert numbers == ["0 2 2 --processes auto", "1 2 2 --processes auto"]


@pytest.mark.slow
def test_what_slurm_refuses_is_told_in_one_line(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = [Run(str(i), tmp_path / "sweep" / str(i)) for i in range(62)]
    with pytest.raises(slurm.SlurmError, match="Invalid job array") as error:
        slurm.submit(runs, options())
    assert "\n" not in str(error.value)
    with pytest.raises(slurm.SlurmError, match="the queue is full"):
        slurm.submit(runs[:60], options())  # sbatch itself tries for two minutes
    with pytest.raises(slurm.SlurmError, match="Invalid partition"):
        slurm.submit(runs[:1], options("--partition", "nowhere"))
    assert not queue()
    # The script is there to be changed, and the same command tries again.
    assert [path.name for path in (tmp_path / "sweep" / "slurm").iterdir()] == ["next.sh"]
    with lock.held(tmp_path / "sweep"), pytest.raises(lock.LockError, match="another sweep"):
        slurm.submit(runs[:1], options())


@pytest.mark.slow
def test_a_controller_that_is_down_is_told_in_one_line(cluster, tmp_path, monkeypatch):
    configuration = (cluster / "slurm.conf").read_text()
    (port,) = free_ports(1)
    wrong = tmp_path / "slurm.conf"
    lines = [
        f"SlurmctldPort={port}" if "ctldPort" in li else li for li in configuration.split("\n")
    ]
    wrong.write_text("\n".join(lines))
    monkeypatch.setenv("SLURM_CONF", str(wrong))
    with pytest.raises(slurm.SlurmError, match="Unable to contact slurm controller"):
        slurm.submit([Run("a", tmp_path / "sweep" / "a")], options())
