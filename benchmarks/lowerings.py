"""Times the operations of resflax.ops in each of their lowerings.

python -m benchmarks.lowerings [--batch N] [--repeats N] [--json FILE]

What it prints is what the choices in resflax.ops are made from: on another kind of machine, look
whether they still hold.
"""

import functools
import json
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import rich.console
import rich.table

from resflax.bench import report
from resflax.bench.rounds import Costs, Entry, Result, measure
from resflax.ops import conv, direct, native, norm, pool
from resflax.process import runtime
from resflax.process.arguments import Parser


class Operation(NamedTuple):
    """A function of arrays, and the ways to compute it.

    Attributes:
      name: for a person.
      shapes: of the arrays; the first are images.
      lowerings: by name; the first is XLA's own.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]
    lowerings: Mapping[Any, Callable[..., jax.Array]]


class Contender:
    """The value of an operation and its gradients with respect to all arrays, compiled."""

    def __init__(self, operation: Operation, lowering: str):
        keys = jax.random.split(jax.random.key(0), len(operation.shapes) + 1)
        arrays = [jax.random.normal(k, s) for k, s in zip(keys, operation.shapes, strict=False)]

        def value_and_gradients(dy: jax.Array, *arrays: jax.Array) -> Any:
            y, pull = jax.vjp(operation.lowerings[lowering], *arrays)
            return y, pull(dy)

        result = jax.eval_shape(operation.lowerings[lowering], *arrays)
        self._arrays = (jax.random.normal(keys[-1], result.shape), *arrays)
        self._run = jax.jit(value_and_gradients).lower(*self._arrays).compile()

    def run(self, steps: int) -> None:
        """Computes so many times."""
        for _ in range(steps):
            out = self._run(*self._arrays)
        jax.block_until_ready(out)

    def costs(self) -> Costs:
        """Nothing but time is looked at."""
        return Costs()


def operations(batch: int) -> Iterator[Operation]:
    """Those of ResNet-50, ResNeXt-50 (32x4d), ResNeXt-29 (8x64d) and ResNet-20.

    Args:
      batch: images; of ResNet-20, 8 times as many.
    """
    for size, channels, groups, stride in (
        (56, 64, 1, 1),
        (28, 128, 1, 1),
        (14, 256, 1, 1),
        (56, 128, 1, 2),
        (56, 128, 32, 1),
        (28, 256, 32, 1),
        (14, 512, 32, 1),
        (7, 1024, 32, 1),
        (56, 256, 32, 2),
        (32, 512, 8, 1),
    ):
        yield _convolution(batch, size, channels, channels, groups, stride)
    for size, channels in ((32, 16), (16, 32), (8, 64)):
        yield _convolution(8 * batch, size, channels, channels, 1, 1)
    yield _convolution(8 * batch, 32, 16, 32, 1, 2)
    yield _convolution(batch, 224, 3, 64, 1, 2, side=7)
    pointwise: list[conv.Lowering] = ["lax", "dot"]
    if native.usable():
        pointwise.append("native")
    for size, inputs, outputs in ((56, 64, 256), (28, 512, 128), (14, 256, 1024), (7, 2048, 512)):
        arrays = (batch, size, size, inputs), (1, 1, inputs, outputs)
        forms = {name: functools.partial(conv.conv2d, lowering=name) for name in pointwise}
        yield Operation(f"1x1 convolution, {inputs} to {outputs}, {size} px", arrays, forms)
    pooled: list[pool.Lowering] = ["lax", "index"]
    if native.usable():
        pooled.append("native")
    pools = {
        name: functools.partial(pool.max_pool, window=3, stride=2, padding=(1, 1), lowering=name)
        for name in pooled
    }
    yield Operation("3x3/2 max pool, 64, 112 px", [(batch, 112, 112, 64)], pools)
    for size, channels in ((56, 256), (14, 1024)):
        images = (batch, size, size, channels)
        norms = {"flax": _stock_norm, "ops.norm": _norm}
        shapes = [images, (channels,), (channels,), images]
        yield Operation(f"batch norm, addition, ReLU, {channels}, {size} px", shapes, norms)


def _convolution(
    batch: int, size: int, inputs: int, outputs: int, groups: int, stride: int, side: int = 3
) -> Operation:
    shapes = (batch, size, size, inputs), (side, side, inputs // groups, outputs)
    names: list[conv.Lowering] = ["lax", "blocks"]
    settings: dict[str, Any] = {
        "stride": stride,
        "padding": [(side // 2,) * 2] * 2,
        "groups": groups,
    }
    if direct.supports(*shapes, **settings) and native.available():
        names.append("native")
    forms = {name: functools.partial(conv.conv2d, lowering=name, **settings) for name in names}
    of = f"{groups} groups, " if groups > 1 else ""
    channels = f"{inputs}" if inputs == outputs else f"{inputs} to {outputs}"
    return Operation(
        f"{side}x{side}/{stride} convolution, {of}{channels}, {size} px", shapes, forms
    )


def _stock_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array) -> jax.Array:
    variables = {"params": {"scale": scale, "bias": bias}}
    y, _ = nn.BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    return nn.relu(y + shortcut)


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array) -> jax.Array:
    x, means, squares = norm.moments(x)
    mean = jnp.mean(means, axis=0)
    scale *= jax.lax.rsqrt(jnp.mean(squares, axis=0) - jnp.square(mean) + 1e-5)
    y = norm.Affine(x, scale[None], (bias - mean * scale)[None], means)
    return norm.relu(norm.add(shortcut, y))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="images; 8 times as many for 32 px")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--max-seconds", type=float, default=10.0, help="what takes longer runs but once"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all that is measured")
    options = parser.parse_args(argv)
    runtime.configure()
    load = report.load()
    measured = []
    console = rich.console.Console(stderr=True, highlight=False)
    for operation in operations(options.batch):
        console.print(operation.name, style="dim")
        entries = [
            Entry("ops", lowering, functools.partial(Contender, operation, lowering))
            for lowering in operation.lowerings
        ]
        results = measure(
            entries,
            repeats=options.repeats,
            steps=1,
            max_seconds=options.max_seconds,
            tell=lambda _: None,
        )
        measured.append((operation, results))
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(_table(measured))
    if options.json:
        command = shlex.join(["python", "-m", "benchmarks.lowerings", *argv])
        rows = [
            {"operation": o.name, "seconds": {r.form: r.seconds for r in results}}
            for o, results in measured
        ]
        document = report.document([], {}, command, {}, load) | {"measurements": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _table(measured: Sequence[tuple[Operation, Sequence[Result]]]) -> rich.table.Table:
    table = rich.table.Table(title="value and gradients, ms (and times as fast as the first)")
    table.add_column("operation", no_wrap=True)
    for heading in ("XLA's own, or flax's", "resflax.ops", "native"):
        table.add_column(heading, justify="right")
    for operation, results in measured:
        first = statistics.median(results[0].seconds)
        cells = [
            f"{r.form} {1000 * r.median:.1f} ({first / r.median:.1f})" if r.seconds else r.failure
            for r in results
        ]
        table.add_row(operation.name, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
