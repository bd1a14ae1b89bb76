"""What is measured: a network, its images, and what is done with them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MODES = ("inference", "train")

# Of the optimizer, the same for everybody. The rate is small, so that the loss stays finite however
# often the same batch is seen.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


class Examples(NamedTuple):
    """A batch in the host's memory.

    Attributes:
      images: random normal, float32 [N, H, W, C]. Not zeros: processors are faster on them.
      labels: random, int32 [N].
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      name: of the network, in the zoo.
      model: the network.
      size: side of the images, pixels.
      batch: images in a step.
      mode: 'train', a training step, or 'inference', the logits.
    """

    name: str
    model: nn.Module
    size: int
    batch: int
    mode: str

    @property
    def trains(self) -> bool:
        """Whether a step is one of training."""
        return self.mode == "train"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.size, self.size, 3

    @property
    def dtype(self) -> jnp.dtype:
        """Of the computation."""
        return jnp.dtype(self.model.dtype)

    @property
    def plain(self) -> nn.Module:
        """The same network with all its blocks written out: no loop hides them."""
        fields: dict[str, Any] = {"scan": 0, "remat": False}
        return self.model.clone(**{k: v for k, v in fields.items() if hasattr(self.model, k)})

    @functools.cached_property
    def variables(self) -> Any:
        """The shapes of the written-out network's variables; nothing is allocated."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        init = functools.partial(self.plain.init, train=False)
        return jax.eval_shape(init, jax.random.key(0), images)

    def examples(self, seed: int = 0) -> Examples:
        """The batch that every contender gets."""
        random = np.random.default_rng(seed)
        images = random.standard_normal((self.batch, *self.image_shape), np.float32)
        labels = random.integers(self.model.num_classes, size=self.batch, dtype=np.int32)
        return Examples(images, labels)
