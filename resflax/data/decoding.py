"""From a JPEG, a PNG or one of Pillow's images to a square of uint8 pixels, on the host.

Each function draws or takes a rectangle of the image as it stands upright (by its Exif orientation)
and resamples that rectangle alone: bilinear, antialiased, so that a pixel of the result is a mean
over all that it covers, as `jax.image.resize` does. What lies just outside the rectangle has its
part in the pixels at its edge, as if the whole image had been resampled and then cropped. A large
JPEG is decoded at a half, a quarter or an eighth of its size where that leaves the rectangle twice
the result's sides; that takes less time and differs by little.

Pillow decodes and resamples. Where the extra `fast` is installed, simplejpeg decodes JPEGs, by the
same algorithms in less time, and cykooz-resizer resamples, with the same filter, equal to one of
255 levels, in a quarter of the time. What simplejpeg refuses is left to Pillow, so that the same
files can be read with and without it.

Grey, palette and CMYK images are converted to RGB, inverted (Adobe's) CMYK too. Of 16 bits the
upper 8 are kept. Transparency is left out and the colours under it are kept, as by Pillow's
`convert`.

The result depends on the bytes, the arguments, `rng` and these packages alone.
"""

import contextlib
import dataclasses
import io
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from resflax.data.bad import UnreadableImage
from resflax.errors import UserError

try:
    import cykooz_resizer
    import simplejpeg
except ImportError:
    cykooz_resizer = simplejpeg = None  # type: ignore[assignment]

# Of damaged Exif data, beside which the pixels may be in order; it would not say of which file.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")

# By Pillow's names, and how their files begin.
FORMATS = {"JPEG": b"\xff\xd8", "PNG": b"\x89PNG\r\n\x1a\n"}

# A whole file; or an image that Pillow has opened or made, which stays as it is. A large JPEG is
# decoded whole there, so that its pixels differ by little from those of its file.
Picture = bytes | Image.Image

# Left, top, right and bottom edge, in pixels.
Box = tuple[float, float, float, float]


def random_resized_crop(
    data: Picture,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    channels: int = 3,
) -> np.ndarray:
    """A rectangle of random area and shape, resampled to a square.

    Szegedy et al. 2014 (arXiv 1409.4842), Section 6: the area is a uniform share of the image's,
    the ratio of width to height is drawn too; its logarithm is uniform here, so that wide is as
    likely as tall. A draw that does not fit into the image is repeated; after ten, the largest
    rectangle in the middle whose ratio is allowed is taken.

    Args:
      data: a whole JPEG or PNG file, or an image of Pillow's.
      size: side of the result, pixels.
      rng: of the rectangle.
      scale: least and greatest share of the image's area.
      ratio: least and greatest ratio of width to height.
      channels: 3, or 1 for grey.

    Returns:
      uint8 [size, size, channels].

    Raises:
      UnreadableImage: if the bytes are not an image that can be read.
    """
    encoded = _open(data)
    box = _random_box(encoded.width, encoded.height, rng, scale, ratio)
    return encoded.resample(box, size, channels)


def scale_crop(
    data: Picture,
    size: int,
    rng: np.random.Generator,
    *,
    shorter: tuple[int, int] = (256, 480),
    channels: int = 3,
) -> np.ndarray:
    """A random square of the image, after its shorter side was resized to a random length.

    The scale augmentation of Simonyan and Zisserman 2014 (arXiv 1409.1556), Section 3.1, with the
    range of He et al. 2015 (arXiv 1512.03385), Section 3.4.

    Args:
      data: a whole JPEG or PNG file, or an image of Pillow's.
      size: side of the result, pixels.
      rng: of the length and of the place.
      shorter: least and greatest length of the shorter side, pixels; each is as likely.
      channels: 3, or 1 for grey.

    Returns:
      uint8 [size, size, channels].

    Raises:
      UnreadableImage: if the bytes are not an image that can be read.
      UserError: if the shorter side may be less than `size`.
    """
    if not size <= shorter[0] <= shorter[1]:
        raise UserError(f"shorter {shorter} must be a range of lengths of at least size {size}.")
    encoded = _open(data)
    pixel = min(encoded.width, encoded.height) / rng.integers(*shorter, endpoint=True)
    left, top = (
        pixel * rng.integers(int(side / pixel) - size, endpoint=True)
        for side in (encoded.width, encoded.height)
    )
    box = (left, top, left + size * pixel, top + size * pixel)
    return encoded.resample(box, size, channels)


