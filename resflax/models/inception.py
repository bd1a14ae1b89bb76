"""What the Inception networks are made of: tables of branches, and the modules that run them.

A network is a table of parts, in the order of their use. A part is a `chain` of layers, or a
`mixed` module: branches on one input, whose results are concatenated. A branch is a tuple of specs:
a `Conv` (with norm and ReLU), a `Fork` of several, or a function of images, such as a pool.
"""

import dataclasses
import functools
import itertools
import string
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models import checks, gates, repeat
from resflax.models import layers as base
from resflax.models.constructors import ModuleDef
from resflax.ops import norm as norm_ops
from resflax.ops import pool

VALID = (0, 0)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution, norm and ReLU: see layers.Conv for the fields; padding None: the same size."""

    filters: int
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    padding: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Fork:
    """Convolutions of one input, concatenated: where a branch splits once more."""

    convs: tuple[Conv, ...]


Spec = Conv | Fork | Callable[[jax.Array], jax.Array]
Branch = tuple[Spec, ...]

# Constructor of a part of a network, to which the network adds `layers` and `name`.
Part = Callable[..., nn.Module]

# Without padding: TensorFlow's 'VALID'.
MAX_POOL = functools.partial(pool.max_pool, window=3, stride=2, padding=VALID)
# Rounds the size up, as Caffe does.
CEIL_MAX_POOL = functools.partial(pool.max_pool, window=3, stride=2, padding=(0, 1))
SAME_MAX_POOL = functools.partial(pool.max_pool, window=3, stride=1, padding=(1, 1))


@dataclasses.dataclass(frozen=True)
class Layers:
    """The constructors that a network hands down to its parts, with dtype, mode and axis bound.

    Attributes:
      conv: of layers.Conv.
      norm: of the norm after every convolution; None: there is none.
      gate: of the squeeze-excite layer; None: there is none.
    """

    conv: ModuleDef
    norm: ModuleDef | None
    gate: ModuleDef | None


class ConvNorm(nn.Module):
    """The convolution of a spec, its norm if the network has any, and a ReLU."""

    spec: Conv
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H', W', filters]."""
        x = self.layers.conv(**dataclasses.asdict(self.spec), name="conv")(x)
        if self.layers.norm is not None:
            x = self.layers.norm(name="norm")(x)
        return norm_ops.relu(x)


class Chain(nn.Module):
    """Layers one after another."""

    specs: Branch
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H', W', C']."""
        return run(self.specs, x, self.layers)


class Inception(nn.Module):
    """Branches on one input, concatenated in their order, and a gate on the result.

    Attributes:
      branches: their specs.
      layers: the network's.
      gated: whether the gate of the network, if it has one, stands here.
    """

    branches: tuple[Branch, ...]
    layers: Layers
    gated: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H', W', the sum of the branches' channels]."""
        y = concatenate(self.branches, x, self.layers)
        if self.gated and self.layers.gate is not None:
            y = self.layers.gate(name="se")(y)
        return y


def chain(*specs: Spec) -> Part:
    """A part that applies the specs one after another."""
    return functools.partial(Chain, specs)


def mixed(*branches: Branch, gated: bool = True) -> Part:
    """A part that concatenates branches."""
    return functools.partial(Inception, branches, gated=gated)


def concatenate(branches: tuple[Branch, ...], x: jax.Array, layers: Layers) -> jax.Array:
    """Runs every branch on `x`, inside a compact method; their channels follow one another."""
    results = [run(branch, x, layers, f"branch{i}_") for i, branch in enumerate(branches, 1)]
    return jnp.concatenate(results, axis=-1)


def run(specs: Branch, x: jax.Array, layers: Layers, prefix: str = "") -> jax.Array:
    """Applies specs one after another, inside a compact method; convolutions are counted from 1."""
    convs = 0
    for spec in specs:
        if isinstance(spec, Conv):
            convs += 1
            x = ConvNorm(spec, layers, name=f"{prefix}conv{convs}")(x)
        elif isinstance(spec, Fork):
            convs += 1
            forked = [
                ConvNorm(conv, layers, name=f"{prefix}conv{convs}{letter}")(x)
                for letter, conv in zip(string.ascii_lowercase, spec.convs, strict=False)
            ]
            x = jnp.concatenate(forked, axis=-1)
        else:
            x = spec(x)
    return x


