"""From whatever a person has as images to what a trained network takes."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from resflax.data import augmentation, decoding, folder
from resflax.data.bad import UnreadableImage
from resflax.errors import UserError


class PreprocessingError(UserError):
    """The images are none that the network takes; the message says which, and what would be."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Normalises images as a network was trained; resizes and crops them as it was evaluated.

    Attributes:
      image_shape: (H, W, C) of what the network takes.
      mean, std: of each channel, on a scale of 0 to 1.
      resize: length of an image's shorter side before its center is cut, pixels.
    """

    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int

    def __call__(self, images: Any) -> jax.Array:
        """The normalised images, float32 [N, H, W, C].

        Pixels are whole numbers from 0 to 255: uint8, or another dtype with such values (but a
        float array with none above 1, which may be on a scale of 0 to 1). Images of another size
        are resized and cropped; files and PIL images get the network's number of channels too.

        Args:
          images: an array [N, H, W, C], which may be traced if it is uint8 and of the network's
            size; or one image, of which N is 1: an array [H, W, C], a path of a JPEG or PNG, or a
            PIL image; or a list of such images.

        Raises:
          PreprocessingError: if an image cannot be read, or its pixels or channels are others.
        """
        if isinstance(images, list | tuple):
            if not images:
                raise PreprocessingError(f"the list of images is empty; {self._expected}.")
            parts = [self._one(image, f"image {i}: ") for i, image in enumerate(images)]
            pixels: Any = np.stack(parts)
        elif _is_single(images):
            pixels = self._one(images)[None]
        else:
            pixels = self._batch(images)
        return augmentation.normalizer(self.mean, self.std)(jnp.asarray(pixels))

    @property
    def _expected(self) -> str:
        height, width, channels = self.image_shape
        return (
            f"the network takes files, PIL images, and arrays [N, {height}, {width}, {channels}] "
            "or of another size, whose pixels are uint8 from 0 to 255"
        )

    def _one(self, image: Any, name: str = "") -> np.ndarray:
        """A file, a PIL image or an array [H, W, C], as uint8 of the network's shape."""
        if isinstance(image, str | os.PathLike):
            return self._decoded(os.path.expanduser(image))
        if isinstance(image, Image.Image):
            return self._cut(image, name)
        array = self._pixels(image, name)
        if array.ndim != 3:
            raise PreprocessingError(f"{name}its shape is {list(array.shape)}; {self._expected}.")
        return self._sized(self._channelled(array, name)[None], name)[0]

    def _batch(self, images: Any) -> Any:
        """An array [N, H, W, C] as uint8 of the network's shape, on its device if it is so."""
        if not hasattr(images, "shape") or len(images.shape) != 4:
            kind = list(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise PreprocessingError(f"the images are {kind}; {self._expected}.")
        self._channelled(images)
        as_it_is = images.dtype == np.uint8 and tuple(images.shape[1:]) == tuple(self.image_shape)
        if as_it_is:
            return images
        if isinstance(images, jax.core.Tracer):
            raise PreprocessingError(
                f"traced images are {images.dtype} {list(images.shape)}; under jax.jit they must "
                f"be uint8 [N, {', '.join(map(str, self.image_shape))}]."
            )
        return self._sized(self._pixels(images), "")

    def _channelled(self, array: Any, name: str = "") -> Any:
        if array.shape[-1] != self.image_shape[-1]:
            raise PreprocessingError(
                f"{name}an array of shape {list(array.shape)} has {array.shape[-1]} channels, its "
                f"last axis; {self._expected}."
            )
        return array

    def _pixels(self, image: Any, name: str = "") -> np.ndarray:
        """An array as uint8, if that is what its values are."""
        try:
            array = np.asarray(image)
        except ValueError:  # lists of unequal lengths
            raise PreprocessingError(f"{name}it is no array; {self._expected}.") from None
        if array.dtype == np.uint8:
            return array
        if array.dtype.kind not in "iuf":
            raise PreprocessingError(f"{name}its pixels are {array.dtype}; {self._expected}.")
        if not array.size:
            return array.astype(np.uint8)
        low, high = array.min(), array.max()
        fits = low >= 0 and high <= 255 and np.array_equal(array, np.floor(array))
        if not fits or (array.dtype.kind == "f" and high <= 1):
            raise PreprocessingError(
                f"{name}its pixels are {array.dtype} from {low:g} to {high:g}; {self._expected}"
                f"{_advice(low, high)}."
            )
        return array.astype(np.uint8)

    def _sized(self, images: np.ndarray, name: str) -> np.ndarray:
        """Pixels [N, H, W, C] of any size, as those of the network's size."""
        if images.shape[1:3] == tuple(self.image_shape[:2]) or not len(images):
            return images
        if 0 in images.shape:
            raise PreprocessingError(f"{name}its shape is {list(images.shape)}; {self._expected}.")
        # A channel at a time: Pillow has no images with as many as there may be.
        cut = [
            [self._cut(Image.fromarray(channel), name, 1) for channel in np.moveaxis(image, -1, 0)]
            for image in images
        ]
        return np.stack([np.concatenate(channels, -1) for channels in cut])

    def _decoded(self, path: str) -> np.ndarray:
        channels = self._square(f"{path}: ")
        try:
            data = folder.read(path)
            size = self.image_shape[0]
            return decoding.center_crop(data, size, resize=self.resize, channels=channels)
        except UnreadableImage as error:
            raise PreprocessingError(f"{path}: {error}; {self._expected}.") from None

    def _cut(self, image: Image.Image, name: str, channels: int | None = None) -> np.ndarray:
        found = self._square(name, channels)
        try:
            size = self.image_shape[0]
            return decoding.center_crop(image, size, resize=self.resize, channels=found)
        except UnreadableImage as error:
            raise PreprocessingError(f"{name}{error}; {self._expected}.") from None

    def _square(self, name: str, channels: int | None = None) -> int:
        """The channels to decode, if an image can be cut to what the network takes."""
        height, width, own = self.image_shape
        if height != width or (channels or own) not in (1, 3):
            raise PreprocessingError(
                f"{name}it cannot be made an image of {height} x {width} x {own}; the network "
                f"takes uint8 arrays [N, {height}, {width}, {own}] alone."
            )
        return channels or own


def _is_single(images: Any) -> bool:
    """Whether it is one image, and no batch."""
    if isinstance(images, str | os.PathLike | Image.Image):
        return True
    traced = isinstance(images, jax.core.Tracer)
    return hasattr(images, "shape") and len(images.shape) == 3 and not traced


def _advice(low: float, high: float) -> str:
    if low >= 0 and high <= 1:
        return " (of a scale of 0 to 1: (255 * image).round().astype('uint8'))"
    if low >= 0 and high <= 255:
        return " (image.round().astype('uint8'))"
    return ""
