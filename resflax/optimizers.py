"""Learning-rate schedules and optimizers, from the config's units to steps.

OPTIMIZERS is the table of their names. To add one, write its constructor and add a row: it maps the
schedule and the decay, a transformation, to the transformations of a clipped gradient, in their
order. The decay's place among them makes it coupled or decoupled. Arguments that have a default
become the fields of `config.optim.NAME` (see resflax.signature).
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import optax
import optax.contrib
from optax import GradientTransformation as Transform

from resflax import signature
from resflax.errors import UserError

Path = tuple[Any, ...]
# (regular expression that begins paths of parameters, factor of the rate, factor of the decay)
Multipliers = Sequence[tuple[str, float, float]]

_LARGEST = 1e30


def learning_rate(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step.

    Args:
      config: of the run. The peak is `optim.lr` per 256 images of a batch (Goyal 2017, arXiv
        1706.02677), reached linearly from zero in `optim.warmup_epochs`.
      steps_per_epoch: steps in an epoch.

    Raises:
      UserError: if there are more steps than are counted in 32 bits.
    """
    epochs, batch_size, config = config.train.epochs, config.train.batch_size, config.optim
    peak = config.lr * batch_size / 256
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = round(epochs * steps_per_epoch)
    if total >= 2**31:
        raise UserError(f"config.train.epochs {epochs} are {total:,} steps, more than 2**31 - 1.")
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(1, total - warmup))
    elif config.schedule == "exponential":
        steps = max(1, round(config.decay_epochs * steps_per_epoch))
        decay = optax.exponential_decay(peak, steps, config.step_factor, staircase=True)
    else:
        drops = {
            round(e * steps_per_epoch) - warmup: config.step_factor for e in config.step_epochs
        }
        decay = optax.piecewise_constant_schedule(peak, drops)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def on_processor(schedule: optax.Schedule) -> Callable[[int], float]:
    """A schedule's rates as numbers, to be logged, from a processor where there is one.

    On an accelerator each would be a program of its own between the steps'.

    Args:
      schedule: of the learning rate.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators alone
        device = jax.local_devices()[0]
    compiled = jax.jit(schedule)

    def rate(step: int) -> float:
        with jax.default_device(device):
            return float(compiled(step))

    return rate


def sgd(
    rate: optax.Schedule, decay: Transform, *, momentum: float, nesterov: bool
) -> tuple[Transform, ...]:
    """Stochastic gradient descent with momentum and coupled L2, as PyTorch's SGD."""
    return decay, optax.sgd(rate, momentum or None, nesterov)


def rmsprop(
    rate: optax.Schedule,
    decay: Transform,
    *,
    rms_decay: float,
    rms_epsilon: float,
    momentum: float,
    nesterov: bool,
) -> tuple[Transform, ...]:
    """RMSProp with coupled L2, its epsilon added to the mean square, under the root (as in TF)."""
    return decay, optax.rmsprop(
        rate,
        rms_decay,
        rms_epsilon,
        initial_scale=1.0,
        momentum=momentum or None,
        nesterov=nesterov,
    )


def adamw(
    rate: optax.Schedule,
    decay: Transform,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Transform, ...]:
    """Adam with decoupled decay (Loshchilov 2019, arXiv 1711.05101), as PyTorch's AdamW.

    Args:
      rate: by step.
      decay: decoupled.
      b1: share of the mean gradient that a step keeps.
      b2: share of the mean squared gradient that a step keeps.
      eps: added to the root of the mean square.
    """
    _require_adam(b1, b2, eps)
    return optax.scale_by_adam(b1, b2, eps), decay, optax.scale_by_learning_rate(rate)


def lamb(
    rate: optax.Schedule,
    decay: Transform,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> tuple[Transform, ...]:
    """AdamW whose update of each array has the array's norm (You 2020, arXiv 1904.00962).

    Args:
      rate: by step.
      decay: decoupled; part of the update that is scaled, as in Algorithm 2.
      b1: share of the mean gradient that a step keeps.
      b2: share of the mean squared gradient that a step keeps.
      eps: added to the root of the mean square.
    """
    _require_adam(b1, b2, eps)
    scaled = optax.scale_by_adam(b1, b2, eps), decay, optax.scale_by_trust_ratio()
    return *scaled, optax.scale_by_learning_rate(rate)


def lars(
    rate: optax.Schedule,
    decay: Transform,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
) -> tuple[Transform, ...]:
    """SGD with coupled L2 and a rate for each kernel by its norm (You 2017, arXiv 1708.03888).

    The rate of norms and biases is not scaled, as in MLPerf's reference.

    Args:
      rate: by step.
      decay: coupled.
      momentum: share of the last update that a step keeps.
      nesterov: or plain momentum.
      trust_coefficient: ratio of a gradient's norm to the kernel's.
      eps: added to the gradient's norm.
    """
    signature.require(0.0, 1.0, momentum=momentum)
    signature.require(0.0, _LARGEST, trust_coefficient=trust_coefficient, eps=eps)
    ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    scaled = optax.masked(ratio, _kernels), optax.scale_by_learning_rate(rate)
    return decay, *scaled, optax.trace(momentum, nesterov)


def lion(
    rate: optax.Schedule, decay: Transform, *, b1: float = 0.9, b2: float = 0.99
) -> tuple[Transform, ...]:
    """The sign of a momentum, with decoupled decay (Chen 2023, arXiv 2302.06675).

    Args:
      rate: by step; 3 to 10 times less than AdamW's, with as many times the decay.
      decay: decoupled.
      b1: share of the mean gradient in what the sign is taken of.
      b2: share of the mean gradient that a step keeps.
    """
    signature.require(0.0, 1.0, b1=b1, b2=b2)
    return optax.scale_by_lion(b1, b2), decay, optax.scale_by_learning_rate(rate)


def muon(
    rate: optax.Schedule,
    decay: Transform,
    *,
    beta: float = 0.95,
    rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Transform, ...]:
    """Orthogonalised Nesterov momentum (Jordan 2024, kellerjordan.github.io/posts/muon).

    A convolution's kernel is a matrix [k_h k_w C_in, C_out]. The classifier, norms and biases have
    AdamW with Nesterov momentum, at the same rate.

    Args:
      rate: by step, as for AdamW.
      decay: decoupled.
      beta: share of the momentum that a step keeps.
      rms: root mean square of a matrix's update, per unit of the rate, so that it is that of AdamW
        (Liu 2025, arXiv 2502.16982, Section 2.2).
      b1: of AdamW.
      b2: of AdamW.
      eps: of AdamW, and added to the norm that a matrix is divided by.
    """
    signature.require(0.0, 1.0, beta=beta)
    signature.require(0.0, _LARGEST, rms=rms)
    _require_adam(b1, b2, eps)
    direction = optax.contrib.muon(
        -1.0,  # the direction's rate and sign come after the decay
        beta=beta,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=rms,
    )
    return direction, decay, optax.scale_by_learning_rate(rate)


OPTIMIZERS: dict[str, Callable[..., tuple[Transform, ...]]] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
}

