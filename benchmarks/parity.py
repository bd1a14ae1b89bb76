"""Our logits beside torchvision's and timm's, for every network that both have.

python -m benchmarks.parity ['*resnext*'] [--output results/parity.csv]

Needs torch, torchvision and timm (the package's extra 'torch'). Both networks have the same random
weights, see `peers.fill`, and see the same random images, of an even and an odd size.
"""

import csv
import dataclasses
import fnmatch
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from resflax.interop import peers
from resflax.interop.torch import from_torch
from resflax.interop.weights import Variables
from resflax.process.arguments import Parser, path_option

# Of the largest difference of logits, as a share of the largest logit. float32 sums in another
# order come to half of it in the deepest networks; torch's own float32 and float64 differ as much.
TOLERANCE = 1e-4

COLUMNS = (
    "model",
    "overrides",
    "library",
    "peer",
    "image_size",
    "params",
    "difference",
    "jax",
    "peer_version",
)
_KEY = COLUMNS[:5]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of ours and its counterpart.

    Attributes:
      library: 'torchvision' or 'timm'.
      peer: its name for the network.
      model: ours.
      overrides: arguments of our network.
      arguments: of the library's.
      image_sizes: sides of the images, pixels.
      filled_at: side of the images that give the norms their statistics, pixels.
    """

    library: str
    peer: str
    model: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_sizes: tuple[int, ...] = (96, 97)
    filled_at: int = 128


def cases() -> Iterator[Case]:
    """Every network that is known in one of the libraries."""
    yield from _resnets()
    yield from _se_resnets()
    for d in (18, 34, 50, 101, 152):
        yield Case("timm", f"resnetv2_{d}", f"preact_resnet{d}")
    for library in ("torchvision", "timm"):
        for d in (121, 161, 169, 201):
            yield Case(library, f"densenet{d}", f"densenet{d}")
        for d in (11, 13, 16, 19):
            for name in (f"vgg{d}", f"vgg{d}_bn"):
                # Larger than 224 pixels: fc6 on several positions, or on means of them.
                yield Case(library, name, name, image_sizes=(96, 257))
    yield Case("torchvision", "alexnet", "alexnet_owt")
    yield from _inceptions()


def _resnets() -> Iterator[Case]:
    for library in ("torchvision", "timm"):
        for d in (18, 34, 50, 101, 152):
            yield Case(library, f"resnet{d}", f"resnet{d}")
        for name in ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"):
            yield Case(library, name, name)
        for d in (50, 101):
            yield Case(library, f"wide_resnet{d}_2", f"wide_resnet{d}_2")
    yield Case("timm", "resnet26", "resnet50", {"depth": 26})
    yield Case("timm", "resnet200", "resnet200")
    yield Case("timm", "resnet50_gn", "resnet50")
    yield Case("timm", "resnext101_32x4d", "resnext101_32x4d")
    yield Case("timm", "resnext101_32x16d", "resnext101_32x8d", {"base_width": 16})


def _se_resnets() -> Iterator[Case]:
    for d in (18, 34, 50, 101, 152):
        yield Case("timm", f"seresnet{d}", f"se_resnet{d}")
        yield Case("timm", f"legacy_seresnet{d}", f"se_resnet{d}")
    for name in ("50_32x4d", "101_32x4d", "101_32x8d", "101_64x4d"):
        yield Case("timm", f"seresnext{name}", f"se_resnext{name}")
    yield Case("timm", "legacy_seresnext26_32x4d", "se_resnext50_32x4d", {"depth": 26})
    for d in (50, 101):
        yield Case("timm", f"legacy_seresnext{d}_32x4d", f"se_resnext{d}_32x4d")
    yield Case("timm", "senet154", "senet154")
    yield Case("timm", "legacy_senet154", "senet154")


def _inceptions() -> Iterator[Case]:
    for aux in (False, True):
        yield Case("torchvision", "googlenet", "googlenet_bn", arguments={"aux_logits": aux})
        yield Case(
            "torchvision",
            "inception_v3",
            "inception_v3",
            arguments={"aux_logits": aux},
            image_sizes=(96, 107),
            # The auxiliary classifier, which runs in training, takes no smaller images.
            filled_at=299 if aux else 128,
        )
    for name in ("inception_v3", "inception_v4", "inception_resnet_v2"):
        yield Case("timm", name, name, image_sizes=(96, 107))


def compare(case: Case) -> Iterator[dict[str, Any]]:
    """Yields a row of the table for every image size of a case."""
    peer = peers.build(case.library, case.peer, **case.arguments)
    peers.fill(peer, case.filled_at)
    model, variables = from_torch(case.model, peer.state_dict(), **case.overrides)
    for size in case.image_sizes:
        yield {
            "model": case.model,
            "overrides": json.dumps(dict(case.overrides)) if case.overrides else "",
            "library": case.library,
            "peer": " ".join([case.peer, *(f"{k}={v}" for k, v in case.arguments.items())]),
            "image_size": size,
            "params": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
            "difference": f"{difference(model, variables, peer, size):.1e}",
            "jax": jax.__version__,
            "peer_version": peers.load(case.library).__version__.split("+")[0],
        }


def difference(
    model: nn.Module, variables: Variables, peer: Any, image_size: int, seed: int = 0
) -> float:
    """The largest difference of the logits, as a share of the largest logit of the library's.

    Args:
      model: our network.
      variables: its variables.
      peer: the library's network, with the same weights.
      image_size: side of two random images, pixels.
      seed: of the images.
    """
    import torch

    images = np.random.default_rng(seed).normal(size=(2, image_size, image_size, 3))
    images = images.astype(np.float32)
    with torch.no_grad():
        wanted = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    # It runs once, so that to optimise it would take longer than to run it.
    apply = jax.jit(
        functools.partial(model.apply, train=False),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    logits = np.asarray(apply(variables, images))
    return float(np.abs(logits - wanted).max() / np.abs(wanted).max())


def main(arguments: list[str] | None = None) -> int:
    """Compares, prints a line for every comparison, and writes the table if asked to."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="?", default="*", help="of our names or the library's")
    parser.add_argument("--output", type=path_option, help="a .csv; its other rows are kept")
    options = parser.parse_args(arguments)
    rows = _read(options.output) if options.output and options.output.exists() else {}
    worst = 0.0
    for case in cases():
        if not any(fnmatch.fnmatch(n, options.pattern) for n in (case.model, case.peer)):
            continue
        for row in compare(case):
            print(*(row[column] for column in COLUMNS), flush=True)
            worst = max(worst, float(row["difference"]))
            rows[_key(row)] = row
            if options.output:
                _write(options.output, rows)
    print(f"the largest difference is {worst:.1e}; {TOLERANCE:.0e} is tolerated")
    return int(not worst <= TOLERANCE)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in _KEY)


def _read(path: pathlib.Path) -> dict[tuple[str, ...], Mapping[str, Any]]:
    with path.open(newline="") as file:
        return {_key(row): row for row in csv.DictReader(file)}


def _write(path: pathlib.Path, rows: Mapping[tuple[str, ...], Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    sys.exit(main())
