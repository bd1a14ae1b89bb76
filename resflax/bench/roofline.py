"""How fast a network could be on a device: its arithmetic and its memory traffic, pass by pass.

The model is plain, and is what a compiler can reach that does not fuse into convolutions. A pass
takes the longer of its arithmetic at the device's peak and its bytes at the device's bandwidth, and
passes take place one after the other. With I and O the arrays that a layer reads and writes:

| layer                    | inference | training, forward     | training, backward             |
|--------------------------|-----------|-----------------------|--------------------------------|
| convolution, dense layer | I + O     | I + O                 | twice I + O, each as many MACs |
| norm and activation      | 2 O       | O (statistics), 2 O   | 2 O (sums), 3 O (gradient)     |
| norm of a projection     | nothing   | O; applied at the sum | 2 O, 3 O                       |
| sum with the shortcut    | O         | O, with the last norm | 2 O                            |
| squeeze-excite           | O         | O; applied at the sum | 3 O                            |
| pool of the stem         | I + O     | I + O                 | 2 I + O                        |

The first layer needs no gradient of the images. Strided 1x1 convolutions skip pixels. A layer reads
its kernel once in each pass; the optimizer reads three float32 arrays of the size of the parameters
and writes two. Other pools, concatenations and losses are left out, and so are caches: a batch
whose arrays fit in one may come out above 100 %.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.bench.case import Case
from resflax.models import gates, layers, residual
from resflax.models.count import num_params
from resflax.models.interception import intercepted
from resflax.models.stem import Stem


class Peaks(NamedTuple):
    """What a device was seen to do.

    Attributes:
      flops: floating-point operations a second, of a large matrix product.
      bandwidth: bytes read and written a second, of a large array.
    """

    flops: float
    bandwidth: float


class Pass(NamedTuple):
    """One reading and writing of arrays.

    Attributes:
      macs: multiply-adds, per image.
      activations: numbers read and written, per image.
      weights: numbers read and written, per step.
    """

    macs: int
    activations: int
    weights: int = 0


@dataclasses.dataclass
class _Sizes:
    """An interceptor of Flax that lists the passes of the modules which it sees being called."""

    trains: bool
    passes: list[Pass] = dataclasses.field(default_factory=list)
    convolutions: int = 0
    last_output: int = 0

    def __call__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and args:
            self.passes += self._of(context.module, _size(args[0]), _size(out))
        return out

    def _of(self, module: nn.Module, read: int, written: int) -> Iterator[Pass]:
        if layers.is_product(module):
            yield from self._convolution(module, read, written)
        elif layers.is_norm(module):
            yield from self._norm(module, written)
        elif isinstance(module, gates.Gate):
            yield from self._once_and(written, 3 * written)
        elif isinstance(module, residual.ResidualBlock) and module.spec.shortcut is not None:
            yield from self._once_and(written, 2 * written)
        elif isinstance(module, Stem) and written < self.last_output:
            pooled = self.last_output
            yield from self._once_and(pooled + written, 2 * pooled + written)

    def _convolution(self, module: nn.Module, read: int, written: int) -> Iterator[Pass]:
        kernel = module.variables["params"]["kernel"]
        macs = written * math.prod(kernel.shape[:-1])
        if kernel.shape[:-2] == (1, 1):
            read //= _step(module)
        times = 1
        if self.trains:
            times = 3 if self.convolutions else 2
        yield from [Pass(macs, read + written, kernel.size)] * times
        self.convolutions += 1
        self.last_output = written

    def _norm(self, module: nn.Module, size: int) -> Iterator[Pass]:
        if "shortcut" not in module.path:
            yield Pass(0, 2 * size)
        if self.trains:
            yield from (Pass(0, times * size) for times in (1, 2, 3))

    def _once_and(self, forward: int, backward: int) -> Iterator[Pass]:
        yield Pass(0, forward)
        if self.trains:
            yield Pass(0, backward)


def passes(case: Case) -> list[Pass]:
    """The passes of a step, from shapes alone."""
    sizes = _Sizes(case.trains)
    variables = case.variables  # made here, where no module is listed
    apply = functools.partial(case.plain.apply, train=False)
    image = jax.ShapeDtypeStruct((1, *case.image_shape), jnp.float32)
    with intercepted(sizes):
        jax.eval_shape(apply, variables, image)
    return sizes.passes


def bound(case: Case, peaks: Peaks) -> float:
    """Seconds that a step takes at least, by the model above."""
    width = case.dtype.itemsize
    seconds = 0.0
    for one in passes(case):
        num_bytes = width * (one.activations * case.batch + one.weights)
        seconds += max(2 * one.macs * case.batch / peaks.flops, num_bytes / peaks.bandwidth)
    if case.trains:
        seconds += 5 * 4 * num_params(case.variables["params"]) / peaks.bandwidth
    return seconds


def measure_peaks(dtype: jnp.dtype, side: int, num_bytes: int) -> Peaks:
    """The peaks of the device, the best of several tries.

    Args:
      dtype: of the matrices and arrays.
      side: of the matrices.
      num_bytes: of the array.
    """
    key = jax.random.key(0)
    # Random numbers: processors that save power are faster on zeros.
    matrix = jax.random.normal(key, (side, side), dtype)
    product = jax.jit(jnp.matmul)
    flops = 2 * side**3 / _best(lambda _: product(matrix, matrix), matrix)
    array = jax.random.normal(key, (num_bytes // jnp.dtype(dtype).itemsize,), dtype)
    num_bytes = array.nbytes
    # In place; and back again, so that the numbers stay as random as they are.
    update = jax.jit(lambda x: x * -1.0 + 0.25, donate_argnums=0)
    return Peaks(flops, 2 * num_bytes / _best(update, array))


def _best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of a call: of several turns the fastest, the first two apart."""
    calls, turns, warm_up = 5, 8, 2
    best = math.inf
    for turn in range(turns):
        start = time.perf_counter()
        for _ in range(calls):
            x = function(x)
        x.block_until_ready()
        if turn >= warm_up:
            best = min(best, (time.perf_counter() - start) / calls)
    return best


def _step(module: nn.Module) -> int:
    """Of how many pixels a convolution with a 1x1 kernel reads one."""
    if isinstance(module, layers.Conv):
        return module.stride**2
    strides = module.strides or 1  # of flax
    return strides**2 if isinstance(strides, int) else math.prod(strides)


def _size(x: Any) -> int:
    """Of an array; or of the images of what a norm leaves to be computed, its first."""
    return jax.tree.leaves(x)[0].size
