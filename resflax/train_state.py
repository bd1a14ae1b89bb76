"""Everything that changes while a network trains."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from resflax.models import repeat

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """The state between two training steps; a checkpoint holds exactly its leaves.

    Attributes:
      step: updates made so far, int32 [].
      params: trainable parameters, float32.
      batch_stats: running statistics of batch norm, float32.
      opt_state: of the optimizer.
      ema: exponential moving averages of 'params' and 'batch_stats', or None.
      key: random key of the run; the step's number is folded in, so that it never changes.
      skipped: number of updates skipped so far for a loss or gradient that is not finite, int32 [].
      apply_fn: the network's `apply`.
      tx: the optimizer.
      loops: what of the variables is packed (see models.repeat); unpacked in a checkpoint.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    ema: PyTree | None
    key: jax.Array
    skipped: jax.Array
    apply_fn: Callable[..., Any] = flax.struct.field(pytree_node=False)
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    loops: repeat.Loops = flax.struct.field(pytree_node=False, default=())

    @property
    def eval_variables(self) -> PyTree:
        """The variables to evaluate with: the averages where they are kept."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: Sequence[int],
    seed: int | jax.Array,
    *,
    apply_fn: Callable[..., Any] | None = None,
    ema: bool,
    packed: bool = True,
) -> TrainState:
    """A network's state before its first step.

    Args:
      model: a network of `create_model`.
      tx: its optimizer.
      image_shape: (H, W, C).
      seed: of the parameters and of every random number in training.
      apply_fn: instead of the network's `apply`, as where parts of it are frozen.
      ema: whether to keep moving averages.
      packed: whether variables of equal blocks are stacked (see models.repeat), where none of them
        are frozen. An optimizer that looks at a layer's norm or name must have each by itself.
    """
    if packed and hasattr(model, "packed") and apply_fn is None:
        model = model.clone(packed=True)
    # XLA compiles threefry anew for each shape of a parameter, ten times as long as this generator.
    init_key = jax.random.key(seed, impl="rbg")
    images = jnp.zeros((1, *image_shape))
    variables = {"batch_stats": {}, **model.init(init_key, images, train=False)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        # A copy: buffers that are donated to the step must not appear in the state twice.
        ema=jax.tree.map(jnp.copy, variables) if ema else None,
        key=jax.random.key(seed),
        skipped=jnp.zeros((), jnp.int32),
        apply_fn=apply_fn or model.apply,
        tx=tx,
        loops=getattr(model, "loops", ()),
    )
