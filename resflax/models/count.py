"""Parameters, multiply-adds and activations of a network, from shapes alone."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.models import layers


@dataclasses.dataclass(frozen=True)
class Count:
    """What a network, or a part of one, costs for one image.

    Attributes:
      params: trainable parameters.
      macs: multiply-adds of the convolutions and dense layers. Biases, norms, activations, pooling
        and additions are not counted: the convention of the papers and of torchvision.
      activations: numbers that the convolutions and dense layers give out.
      output_shape: of the part, without the batch axis.
      parts: the same of the network's submodules, by name, in the order of their use.
    """

    params: int
    macs: int
    activations: int
    output_shape: tuple[int, ...] = ()
    parts: dict[str, "Count"] = dataclasses.field(default_factory=dict)


def count(model: nn.Module, input_shape: Sequence[int]) -> Count:
    """Counts a network's parameters and multiply-adds; nothing is computed or allocated.

    Args:
      model: a network of `create_model`.
      input_shape: of one image, (H, W, C).

    Returns:
      The counts, with one part for each submodule of the network.

    Raises:
      ValueError: if the network does not take such images.
    """
    macs: dict[str, int] = {}
    activations: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or not module.path:
            return out
        part = module.path[0]
        if len(module.path) == 1:
            shapes[part] = out.shape[1:]
        if isinstance(module, layers.Conv | nn.Dense):
            fan_in = args[0].shape[-1]
            if isinstance(module, layers.Conv):
                fan_in = math.prod(module.window) * fan_in // module.groups
            macs[part] = macs.get(part, 0) + out.size * fan_in
            activations[part] = activations.get(part, 0) + out.size
        return out

    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with nn.intercept_methods(record):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    params = {part: num_params(tree) for part, tree in variables["params"].items()}
    parts = {
        part: Count(params.get(part, 0), macs.get(part, 0), activations.get(part, 0), shape)
        for part, shape in shapes.items()
    }
    return Count(
        sum(params.values()),
        sum(macs.values()),
        sum(activations.values()),
        shapes["head"],
        parts,
    )


def num_params(tree: Any) -> int:
    """The number of scalars in a tree of arrays (or of their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
