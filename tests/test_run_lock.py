"""Tests of the lock on a run's directory, with other processes that hold it, die or stop."""

import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import threading
import time
import warnings

import forked
import pytest
from plain import config as plain_config

import resflax
from resflax import train
from resflax.checkpoint.__main__ import main as checkpoint
from resflax.run import lock

FLAGS = ("--config", "tests/plain.py")

# Holds the lock of a directory until there is a file 'end', and is stopping from a file 'stop' on.
HOLDER = """
import pathlib, time
from resflax.run import lock
directory, files = map(pathlib.Path, {})
with lock.held(directory) as own:
    (files / "held").touch()
    while not (files / "stop").exists():
        time.sleep(0.01)
    own.stopping()
    while not (files / "end").exists():
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nothing here takes long to die."""
    monkeypatch.setattr(lock, "_DYING", 0.2)


@pytest.fixture
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def holder(tmp_path, files):
    """Another process that holds the lock of the directory."""
    process = forked.Process("-c", HOLDER.format([str(tmp_path), str(files)]))
    process.wait_for(files / "held")
    yield process
    if not process.ended:
        process.send(signal.SIGKILL)
    process.finish()


def owner(directory):
    return lock.Owner(**json.loads((directory / lock.FILE).read_text()))


def leave(directory, age, **changes):
    """The lock of an owner that gave its last sign of life so many seconds ago."""
    left = dataclasses.replace(lock.Owner.here(), token="left", **changes)
    path = directory / lock.FILE
    path.write_text(json.dumps(dataclasses.asdict(left)))
    os.utime(path, (time.time() - age,) * 2)