# Those that look at a whole array, which must then be one layer's.
_LAYERWISE = {"lamb", "lars", "muon"}


def optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> Transform:
    """The optimizer that the config names.

    Coupled decay (sgd, rmsprop, lars) is added to the gradient, after it was clipped and before
    momentum and scaling, so that these act on it. Decoupled decay (adamw, lamb, lion, muon) is
    added to what the optimizer makes of the gradient, and multiplied by the learning rate only
    (lamb: by its trust ratio too).

    Args:
      config: `config.optim`.
      schedule: of the learning rate.

    Raises:
      UserError: if a field has a value that the optimizer cannot have; and, where the state is
        initialised, if `multipliers` has an expression that begins no parameter's path.
    """
    make = OPTIMIZERS[config.name]
    shared = {name: config[name] for name in signature.shared(make)}
    parts = make(schedule, _decay(config), **shared, **config.get(config.name, {}))
    if config.multipliers:
        parts = *parts, _rates(config.multipliers)
    return optax.chain(_clipping(config), *parts)


def is_elementwise(config: ml_collections.ConfigDict) -> bool:
    """Whether `config.optim` changes a number by its own gradient only, or by that of all.

    The arrays of equal layers may then be one array: see models.repeat.
    """
    return not (config.name in _LAYERWISE or config.clip_adaptive or config.multipliers)


def restricted(optimizer: Transform, trainable: Callable[[Any], Any]) -> Transform:
    """An optimizer of some parameters; the others stay as they are, and it does not see them.

    Args:
      optimizer: of all.
      trainable: from parameters to a tree of booleans.
    """
    return optax.partition({True: optimizer, False: optax.set_to_zero()}, trainable)


def _clipping(config: ml_collections.ConfigDict) -> Transform:
    """Of each unit's gradient by its weights' norm, and then of the whole gradient."""
    total = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if not config.clip_adaptive:
        return total
    # Of a kernel [k_h, k_w, C_in, C_out], a unit is all that makes one output, as in the paper.
    units = optax.masked(optax.adaptive_grad_clip(config.clip_adaptive), _all_but_head)
    return optax.chain(units, total)


def _decay(config: ml_collections.ConfigDict) -> Transform:
    mask = None if config.decay_norm_and_bias else _kernels
    multipliers = config.multipliers
    if not multipliers:
        return optax.add_decayed_weights(config.weight_decay, mask)

    def decayed(path: Path, update: jax.Array, param: jax.Array) -> jax.Array:
        counts = mask is None or path[-1].key == "kernel"
        return update + config.weight_decay * counts * _factors(path, multipliers)[1] * param

    return optax.stateless(functools.partial(jax.tree_util.tree_map_with_path, decayed))


def _rates(multipliers: Multipliers) -> Transform:
    """Multiplies the updates of parameters by the factors of their rates."""

    def init(params: Any) -> optax.EmptyState:
        paths = [_joined(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, *_ in multipliers:
            if not any(re.match(pattern, path) for path in paths):
                raise UserError(
                    f"config.optim.multipliers: {pattern!r} begins no path of a parameter that is "
                    f"trained; paths begin with {', '.join(params)}."
                )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, update: update * _factors(path, multipliers)[0], updates
        )
        return scaled, state

    return Transform(init, update)


def _factors(path: Path, multipliers: Multipliers) -> tuple[float, float]:
    """Of the rate and the decay: those of the first expression that begins the path, or 1."""
    name = _joined(path)
    found = (factors for pattern, *factors in multipliers if re.match(pattern, name))
    rate, decay = next(found, (1.0, 1.0))
    return rate, decay


def _joined(path: Path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _kernels(params: Any) -> Any:
    """Marks what is a kernel: not a norm's scale, not a bias."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _all_but_head(params: Any) -> Any:
    """Marks all but the classifier, whose gradient NFNets do not clip (Section 4.1)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "head", params)


def _matrices(params: Any) -> Any:
    """Each kernel's axes of inputs and outputs; None for the classifier's, norms and biases."""

    def axes(path: Path, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or path[0].key == "head":
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)


def _require_adam(b1: float, b2: float, eps: float) -> None:
    signature.require(0.0, 1.0, b1=b1, b2=b2)
    signature.require(0.0, _LARGEST, eps=eps)
