"""A picture of what a network is shown: augmented training images with their labels."""

import pathlib

import jax
import matplotlib.figure
import ml_collections
import numpy as np

from resflax.data import augmentation, mixing, pipeline, sources
from resflax.errors import UserError

_ROWS, _COLUMNS = 6, 8


def draw(config: ml_collections.ConfigDict, path: pathlib.Path) -> None:
    """Writes a PNG of the first images of the first epoch, augmented as for training.

    Args:
      config: of a run.
      path: of the picture.

    Raises:
      UserError: if there is no data set, or its images cannot be shown.
    """
    dataset = sources.load(config.data)
    channels = dataset.description.image_shape[-1]
    if channels not in (1, 3):
        raise UserError(
            f"the images of {config.data.source!r} have {channels} channels; a picture shows 1, "
            "grey, or 3, colours."
        )
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path} must end in .png: it is a picture.")
    count = min(_ROWS * _COLUMNS, len(dataset.train))
    batches = pipeline.TrainBatches(
        len(dataset.train),
        batch_size=count,
        seed=config.seed,
        read=dataset.train.train_batch,
        put=lambda batch, axis: jax.device_put(batch),
        threads=dataset.threads,
    )
    _, batch = next(batches.take([1]))
    description = dataset.description
    normalize = augmentation.normalizer(description.mean, description.std)
    augment = jax.jit(
        augmentation.augmenter(normalize, augmentation.Augmentation(**config.augment))
    )
    key, mixing_key = jax.random.split(jax.random.key(config.seed))
    images = augment(jax.random.split(key, count), batch["image"])
    targets = jax.nn.one_hot(batch["label"], description.num_classes)
    mixer = mixing.mixer(**config.mix)
    images, targets = mixer(mixing_key, images, targets)
    pixels = np.clip(np.asarray(images) * description.std + description.mean, 0.0, 1.0)
    figure = _grid(pixels, np.asarray(targets), description.label_names)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}.") from None


def _grid(
    pixels: np.ndarray, targets: np.ndarray, names: tuple[str, ...]
) -> matplotlib.figure.Figure:
    rows = -(-len(pixels) // _COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(1.3 * _COLUMNS, 1.5 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, _COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(pixels):
            shown = pixels[place][..., 0] if pixels.shape[-1] == 1 else pixels[place]
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
            axes.set_title(_caption(targets[place], names), fontsize=8)
    return figure


def _caption(target: np.ndarray, names: tuple[str, ...]) -> str:
    """The label, or the two that were mixed with their shares."""
    labels = np.argsort(-target)[:2]
    if target[labels[1]] < 0.005:
        return names[labels[0]]
    return "\n".join(f"{names[label]} {target[label]:.0%}" for label in labels)