def center_crop(data: Picture, size: int, *, resize: int, channels: int = 3) -> np.ndarray:
    """The square in the middle of the image, after its shorter side was resized.

    Args:
      data: a whole JPEG or PNG file, or an image of Pillow's.
      size: side of the result, pixels.
      resize: length of the shorter side, pixels.
      channels: 3, or 1 for grey.

    Returns:
      uint8 [size, size, channels].

    Raises:
      UnreadableImage: if the bytes are not an image that can be read.
      UserError: if `resize` is less than `size`.
    """
    if resize < size:
        raise UserError(f"resize {resize} must be at least size {size}.")
    encoded = _open(data)
    side = min(encoded.width, encoded.height) * size / resize
    left, top = (encoded.width - side) / 2, (encoded.height - side) / 2
    return encoded.resample((left, top, left + side, top + side), size, channels)


def is_grey(data: Picture) -> bool:
    """Whether an image has no colours.

    Raises:
      UnreadableImage: if it is not an image that can be read.
    """
    return _open(data).image.mode in ("1", "L", "LA", "I;16")


def _random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, height * shape), min(height, width / shape)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class _Orientation:
    """How an image is stored: first its axes are swapped, then those of the file are mirrored."""

    swapped: bool = False
    mirrored_x: bool = False
    mirrored_y: bool = False

    def stored(self, box: Box, width: int, height: int) -> Box:
        """Where a box of the upright image is in the file's, which has this width and height."""
        left, top, right, bottom = box
        if self.swapped:
            left, top, right, bottom = top, left, bottom, right
        if self.mirrored_x:
            left, right = width - right, width - left
        if self.mirrored_y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Turns pixels of the file, [H, W, C]."""
        pixels = pixels[:: -1 if self.mirrored_y else 1, :: -1 if self.mirrored_x else 1]
        return pixels.swapaxes(0, 1) if self.swapped else pixels


# By the value of the Exif tag.
_ORIENTATIONS = {
    2: _Orientation(mirrored_x=True),
    3: _Orientation(mirrored_x=True, mirrored_y=True),
    4: _Orientation(mirrored_y=True),
    5: _Orientation(swapped=True),
    6: _Orientation(swapped=True, mirrored_y=True),
    7: _Orientation(swapped=True, mirrored_x=True, mirrored_y=True),
    8: _Orientation(swapped=True, mirrored_x=True),
}


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """An image of which the header is read.

    Attributes:
      data: the file.
      image: as it is in the file; its pixels are decoded when they are needed.
      orientation: of the file.
    """

    data: bytes
    image: Image.Image
    orientation: _Orientation

    @property
    def width(self) -> int:
        """Of the upright image."""
        return self.image.height if self.orientation.swapped else self.image.width

    @property
    def height(self) -> int:
        """Of the upright image."""
        return self.image.width if self.orientation.swapped else self.image.height

    def resample(self, box: Box, size: int, channels: int) -> np.ndarray:
        """The pixels of a box, uint8 [size, size, channels]."""
        image = self.image
        box = self.orientation.stored(box, *image.size)
        with _reasons():
            reduction = _draft(image, min(box[2] - box[0], box[3] - box[1]) / size, channels)
            left, top, right, bottom = (edge / reduction for edge in box)
            # Within the image, by less than the rounding of a float.
            box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
            if cykooz_resizer is None:
                image = _plain(image, channels)
                pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
            else:
                pixels = _resize(self._decoded(reduction, channels), size, box)
        pixels = self.orientation.upright(pixels.reshape(size, size, -1))
        if pixels.shape[-1] != channels:
            pixels = np.broadcast_to(pixels, (size, size, channels))
        return np.ascontiguousarray(pixels)

    def _decoded(self, reduction: float, channels: int) -> np.ndarray:
        image = self.image
        if image.format == "JPEG" and image.mode in _COLOURS and reduction == 1:
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(self.data, _COLOURS[image.mode])
        return np.asarray(_plain(image, channels))


def _open(data: Picture) -> _Encoded:
    if isinstance(data, Image.Image):
        if data.mode in ("F", "I"):  # whose scale is anybody's
            raise UnreadableImage(f"its mode is {data.mode}; convert it to L or RGB")
        with _reasons():
            image = data.copy()
        return _Encoded(b"", image, _orientation(image))
    if not data:
        raise UnreadableImage("it has no bytes")
    with _reasons():
        try:
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        except UnidentifiedImageError:
            raise UnreadableImage(_what_else(data)) from None
        if image.format == "PNG":
            # Its orientation may follow the pixels, and who asks for it must not meet their errors.
            image.load()
        return _Encoded(data, image, _orientation(image))


def _what_else(data: bytes) -> str:
    """What bytes are that Pillow does not open as one of FORMATS."""
    for name, beginning in FORMATS.items():
        if data.startswith(beginning):
            return f"it begins as a {name}, but has no header that can be read"
    try:
        other = Image.open(io.BytesIO(data)).format
    except (OSError, SyntaxError, ValueError):
        return f"it is not an image ({', '.join(FORMATS)})"
    return f"it is a {other}; {' and '.join(FORMATS)} can be read"


def _orientation(image: Image.Image) -> _Orientation:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _ERRORS:  # the pixels may be in order where the Exif data are not
        value = 1
    return _ORIENTATIONS.get(value, _Orientation())


def _draft(image: Image.Image, shrinkage: float, channels: int) -> float:
    """Has a JPEG decoded at a fraction of its size, or as grey; by how much its sides shrink.

    Args:
      image: not decoded yet.
      shrinkage: of the rectangle's sides to the result's; half of it is left to the resampling.
      channels: of the result.
    """
    reduction = next((n for n in (8, 4, 2) if 2 * n <= shrinkage), 1)
    if reduction == 1 and channels == 3:
        return 1.0
    width = image.width
    size = (image.width // reduction, image.height // reduction)
    drafted = image.draft("L" if channels == 1 else None, size)
    return width / drafted[1][2] if drafted else 1.0


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8 bits of grey or, if it has colours and they are wanted, of RGB."""
    image = _eight_bits(image)
    return image.convert("L") if channels == 1 else image


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode == "P":  # by way of RGBA, else Pillow warns of the transparency that it drops
        image = image.convert("RGBA")
    return image.convert("RGB")


