"""Arrays over all processes' devices, for jit and shard_map."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

AXIS = "data"


def mesh_of(devices: list[jax.Device]) -> Mesh:
    """A mesh of one axis, 'data'."""
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def rows(metrics: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The metrics of each of `count` steps, on the host: numbers, and arrays [L]."""
    if count == 1:
        metrics = {name: np.asarray(values)[None] for name, values in metrics.items()}
    steps = ({name: values[i] for name, values in metrics.items()} for i in range(count))
    return [{name: v if v.ndim else float(v) for name, v in step.items()} for step in steps]


class Sharded:
    """DataParallel by jit's automatic sharding, or by shard_map.

    Attributes:
      mode: 'shard_map' or 'jit'.
      mesh: one axis, 'data'.
      replicated: the sharding of an array that every device holds whole.
    """

    def __init__(self, mode: str, devices: list[jax.Device]):
        self.mode = mode
        self.mesh = mesh_of(devices)
        self.replicated = NamedSharding(self.mesh, P())

    @property
    def num_devices(self) -> int:
        """Over all processes."""
        return self.mesh.size

    @property
    def axis_name(self) -> str | None:
        """None under plain jit."""
        return None if self.mode == "jit" else AXIS

    def create(self, init: Callable[[jax.Array], PyTree], seed: int) -> PyTree:
        """See DataParallel."""
        return jax.jit(init, out_shardings=self.replicated)(np.uint32(seed))

    def step(
        self,
        fn: Callable[..., PyTree],
        *,
        donate_state: bool,
        batch_axis: int = 0,
        num_replicated: int = 0,
    ) -> Callable[..., PyTree]:
        """See DataParallel."""
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
            donate_argnums=(0,) if donate_state else (),
        )

    def put(self, batch: dict[str, np.ndarray], batch_axis: int = 0) -> dict[str, jax.Array]:
        """See DataParallel."""
        put = functools.partial(jax.make_array_from_process_local_data, self._split(batch_axis))
        return jax.tree.map(put, batch)

    def replicate(self, arrays: PyTree) -> PyTree:
        """See DataParallel."""
        # Of a device's array, `device_put` would make one that lacks shards, where each of several
        # processes has one device; and it compares those of the host between the processes.
        put = functools.partial(jax.make_array_from_process_local_data, self.replicated)
        return jax.tree.map(put, arrays)

    def single(self, state: PyTree) -> PyTree:
        """The state as it is."""
        return state

    def spread(self, state: PyTree) -> PyTree:
        """The state as it is."""
        return state

    def fetch(self, metrics: dict[str, jax.Array], count: int = 1) -> list[dict[str, Any]]:
        """See DataParallel."""
        return rows(jax.device_get(metrics), count)

    def _split(self, axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, P(*[None] * axis, AXIS))
