import pytest

from launch import accelerators
from launch.accelerators import Slot

LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a1b)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2c3d)
"""


@pytest.fixture
def listing(tmp_path, monkeypatch):
    """Puts a program in the place of nvidia-smi, which is only where its driver is."""
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)

    def write(text, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return write


def test_each_gpu_is_a_place(listing):
    listing(LISTING)
    assert accelerators.slots(None) == [
        Slot({"CUDA_VISIBLE_DEVICES": "0"}),
        Slot({"CUDA_VISIBLE_DEVICES": "1"}),
    ]
    assert accelerators.slots(1) == [Slot({"CUDA_VISIBLE_DEVICES": "0"})]


def test_those_that_the_user_chose_are_taken(listing, monkeypatch):
    listing(LISTING)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-9e")
    assert accelerators.visible() == ["1", "GPU-9e"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert accelerators.visible() == []


def test_runs_that_share_a_gpu_share_its_memory(listing, monkeypatch):
    listing(LISTING)
    places = [place.environment for place in accelerators.slots(3)]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "0"]
    assert {place["XLA_PYTHON_CLIENT_MEM_FRACTION"] for place in places} == {"0.450"}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    assert accelerators.slots(3)[2] == Slot({"CUDA_VISIBLE_DEVICES": "0"})


@pytest.mark.parametrize("code", [0, 9])
def test_without_a_gpu_runs_are_on_the_cpu(listing, code):
    listing("No devices were found\n" if code == 0 else LISTING, code)
    assert accelerators.slots(None) == [Slot()]


def test_where_jax_uses_the_cpu_there_are_none(listing, monkeypatch):
    listing(LISTING)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert accelerators.slots(None) == [Slot()]


@pytest.mark.parametrize(
    ("runs", "cores", "shares"),
    [
        (2, {2, 3, 5, 7}, [{2, 3}, {5, 7}]),
        (2, {0, 1, 2}, [{0}, {1}]),
        (3, {4, 6}, [{4}, {6}, {4}]),
    ],
)
def test_runs_on_the_cpu_share_its_cores(monkeypatch, runs, cores, shares):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    assert [place.cores for place in accelerators.slots(runs)] == shares
