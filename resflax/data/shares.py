"""Shares of the training images: to validate on, to train on, and to be labelled wrongly."""

import ml_collections
import numpy as np

from resflax.data.examples import ArraySource, Selected, Stored
from resflax.errors import UserError


def divided(
    train: Stored, config: ml_collections.ConfigDict, num_classes: int
) -> tuple[Stored, Stored | None]:
    """The images to train on, and those that are set aside to validate on; None: none are.

    First `val_share` of each class is set aside. Of what is left of each class, `train_share` is
    kept: with one seed, a smaller share is a part of a larger one. Then `label_noise` of all that
    is kept gets another label, each of the others as likely. The order stays.

    Args:
      train: the images of a source.
      config: `config.data`; each of the three has a seed of its own.
      num_classes: of the labels.

    Raises:
      UserError: if a share of a class is none, or leaves none to train on.
    """
    val, rows = None, np.arange(len(train))
    if not len(train):  # all are to be evaluated on
        return train, None
    if config.val_share or config.train_share < 1:
        labels = _labels(train)
        if config.val_share:
            chosen = _of_each_class(labels, config, "val")
            val = _select(train, chosen, np.zeros(len(chosen), np.int32), num_classes)
            rows = np.setdiff1d(rows, chosen)
        if config.train_share < 1:
            rows = rows[_of_each_class(labels[rows], config, "train")]
    shifts = _noise(len(rows), num_classes, config.label_noise, config.noise_seed)
    if len(rows) == len(train) and not shifts.any():
        return train, val
    return _select(train, rows, shifts, num_classes), val


def _labels(examples: Stored) -> np.ndarray:
    """int32 [N]; where they are stored beside the images, as in TFDS' files, all are read once."""
    known: np.ndarray | None = getattr(examples, "labels", None)
    if known is not None:
        return known
    return np.array([examples[i]["label"] for i in range(len(examples))], np.int32)


def _of_each_class(labels: np.ndarray, config: ml_collections.ConfigDict, part: str) -> np.ndarray:
    """Where the share of a part is, sorted: of each class so many, rounded, and one at least."""
    share = config[f"{part}_share"]
    order = np.random.default_rng(config[f"{part}_seed"]).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    classes, starts = np.unique(labels[order], return_index=True)
    chosen = []
    for label, own in zip(classes, np.split(order, starts[1:]), strict=True):
        count = round(share * len(own))
        if count == 0 or (part == "val" and count == len(own)):
            raise UserError(
                f"config.data.{part}_share {share:g} of the {len(own)} training images of class "
                f"{label} is {count}: some of each class must be "
                f"{'set aside, and some left to train on' if part == 'val' else 'trained on'}."
            )
        chosen.append(own[:count])
    return np.sort(np.concatenate(chosen))


def _noise(count: int, num_classes: int, share: float, seed: int) -> np.ndarray:
    """What is added to each label, int32 [count]: 0, or for a share of them 1 to classes - 1."""
    shifts = np.zeros(count, np.int32)
    if not share:
        return shifts
    if num_classes < 2:
        raise UserError(
            f"config.data.label_noise {share:g} must be 0: there is no other class than the one."
        )
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(count)[: round(share * count)]
    shifts[wrong] = rng.integers(1, num_classes, len(wrong))
    return shifts


def _select(examples: Stored, rows: np.ndarray, shifts: np.ndarray, num_classes: int) -> Stored:
    if not isinstance(examples, ArraySource):
        return Selected(examples, rows, shifts, num_classes)
    labels = (examples.labels[rows] + shifts) % num_classes
    images = examples.images
    return ArraySource(images if len(rows) == len(images) else images[rows], labels)
