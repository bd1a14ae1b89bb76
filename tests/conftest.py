"""Eight host devices, made before jax is imported, so that every test can share them.

Most of a test's time is XLA's compiler, so it optimises less than it would for a user; the runs in
processes of their own compile as a user's do. On a busy machine eight devices may have to wait for
each other for longer than XLA, which then ends the process, does by itself.
"""

import os
import tempfile

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    ]
)

import jax

# What processes of their own compile they share, and leave out of the user's cache. Named after
# jax has read its environment: this process compiles in another way, and keeps nothing.
_CACHE = tempfile.TemporaryDirectory(prefix="resflax-test-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name

# A silent broadcast over ranks is a bug more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")
