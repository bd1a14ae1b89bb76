"""What is analysed: a network with its variables and images, trained or not."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resflax import checkpoint
from resflax import config as config_lib
from resflax.analysis import taps
from resflax.data import augmentation, sources
from resflax.models import create_model
from resflax.models.zoo import image_size


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, and images to look at it with.

    Attributes:
      name: for a person.
      model: the network, its loops written out.
      make_variables: called once, when they are needed.
      images: of the test set, uint8 [N, H, W, C].
      labels: int32 [N].
      description: of the data set.
      trained: whether the variables are those of a run.
    """

    name: str
    model: nn.Module
    make_variables: Callable[[], dict[str, Any]]
    images: np.ndarray
    labels: np.ndarray
    description: sources.Description
    trained: bool

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        """'params' and 'batch_stats'."""
        return self.make_variables()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def normalized(self, images: np.ndarray) -> jax.Array:
        """What the network takes, of images as they are stored."""
        return augmentation.normalizer(self.description.mean, self.description.std)(
            jnp.asarray(images)
        )

    def batches(self, size: int, most: int | None = None) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Normalised images and their labels; the last batch may be smaller.

        Args:
          size: images in a batch.
          most: of all images; fewer are drawn evenly, since the first ones may be of one class.
        """
        total = len(self.images)
        number = total if most is None else min(total, most)
        chosen = np.arange(number) * total // number
        for start in range(0, number, size):
            rows = chosen[start : start + size]
            yield self.normalized(self.images[rows]), jnp.asarray(self.labels[rows])


def untrained(
    name: str, overrides: Mapping[str, Any], *, images: int, seed: int = 0, size: int | None = None
) -> Subject:
    """A named network as it is initialised, with rendered shapes of the size it was published on.

    Its running statistics are those of the images.

    Args:
      name: of resflax.list_models().
      overrides: see resflax.create_model.
      images: how many.
      seed: of the parameters.
      size: of the images, pixels; None: as published.

    Raises:
      ValueError: if there is no such network.
    """
    config = config_lib.base().data
    config.source, config.image_size = "shapes", size or image_size(name)
    config.shapes.num_train = config.shapes.num_test = images
    model = taps.written_out(create_model(name, **{"num_classes": 10, **overrides}))
    dataset = sources.load(config)
    batch = dataset.test.test_batch(np.arange(images))
    description = dataset.description
    changes = ", ".join(f"{k}={v}" for k, v in overrides.items())

    def make() -> dict[str, Any]:
        normalize = augmentation.normalizer(description.mean, description.std)
        return _initialised(model, normalize(jnp.asarray(batch["image"])), seed)

    label = f"{name} {changes}".rstrip()
    return Subject(label, model, make, batch["image"], batch["label"], description, trained=False)


def grid(
    name: str, values: Mapping[str, Sequence[Any]], *, images: int, seed: int, size: int | None
) -> list[Subject]:
    """Untrained networks for every combination of values of some arguments: see `untrained`."""
    return [
        untrained(
            name, dict(zip(values, combination, strict=True)), images=images, seed=seed, size=size
        )
        for combination in itertools.product(*values.values())
    ]


def from_run(
    workdir: str | pathlib.Path, *, images: int, step: int | None = None, best: bool = False
) -> Subject:
    """The network of a run, and images of its test set.

    Args:
      workdir: of the run.
      images: at most so many, drawn evenly.
      step: of the checkpoint; None: the latest.
      best: instead of the latest, the one with the best evaluation.

    Raises:
      ValueError: if there is no such run, checkpoint or data.
    """
    run = checkpoint.restore_model(workdir, step, best=best)
    dataset = sources.load(run.config.data)
    total = len(dataset.test)
    chosen = np.arange(min(images, total)) * total // min(images, total)
    batch = dataset.test.test_batch(chosen)
    name = f"{pathlib.Path(workdir).resolve().name} (step {run.step})"
    return Subject(
        name,
        taps.written_out(run.model),
        lambda: run.variables,
        batch["image"],
        batch["label"],
        run.dataset,
        trained=True,
    )


def _initialised(model: nn.Module, images: jax.Array, seed: int) -> dict[str, Any]:
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(seed), images)
    if "batch_stats" not in variables:
        return {**variables, "batch_stats": {}}
    # Of one batch, with no share of what they were.
    forgetful = model.clone(bn_momentum=0.0) if hasattr(model, "bn_momentum") else model
    apply = functools.partial(forgetful.apply, train=True, mutable=["batch_stats"])
    _, changed = jax.jit(apply)(variables, images, rngs={"dropout": jax.random.key(seed)})
    return {**variables, **changed}