class InceptionNet(nn.Module):
    """The network of a table: its parts, the mean over the positions, dropout, the classifier.

    A subclass has the table and the fields on which it depends.

    Variables: 'params' and, for the running means and variances, 'batch_stats'; random numbers:
    'dropout' where a rate is not zero and `train` is true.

    Attributes:
      num_classes: units of the classifier.
      se_reduction: of the squeeze-excite gates; 0: no gates.
      se_squeeze, se_gate, se_bias: see gates.SqueezeExcite.
      dropout: rate before the classifier.
      norm_scale: whether batch norms have a scale; TensorFlow's and Keras' Inception nets have not.
      bn_momentum: share of the old running statistics that a training step keeps.
      bn_epsilon: added to the variance.
      axis_name: the mapped axis over which batch norm averages its statistics; None: none.
      scan: equal parts in a row that run as one loop if they are at least so many; 0: none do. See
        models.repeat.
      packed: whether the variables of such parts are stacked under one name: see `loops`.
      dtype: of the computation. Parameters, statistics and logits are float32.
    """

    num_classes: int = 1000
    se_reduction: int = 0
    se_squeeze: str = "avg"
    se_gate: str = "sigmoid"
    se_bias: bool = True
    dropout: float = 0.0
    norm_scale: bool = True
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3
    axis_name: str | None = None
    scan: int = 16
    packed: bool = False
    dtype: jnp.dtype = jnp.float32

    # Of the side of an image, pixels: with less, nothing is left after the unpadded layers.
    smallest_image: ClassVar[int] = 75

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, features: bool = False
    ) -> jax.Array | dict[str, jax.Array]:
        """Computes logits.

        Auxiliary classifiers, where the network has them, run in training: their logits, float32
        [N, num_classes] each, are sown as ('intermediates', 'aux_logits'), from the first head to
        the last, for a training loss to weight. Their parameters exist in any mode.

        Args:
          images: float [N, H, W, C], normalised.
          train: whether batch norm uses and updates the batch's statistics, and dropout drops.
          features: whether to return what comes out of every part of the network.

        Returns:
          float32 [N, num_classes]; with `features`, that and the maps before it: those of the parts
          of the table [N, H', W', C'], by their names (of parts that run as a loop, the last
          one's), 'pooled' [N, C], 'logits'.

        Raises:
          UserError: if `images` has not four axes, or is too small for the unpadded layers.
        """
        self._check_images(images)
        layers = self.layers(train)
        heads = self.aux_parts(train)
        outputs: dict[str, jax.Array] = {}
        x = images
        table = self.parts()
        for names in self._equal_parts(table):
            outputs |= self._run(table[names[0]], names, layers, x)
            x = outputs[names[-1]]
            if names[-1] in heads and (train or self.is_initializing()):
                logits = heads[names[-1]](layers=layers, name=f"{names[-1]}_aux")(x)
                self.sow("intermediates", "aux_logits", logits)
        x = outputs["pooled"] = pool.global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        head = nn.Dense(self.num_classes, kernel_init=base.torch_uniform, name="head")
        outputs["logits"] = head(x)
        return outputs if features else outputs["logits"]

    @property
    def loops(self) -> repeat.Loops:
        """The parts whose variables are packed."""
        runs = self._equal_parts(self.parts())
        return tuple(names for names in runs if self.packed and self._loops(names))

    def _loops(self, names: tuple[str, ...]) -> bool:
        return 1 < len(names) >= self.scan > 0

    def _equal_parts(self, table: dict[str, Part]) -> list[tuple[str, ...]]:
        """The names of the table; those of one and the same part in a row are together."""
        runs = itertools.groupby(table, key=lambda name: id(table[name]))
        return [tuple(names) for _, names in runs]

    def _run(
        self, part: Part, names: tuple[str, ...], layers: Layers, x: jax.Array
    ) -> dict[str, jax.Array]:
        """Applies a part as often as it has names; what comes out, by name: of a loop, the last."""
        loops = self._loops(names)
        if len(names) > 1 and self.is_initializing():
            packed = self.packed and loops
            repeat.create(self, part(layers=layers, parent=None), names, x, packed=packed)
        if loops:
            block = part(layers=layers, parent=None)
            return {names[-1]: repeat.loop(self, block, names, x, packed=self.packed)}
        outputs = {}
        for name in names:
            x = outputs[name] = part(layers=layers, name=name)(x)
        return outputs

    def parts(self) -> dict[str, Part]:
        """The table: the network's parts by their names, in the order of their use."""
        raise NotImplementedError

    def aux_parts(self, train: bool) -> dict[str, Part]:
        """Auxiliary classifiers, by the part whose result they take."""
        return {}

    def layers(self, train: bool) -> Layers:
        """The layers that all parts are made of."""
        norm = functools.partial(
            base.BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            use_scale=self.norm_scale,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        gate = functools.partial(
            gates.SqueezeExcite,
            self.se_reduction,
            self.se_squeeze,
            self.se_gate,
            self.se_bias,
            dtype=self.dtype,
        )
        conv = functools.partial(base.Conv, dtype=self.dtype)
        return Layers(conv, norm, gate if self.se_reduction else None)

    def _check_images(self, images: jax.Array) -> None:
        if images.ndim != 4 or min(images.shape[1:3]) < self.smallest_image:
            raise UserError(
                f"images must be [N, H, W, C] with H and W at least {self.smallest_image} for "
                f"{type(self).__name__}; their shape is {images.shape}."
            )


Net = TypeVar("Net", bound=InceptionNet)


def checked(model: Net, narrowest_gate: int) -> Net:
    """Returns `model`, or raises UserError where its fields make no network.

    Args:
      model: the network.
      narrowest_gate: the fewest channels that a squeeze-excite gate of the network scales.
    """
    checks.choices(model, {"se_squeeze": gates.SQUEEZES, "se_gate": gates.SIGMOIDS})
    checks.positive(model, "num_classes")
    checks.rates(model, *(name for name in ("dropout", "aux_dropout") if hasattr(model, name)))
    if model.scan < 0:
        raise UserError(f"scan {model.scan} must be 0 (no loops) or a number of equal parts.")
    if not 0 <= model.se_reduction <= narrowest_gate:
        raise UserError(
            f"se_reduction {model.se_reduction} must be 0 (no gates) or more, and at most "
            f"{narrowest_gate}, the channels of the narrowest module."
        )
    return model


def checked_stage_sizes(sizes: Sequence[int], published: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers of modules on each grid as a tuple, or raises UserError."""
    if len(sizes) != len(published) or min(sizes) < 1:
        raise UserError(
            f"stage_sizes {tuple(sizes)} must be {len(published)} numbers of at least 1; the "
            f"published ones are {published}."
        )
    return tuple(sizes)
