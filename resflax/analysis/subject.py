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

from resflax import checkpoint, validation
from resflax import config as config_lib
from resflax.analysis import taps
from resflax.data import augmentation, given, sources
from resflax.models import count, create_model
from resflax.models.zoo import image_size

# Of the images whose statistics batch norm of an untrained network gets: so many pixels, and at
# least so many images.
_PIXELS = 32 * 224**2
_LEAST = 8


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

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return count(self.model, self.image_shape).macs

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
    name: str,
    overrides: Mapping[str, Any],
    *,
    images: int,
    seed: int = 0,
    size: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> Subject:
    """A named network as it is initialised, with rendered shapes of the size it was published on.

    Its running statistics are those of the images.

    Args:
      name: of resflax.list_models().
      overrides: see resflax.create_model.
      images: how many, at most.
      seed: of the parameters.
      size: of the images, pixels; None: as published.
      data: other images than shapes, by fields of `config.data`, such as {'source': 'digits'}.

    Raises:
      UserError: if there is no such network, or no such data.
    """
    values = {argument: [value] for argument, value in overrides.items()}
    (one,) = grid(name, values, images=images, seed=seed, size=size, data=data)
    return one


def grid(
    name: str,
    values: Mapping[str, Sequence[Any]],
    *,
    images: int,
    seed: int = 0,
    size: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> list[Subject]:
    """Untrained networks for every combination of values of some arguments: see `untrained`."""
    config = config_lib.base()
    config.data.source, config.data.image_size = "shapes", size or image_size(name)
    config.data.shapes.num_train = config.data.shapes.num_test = images
    dataset = sources.load(validation.with_data(config, data).data)
    batch = _evenly(dataset, images)
    return [
        _untrained(
            name, dict(zip(values, combination, strict=True)), batch, dataset.description, seed
        )
        for combination in itertools.product(*values.values())
    ]


def _untrained(
    name: str,
    overrides: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    description: sources.Description,
    seed: int,
) -> Subject:
    classes = {"num_classes": description.num_classes}
    model = taps.written_out(create_model(name, **{**classes, **overrides}))
    images = batch["image"]
    most = max(_LEAST, _PIXELS // (images.shape[1] * images.shape[2]))
    normalize = augmentation.normalizer(description.mean, description.std)
    changes = ", ".join(f"{k}={v}" for k, v in overrides.items())
    return Subject(
        f"{name} {changes}".rstrip(),
        model,
        lambda: _initialised(model, normalize(jnp.asarray(images[:most])), seed),
        images,
        batch["label"],
        description,
        trained=False,
    )


def from_run(
    workdir: str | pathlib.Path,
    *,
    images: int,
    step: int | None = None,
    best: bool = False,
    data: Mapping[str, Any] | None = None,
    dataset: given.Given | None = None,
) -> Subject:
    """The network of a run, and images of its test set; of ten crops, the one from the middle.

    Args:
      workdir: of the run.
      images: at most so many, drawn evenly.
      step: of the checkpoint; None: the latest.
      best: instead of the latest, the one with the best evaluation.
      data: other images than the run's, by fields of `config.data`, such as {'source': 'digits'};
        they are normalised as the run's.
      dataset: the images of a run that had the caller's own: see resflax.data.given.

    Raises:
      UserError: if there is no such run, checkpoint or data, or the network cannot take them.
    """
    run = checkpoint.restore_model(workdir, step, best=best)
    changes = {**(data or {}), "test_crops": 1}
    dataset = given.load(validation.with_data(run.config, changes).data, dataset)
    folder = pathlib.Path(workdir).expanduser().resolve()
    sources.require_like(dataset.description, run.dataset, f" in {folder}")
    batch = _evenly(dataset, images)
    return Subject(
        f"{folder.name} (step {run.step})",
        taps.written_out(run.model),
        lambda: run.variables,
        batch["image"],
        batch["label"],
        dataclasses.replace(dataset.description, mean=run.dataset.mean, std=run.dataset.std),
        trained=True,
    )


def _evenly(dataset: sources.Dataset, images: int) -> dict[str, np.ndarray]:
    """At most so many test images, from the first to the last."""
    total = len(dataset.test)
    number = min(images, total)
    return dataset.test.test_batch(np.arange(number) * total // number)


def _initialised(model: nn.Module, images: jax.Array, seed: int) -> dict[str, Any]:
    # Of the generator, see resflax.train_state.
    key = jax.random.key(seed, impl="rbg")
    variables = jax.jit(functools.partial(model.init, train=False))(key, images)
    if "batch_stats" not in variables:
        return {**variables, "batch_stats": {}}
    # Of one batch, with no share of what they were.
    forgetful = model.clone(bn_momentum=0.0) if hasattr(model, "bn_momentum") else model
    apply = functools.partial(forgetful.apply, train=True, mutable=["batch_stats"])
    _, changed = jax.jit(apply)(variables, images, rngs={"dropout": jax.random.key(seed)})
    return {**variables, **changed}