def refusal(directory, said=None):
    said = [] if said is None else said
    with pytest.raises(lock.LockError) as error, lock.held(directory, said.append):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_lock_is_there_while_it_is_held_and_then_gone(tmp_path):
    with lock.held(tmp_path) as own:
        assert owner(tmp_path).pid == os.getpid()
        own.check()
        own.stopping()
        assert owner(tmp_path).stopping
        assert os.listdir(tmp_path) == [lock.FILE]
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), lock.held(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_second_process_is_told_who_holds_it(tmp_path, holder):
    held = owner(tmp_path)
    assert refusal(tmp_path) == (
        f"workdir {tmp_path} is in use by process {holder.pid} on {held.host}, at work since "
        f"{held.since}; wait for its end, or take another --workdir."
    )
    assert owner(tmp_path) == held


def test_a_killed_owner_is_replaced_at_once(tmp_path, holder):
    name = f"process {holder.pid} on {owner(tmp_path).host}"
    holder.send(signal.SIGKILL)
    said = []
    with lock.held(tmp_path, said.append):
        assert owner(tmp_path).pid == os.getpid()
    assert said == [f"{tmp_path}: {name} is gone, and left its lock."]
    assert os.listdir(tmp_path) == []


def test_an_owner_whose_parent_has_not_noticed_its_end_is_gone(tmp_path):
    with subprocess.Popen(["sleep", "100"]) as process:
        leave(tmp_path, 0, pid=process.pid, process=lock._started(process.pid))
        assert "in use by process" in refusal(tmp_path)
        process.kill()
        with lock.held(tmp_path):
            assert owner(tmp_path).pid == os.getpid()


def test_an_owner_that_is_stopping_is_waited_for(tmp_path, files, holder):
    name = f"process {holder.pid} on {owner(tmp_path).host}"
    (files / "stop").touch()
    while not owner(tmp_path).stopping:
        time.sleep(0.01)
    threading.Timer(lock._DYING + 0.5, (files / "end").touch).start()
    said = []
    with lock.held(tmp_path, said.append):
        assert owner(tmp_path).pid == os.getpid()
    assert said == [f"{tmp_path}: waiting for {name} to end."]


def test_a_process_with_the_number_of_a_dead_owner_is_another_one(tmp_path):
    leave(tmp_path, 0, process="1")
    with lock.held(tmp_path):
        assert owner(tmp_path).token != "left"


@pytest.mark.parametrize("kernel", ["another boot", ""])
def test_an_owner_elsewhere_that_gives_no_sign_of_life_is_replaced(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(lock, "STALE", 1.0)
    for age in (0.0, 100.0):
        leave(tmp_path, age, kernel=kernel)
        start = time.monotonic()
        with lock.held(tmp_path):
            assert (time.monotonic() - start > 0.5) == (age == 0.0)


def test_an_owner_elsewhere_that_gives_one_is_not(tmp_path):
    leave(tmp_path, 20, kernel="another boot", host="node7", pid=12)
    threading.Timer(0.5, os.utime, [tmp_path / lock.FILE]).start()
    said = []
    assert "in use by process 12 on node7, at work since" in refusal(tmp_path, said)
    assert said == [f"{tmp_path}: waiting for process 12 on node7 to end."]
    assert owner(tmp_path).token == "left"


def test_a_lock_that_a_power_cut_emptied_is_replaced(tmp_path):
    (tmp_path / lock.FILE).touch()
    os.utime(tmp_path / lock.FILE, (0, 0))
    with lock.held(tmp_path):
        assert owner(tmp_path).pid == os.getpid()


def test_of_many_that_find_a_dead_owner_one_takes_its_place(tmp_path):
    for _ in range(5):
        leave(tmp_path, 0, process="1")
        start, end, held = threading.Barrier(8), threading.Barrier(8), []

        def take(start=start, end=end, held=held):
            own = lock.Lock(tmp_path, lambda text: None)
            start.wait()
            try:
                while not own.take():
                    pass
                held.append(own)
            except lock.LockError:
                pass
            end.wait()

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (own,) = held
        own.check()
        own.release()
        assert os.listdir(tmp_path) == []


def test_a_taker_that_died_in_between_does_not_keep_others_out(tmp_path):
    leave(tmp_path, 0, process="1")
    claim = tmp_path / f"{lock.FILE}.left"
    claim.touch()
    os.utime(claim, (0, 0))
    with lock.held(tmp_path):
        assert os.listdir(tmp_path) == [lock.FILE]


def test_an_owner_that_was_replaced_learns_of_it(tmp_path):
    with lock.held(tmp_path) as own:
        leave(tmp_path, 0)
        with pytest.raises(lock.LockError, match="taken over by another process, since process"):
            own.check()
    assert owner(tmp_path).token == "left"
    (tmp_path / lock.FILE).unlink()
    with lock.held(tmp_path) as own:
        (tmp_path / lock.FILE).unlink()  # by someone who cleans up
        own.check()
        assert owner(tmp_path).pid == os.getpid()


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    gone = tmp_path / "gone"
    assert refusal(gone) == f"{gone / lock.FILE} cannot be written: No such file or directory."


def test_a_run_beside_another_writer_touches_nothing(tmp_path, holder):
    with pytest.raises(lock.LockError, match=f"in use by process {holder.pid} on "):
        train.train_and_evaluate(plain_config(), tmp_path)
    assert os.listdir(tmp_path) == [lock.FILE]


def test_prune_is_a_writer(tmp_path, capsys):
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with lock.held(tmp_path), pytest.raises(SystemExit) as exit_code:
        checkpoint(["prune", str(tmp_path)])
    assert exit_code.value.code == 2
    assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
    assert checkpoint(["prune", str(tmp_path)]) == 1  # the damaged one


def start(workdir, epochs, *flags):
    command = (*FLAGS, f"--config.train.epochs={epochs}", *flags, "--workdir", workdir)
    return forked.Process("resflax.main", *command)


def compete(workdir, epochs, delay):
    """Two of the same command: one does the run, and the other changes nothing."""
    pair = [start(workdir, epochs)]
    if delay is not None:
        pair[0].wait_for(workdir / "metrics.jsonl")
        time.sleep(delay)
        assert not pair[0].ended
    pair.append(start(workdir, epochs))
    ends = [process.finish(600) for process in pair]
    first, second = sorted(ends, key=lambda end: end.code)
    assert (first.code, second.code) == (0, 2), ends
    assert "is in use by process" in second.errors
    assert second.errors.startswith("error: ")
    assert second.errors.count("\n") == 1
    assert "damaged" not in first.output
    assert "interrupted" not in first.output
    assert not list(workdir.glob("*run.lock*"))
    assert checkpoint(["verify", str(workdir)]) == 0
    return resflax.restore(workdir).step, json.loads((workdir / "result.json").read_text())


@pytest.mark.long
def test_of_two_runs_on_one_directory_one_ends_well_and_the_other_refuses(tmp_path):
    assert compete(tmp_path / "run", 20, None)[0] == 40


@pytest.mark.slow
def test_fifty_pairs_of_runs(tmp_path):
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    results = []
    for number in range(50):
        delay = None if number % 5 == 0 else rng.uniform(0, 1)
        step, result = compete(tmp_path / str(number), 20, delay)
        assert step == 40
        results.append({k: v for k, v in result.items() if k != "seconds"})
    assert all(result == results[0] for result in results)


@pytest.mark.long
def test_a_run_waits_for_one_that_is_stopping_and_goes_on(tmp_path):
    first = start(tmp_path / "run", 10)
    first.wait_for(tmp_path / "run/metrics.jsonl")
    first.send(signal.SIGTERM)
    second = start(tmp_path / "run", 10)
    assert first.finish().code == 143
    end = second.finish()
    assert end.code == 0, end.errors
    assert "resumed after step" in end.output


def orbax_fails(test):
    """Marks a test in which orbax reads what is being deleted."""
    warning = "ignore::pytest.PytestUnraisableExceptionWarning"
    return pytest.mark.filterwarnings(warning)(test)


def read_beside(workdir, epochs, tries):
    """Restores, evaluates and lists beside a run that keeps one state; returns the steps."""
    process = start(workdir, epochs, "--config.checkpoint.keep=1")
    steps = []
    try:
        process.wait_for(workdir / "checkpoints/2")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            while len(steps) < tries and not process.ended:
                steps.append(resflax.restore(workdir, best=len(steps) % 3 == 2).step)
                assert checkpoint(["list", str(workdir)]) == 0
                assert checkpoint(["verify", str(workdir)]) == 0
    finally:
        process.send(signal.SIGTERM)
        assert process.finish(300).code in (0, 143)
    gc.collect()  # what failed in orbax says so then
    print(f"{len(steps)} readings, {len(set(steps))} steps")
    return steps


@orbax_fails
@pytest.mark.long
def test_readers_beside_a_run_take_the_step_that_is_there(tmp_path):
    steps = read_beside(tmp_path / "run", 1000, 5)
    assert len(steps) == 5


@orbax_fails
@pytest.mark.slow
def test_eighty_readings_beside_a_run_that_keeps_one_state(tmp_path):
    assert len(read_beside(tmp_path / "run", 3000, 80)) == 80
