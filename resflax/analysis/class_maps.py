"""The maps of one class over the positions of an image: see resflax.analysis.cam."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resflax.analysis import gates, taps, units
from resflax.analysis.result import NothingError
from resflax.analysis.taps import Passed
from resflax.errors import UserError
from resflax.models import layers
from resflax.ops import pool

# Of the classifier's input: by so much may the mean of a map differ from it, for rounding.
_ROUNDING = 1e-2


class Maps(NamedTuple):
    """Of each image, float32.

    Attributes:
      logits: [N, K].
      classes: whose the maps are, int32 [N].
      activation: class activation maps; their means over the positions are the logits of these
        classes, [N, H, W].
      gradient: Grad-CAM, not negative, [N, H', W'].
    """

    logits: Any
    classes: Any
    activation: Any
    gradient: Any


def measure(
    model: nn.Module,
    variables: dict[str, Any],
    batches: Iterable[tuple[jax.Array, jax.Array]],
    stage: str | None = None,
    label: int | None = None,
) -> Maps:
    """The maps in evaluation mode.

    Args:
      model: the network, without loops.
      variables: 'params' and 'batch_stats'.
      batches: normalised images, [N, H, W, C], and their labels, which are not used.
      stage: whose map Grad-CAM is of, as the part behind the stage takes it in; None: the map that
        is averaged.
      label: the class whose maps they are; None: of each image, the predicted one.

    Raises:
      NothingError: if the network does not end in global average pooling and one dense layer.
      UserError: if it has no such stage.
    """
    compute: Callable[..., Any] | None = None
    found = []
    for images, _ in batches:
        compute = compute or _compiled(model, variables, images, stage, label)
        maps, error = jax.device_get(compute(variables, images))
        if error > _ROUNDING:
            raise _nothing()
        found.append(maps)
    return Maps(*map(np.concatenate, zip(*found, strict=True)))


def class_activation(
    features: jax.Array, head: Mapping[str, jax.Array], classes: jax.Array
) -> jax.Array:
    """sum_c W[c, k] * f[h, w, c] + b[k] (1512.04150, Equation 2, and the bias).

    Args:
      features: f, what is averaged, [N, H, W, C].
      head: W, 'kernel' [C, K], and b, 'bias' [K], if there is one.
      classes: k of each image, [N].

    Returns:
      float32 [N, H, W].
    """
    weights = head["kernel"][:, classes].T
    maps = _weighted(features, weights)
    return maps + head["bias"][classes][:, None, None] if "bias" in head else maps


def grad_cam(features: jax.Array, weights: jax.Array) -> jax.Array:
    """max(0, sum_c a[c] * f[h, w, c]) (1610.02391, Equation 2).

    Args:
      features: f, [N, H, W, C].
      weights: a, means over the positions of the logit's derivatives by f (Equation 1), [N, C].

    Returns:
      float32 [N, H, W].
    """
    return jax.nn.relu(_weighted(features, weights))


def _weighted(features: jax.Array, weights: jax.Array) -> jax.Array:
    full = features.astype(jnp.float32)
    return jnp.einsum("nhwc,nc->nhw", full, weights, precision=jax.lax.Precision.HIGHEST)


def _compiled(
    model: nn.Module,
    variables: dict[str, Any],
    images: jax.Array,
    stage: str | None,
    label: int | None,
) -> Callable[..., tuple[Maps, jax.Array]]:
    """From images to their maps, and by how much the classifier's input is not the map's mean."""
    apply = functools.partial(model.apply, train=False)
    passed = taps.shapes(apply, _select)(variables, images)
    last = _last(passed)
    behind = _behind(passed, stage)
    act = layers.act(units.activation(model))

    @jax.jit
    def compute(variables: Any, images: jax.Array) -> tuple[Maps, jax.Array]:
        logits, found = taps.recorded(apply, _select)(variables, images)
        classes = jnp.argmax(logits, axis=-1)
        classes = classes if label is None else jnp.full_like(classes, label)
        # A classifier without a dense layer has a map for each class.
        head = variables["params"]["head"]
        head = head if "kernel" in head else {"kernel": jnp.eye(logits.shape[-1])}
        features, error = _averaged(found[last].output, act, _pooled(found))
        activation = class_activation(features, head, classes)
        if behind is None:
            weights = head["kernel"][:, classes].T / (features.shape[1] * features.shape[2])
        else:
            features = found[behind].input
            weights = _weights(apply, behind, features, classes, variables, images)
        return Maps(logits, classes, activation, grad_cam(features, weights)), error

    return compute


def _weights(
    apply: Callable[..., Any],
    behind: str,
    features: jax.Array,
    classes: jax.Array,
    variables: Any,
    images: jax.Array,
) -> jax.Array:
    """Means over the positions of the derivatives of a class's logit by what a part takes in."""

    def score(offset: jax.Array) -> jax.Array:
        def shift(name: str, method: Callable[..., Any], x: Any, *rest: Any, **more: Any) -> Any:
            return method(x + offset if name == behind else x, *rest, **more)

        logits = taps.edited(apply, _select, shift)(variables, images)
        return jnp.sum(jnp.take_along_axis(logits, classes[:, None], axis=-1))

    return pool.global_avg_pool(jax.grad(score)(jnp.zeros_like(features)))


def _select(module: nn.Module, method: str) -> str | None:
    """Selects the parts of a network, and the last convolution of one without a dense layer."""
    name = "/".join(module.path)
    chosen = len(module.path) == 1 or name == "head/conv"
    return name if chosen and method == "__call__" else None


def _pooled(passed: dict[str, Passed]) -> jax.Array:
    """What is to be the mean of the last map, [N, C]; of something else it has other axes."""
    head = passed["head"]
    return head.output if "head/conv" in passed else head.input


def _last(passed: dict[str, Passed]) -> str:
    """The part that gives out the last map."""
    pooled = _pooled(passed)
    maps = [name for name, p in passed.items() if p.output.ndim == 4]
    if pooled.ndim != 2 or not maps or passed[maps[-1]].output.shape[-1] != pooled.shape[-1]:
        raise _nothing()
    return maps[-1]


def _averaged(
    y: jax.Array, act: Callable[..., jax.Array], pooled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The last map: `y` or its activation, whose mean is `pooled`; and by what it is not."""
    candidates = y, act(y)
    scale = jnp.max(jnp.abs(pooled)) + jnp.finfo(jnp.float32).tiny
    errors = jnp.stack(
        [jnp.max(jnp.abs(pool.global_avg_pool(c) - pooled)) / scale for c in candidates]
    )
    return jnp.where(errors[0] <= errors[1], candidates[0], candidates[1]), jnp.min(errors)


def _behind(passed: dict[str, Passed], stage: str | None) -> str | None:
    """The part that takes in the map of a stage; None if that is the map that is averaged."""
    if stage is None:
        return None
    parts = [name for name in passed if "/" not in name]
    last = {
        gates.stage(name): i
        for i, name in enumerate(parts)
        if passed[name].output.ndim == 4 and not name.startswith(("dropout", "norm", "head"))
    }
    if stage not in last:
        raise UserError(f"--stage {stage} is not one of {', '.join(last)}.")
    name = parts[last[stage] + 1]
    return name if passed[name].input.ndim == 4 else None


def _nothing() -> NothingError:
    return NothingError(
        "has no global average pooling right before one dense layer, so that there is no class "
        "activation map; resnet*, resnext*, densenet*, *inception*, googlenet and cifar_* have it."
    )
