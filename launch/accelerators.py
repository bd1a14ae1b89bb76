"""The accelerators of this machine, counted without jax: a process that starts it takes them."""

import os
import subprocess


def visible() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that runs may use; none if jax is to use the CPU."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or none that works
        return []
    gpus = [line for line in listing.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(gpus))]


def places(parallel: int | None) -> list[dict[str, str]]:
    """What each of the runs at one time has in its environment.

    Args:
      parallel: how many there are; None: one an accelerator, or one if there is none.
    """
    gpus = visible()
    count = parallel or len(gpus) or 1
    if not gpus:
        return [{} for _ in range(count)]
    pinned = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    sharers = -(-count // len(gpus))
    if sharers == 1 or "XLA_PYTHON_CLIENT_MEM_FRACTION" in os.environ:
        return pinned
    # jax takes three quarters of a GPU's memory unless it is told otherwise.
    fraction = f"{0.9 / sharers:.3f}"
    return [place | {"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction} for place in pinned]
