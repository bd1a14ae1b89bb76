"""Data parallelism: a step over all devices, by jit, shard_map or pmap.

The three differ in batch norm: under plain jit the program sees the whole batch, so that its
statistics are global; under shard_map and pmap each device sees its part, and statistics are
global only where the network names the axis.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from resflax.parallel.pmapped import Pmapped
from resflax.parallel.sharded import Sharded

PyTree = Any

MODES = ("shard_map", "jit", "pmap")


class DataParallel(Protocol):
    """How steps, states and batches are laid over devices."""

    @property
    def mode(self) -> str:
        """'shard_map', 'jit' (automatic sharding) or 'pmap'."""

    @property
    def num_devices(self) -> int:
        """Over all processes."""

    @property
    def axis_name(self) -> str | None:
        """The axis that a step averages over; None under plain jit."""

    @property
    def replicated(self) -> jax.sharding.NamedSharding:
        """The sharding of an array that every device holds whole."""

    def create(self, init: Callable[[jax.Array], PyTree], seed: int) -> PyTree:
        """Runs `init(seed)` on the devices: its result is on each of them.

        Args:
          init: takes the seed, [], uint32: a value, so that one program serves all seeds.
          seed: from 0 to 2**32 - 1.
        """

    def step(
        self,
        fn: Callable[..., PyTree],
        *,
        donate_state: bool,
        batch_axis: int = 0,
        num_replicated: int = 0,
    ) -> Callable[..., PyTree]:
        """Compiles `fn(state, batch, *others)`, pure, over the devices.

        Args:
          fn: gives metrics, or a state and metrics; already averaged over `axis_name`.
          donate_state: whether the state's memory is taken for the result.
          batch_axis: of the examples, in what `put` gave; 1 where batches are stacked.
          num_replicated: how many others there are, which `replicate` made.
        """

    def put(self, batch: dict[str, np.ndarray], batch_axis: int = 0) -> dict[str, jax.Array]:
        """Lays this process's share of a batch over its devices, in one transfer.

        Args:
          batch: arrays [N, ...], or with `batch_axis` 1 a stack of them, [steps, N, ...].
          batch_axis: of the examples.
        """

    def replicate(self, arrays: PyTree) -> PyTree:
        """Lays arrays of the host, the same ones in every process, whole on every device."""

    def single(self, state: PyTree) -> PyTree:
        """A state as one replicated copy, without pmap's axis: what a checkpoint holds."""

    def spread(self, state: PyTree) -> PyTree:
        """The inverse of `single`."""

    def fetch(self, metrics: dict[str, jax.Array], count: int = 1) -> list[dict[str, Any]]:
        """Waits for the metrics of a step, or of several, and brings them to the host.

        Args:
          metrics: of a step, or of several in one call, which are their first axis.
          count: of the steps.

        Returns:
          Those of each step: numbers, and arrays [L].
        """


def data_parallel(mode: str, devices: list[jax.Device] | None = None) -> DataParallel:
    """The layout of a mode, over all devices of all processes, or those given."""
    devices = jax.devices() if devices is None else devices
    return Pmapped(devices) if mode == "pmap" else Sharded(mode, devices)
