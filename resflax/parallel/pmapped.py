"""Arrays with a leading axis of this process's devices, for pmap."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resflax.parallel.sharded import AXIS, PyTree, mesh_of, rows


class Pmapped:
    """DataParallel by pmap.

    Each leaf of a state, of metrics and of what `replicate` gives has a leading axis of this
    process's devices.

    Attributes:
      mode: 'pmap'.
      axis_name: 'data'.
      mesh: one axis, 'data', over all processes.
      replicated: the sharding of an array that every device holds whole, as `single` gives it.
    """

    mode = "pmap"
    axis_name = AXIS

    def __init__(self, devices: list[jax.Device]):
        self.mesh = mesh_of(devices)
        self.replicated = NamedSharding(self.mesh, P())
        self._devices = devices

    @property
    def num_devices(self) -> int:
        """Over all processes."""
        return self.mesh.size

    def create(self, init: Callable[[jax.Array], PyTree], seed: int) -> PyTree:
        """See DataParallel."""
        create = jax.pmap(lambda _, seed: init(seed), in_axes=(0, None), devices=self._devices)
        return create(np.arange(self._num_local), np.uint32(seed))

    def step(
        self,
        fn: Callable[..., PyTree],
        *,
        donate_state: bool,
        batch_axis: int = 0,
        num_replicated: int = 0,
    ) -> Callable[..., PyTree]:
        """See DataParallel; the devices lead in every argument, so that all are split alike."""
        donate = (0,) if donate_state else ()
        return jax.pmap(fn, AXIS, devices=self._devices, donate_argnums=donate)

    def put(self, batch: dict[str, np.ndarray], batch_axis: int = 0) -> dict[str, jax.Array]:
        """See DataParallel; gives [devices, N / devices, ...] or [devices, steps, ...]."""
        batch = {k: _devices_first(v, self._num_local, batch_axis) for k, v in batch.items()}
        return jax.device_put(batch, NamedSharding(self.mesh.local_mesh, P(AXIS)))

    def replicate(self, arrays: PyTree) -> PyTree:
        """See DataParallel."""
        return self.spread(arrays)

    def single(self, state: PyTree) -> PyTree:
        """See DataParallel."""
        first = jax.tree.map(lambda x: x[0], state)
        if self._num_local == self.num_devices:
            return first
        return multihost_utils.host_local_array_to_global_array(first, self.mesh, P())

    def spread(self, state: PyTree) -> PyTree:
        """See DataParallel."""
        copy = jax.pmap(lambda _, x: x, in_axes=(0, None), devices=self._devices)
        return copy(np.arange(self._num_local), state)

    def fetch(self, metrics: dict[str, jax.Array], count: int = 1) -> list[dict[str, Any]]:
        """See DataParallel."""
        host = jax.device_get(metrics)
        return rows({name: values[0] for name, values in host.items()}, count)

    @property
    def _num_local(self) -> int:
        return self.mesh.local_mesh.size


def _devices_first(array: np.ndarray, num_devices: int, axis: int) -> np.ndarray:
    shape = (*array.shape[:axis], num_devices, -1, *array.shape[axis + 1 :])
    return np.moveaxis(array.reshape(shape), axis, 0)
