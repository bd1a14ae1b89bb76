"""Data parallelism: a step over all devices, by jit, shard_map or pmap.

The three differ in batch norm: under plain jit the program sees the whole batch, so that its
statistics are global; under shard_map and pmap each device sees its part, and statistics are
global only where the network names the axis.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

AXIS = "data"
MODES = ("shard_map", "jit", "pmap")


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """How steps, states and batches are laid over devices.

    What is on the devices is one array over all processes, except under pmap, where each process
    has arrays of its own, of its devices.

    Attributes:
      mode: 'shard_map', 'jit' (automatic sharding) or 'pmap'.
      mesh: one axis, 'data'.
    """

    mode: str
    mesh: Mesh

    @classmethod
    def over(cls, mode: str, devices: list[jax.Device] | None = None) -> "DataParallel":
        """All devices of all processes, or those given."""
        devices = jax.devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
        return cls(mode, mesh)

    @property
    def num_devices(self) -> int:
        """Over all processes."""
        return self.mesh.size

    @property
    def axis_name(self) -> str | None:
        """The axis that a step averages over; None under plain jit."""
        return None if self.mode == "jit" else AXIS

    @property
    def num_local_devices(self) -> int:
        """Of this process."""
        return self.mesh.local_mesh.size

    def create(self, init: Callable[[jax.Array], PyTree], seed: int) -> PyTree:
        """Runs `init(seed)` on the devices: its result is on each of them.

        Under pmap each leaf has a leading axis of this process's devices, here and wherever a state
        is meant.

        Args:
          init: takes the seed, [], uint32: a value, so that one program serves all seeds.
          seed: from 0 to 2**32 - 1.
        """
        if self.mode == "pmap":
            devices = list(self.mesh.devices.flat)
            create = jax.pmap(lambda _, seed: init(seed), in_axes=(0, None), devices=devices)
            return create(np.arange(self.num_local_devices), np.uint32(seed))
        return jax.jit(init, out_shardings=self.replicated)(np.uint32(seed))

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
        donate = (0,) if donate_state else ()
        if self.mode == "pmap":
            devices = list(self.mesh.devices.flat)
            return jax.pmap(fn, AXIS, devices=devices, donate_argnums=donate)
        split = self._split(batch_axis)
        if self.mode == "shard_map":
            # check_vma off: the step averages gradients itself, as it must under pmap.
            fn = jax.shard_map(
                fn,
                mesh=self.mesh,
                in_specs=(P(), split.spec, *[P()] * num_replicated),
                out_specs=P(),
                check_vma=False,
            )
        return jax.jit(
            fn,
            in_shardings=(self.replicated, split, *[self.replicated] * num_replicated),
            out_shardings=self.replicated,
            donate_argnums=donate,
        )

    def put(self, batch: dict[str, np.ndarray], batch_axis: int = 0) -> dict[str, jax.Array]:
        """Lays this process's share of a batch over its devices, in one transfer.

        Args:
          batch: arrays [N, ...], or with `batch_axis` 1 a stack of them, [steps, N, ...].
          batch_axis: of the examples.
        """
        if self.mode == "pmap":
            # The devices lead, here too: [devices, N / devices, ...] or [devices, steps, ...].
            local = self.num_local_devices
            batch = {k: _devices_first(v, local, batch_axis) for k, v in batch.items()}
            return jax.device_put(batch, NamedSharding(self.mesh.local_mesh, P(AXIS)))
        put = functools.partial(jax.make_array_from_process_local_data, self._split(batch_axis))
        return jax.tree.map(put, batch)

    def replicate(self, arrays: PyTree) -> PyTree:
        """Lays arrays of the host, the same ones in every process, whole on every device."""
        if self.mode == "pmap":
            return self.spread(arrays)
        # Of a device's array, `device_put` would make one that lacks shards, where each of several
        # processes has one device; and it compares those of the host between the processes.
        put = functools.partial(jax.make_array_from_process_local_data, self.replicated)
        return jax.tree.map(put, arrays)

    def single(self, state: PyTree) -> PyTree:
        """A state as one replicated copy, without pmap's axis: what a checkpoint holds."""
        if self.mode != "pmap":
            return state
        first = jax.tree.map(lambda x: x[0], state)
        if self.num_local_devices == self.num_devices:
            return first
        return multihost_utils.host_local_array_to_global_array(first, self.mesh, P())

    def spread(self, state: PyTree) -> PyTree:
        """The inverse of `single`."""
        if self.mode != "pmap":
            return state
        devices = list(self.mesh.devices.flat)
        copy = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=devices)
        return copy(np.arange(self.num_local_devices), state)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, P())

    def fetch(self, metrics: dict[str, jax.Array], count: int = 1) -> list[dict[str, Any]]:
        """Waits for the metrics of a step, or of several, and brings them to the host.

        Args:
          metrics: of a step, or of several in one call, which are their first axis.
          count: of the steps.

        Returns:
          Those of each step: numbers, and arrays [L].
        """
        host = jax.device_get(metrics)
        if self.mode == "pmap":
            host = {name: values[0] for name, values in host.items()}
        if count == 1:
            host = {name: np.asarray(values)[None] for name, values in host.items()}
        steps = ({name: values[i] for name, values in host.items()} for i in range(count))
        return [{name: v if v.ndim else float(v) for name, v in step.items()} for step in steps]

    def _split(self, axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, P(*[None] * axis, AXIS))


def _devices_first(array: np.ndarray, num_devices: int, axis: int) -> np.ndarray:
    shape = (*array.shape[:axis], num_devices, -1, *array.shape[axis + 1 :])
    return np.moveaxis(array.reshape(shape), axis, 0)