# A resizer keeps memory between its uses, so every thread has one.
_OWN = threading.local()


def _resize(pixels: np.ndarray, size: int, box: Box) -> np.ndarray:
    """A box of pixels, uint8 [H, W] or [H, W, C], as a square."""
    if not hasattr(_OWN, "resizer"):
        _OWN.resizer = cykooz_resizer.Resizer()
    left, top, right, bottom = box
    # The resizer wants a copy: of the box, and as far around it as its filter reaches. As one of
    # Pillow's images, that of the whole would take longer than all that the resizer does.
    reach_x, reach_y = (math.ceil(max(1, d / size)) + 1 for d in (right - left, bottom - top))
    x, y = max(0, int(left) - reach_x), max(0, int(top) - reach_y)
    window = pixels[y : math.ceil(bottom) + reach_y, x : math.ceil(right) + reach_x]
    kind = (
        cykooz_resizer.PixelType.U8x3 if pixels.shape[2:] == (3,) else cykooz_resizer.PixelType.U8
    )
    height, width = window.shape[:2]
    source = cykooz_resizer.ImageData(width, height, kind, window.tobytes())
    result = cykooz_resizer.ImageData(size, size, kind)
    options = cykooz_resizer.ResizeOptions(
        resize_alg=cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear),
        crop_box=cykooz_resizer.CropBox(left - x, top - y, right - left, bottom - top),
    )
    _OWN.resizer.resize(source, result, options)
    return np.frombuffer(result.get_buffer(), np.uint8)


# simplejpeg's names of what Pillow calls by these.
_COLOURS = {"L": "GRAY", "RGB": "RGB"}

# What Pillow raises for files that are damaged.
_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Makes what Pillow raises an UnreadableImage."""
    try:
        yield
    except UnreadableImage:
        raise
    except _ERRORS as error:
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None
