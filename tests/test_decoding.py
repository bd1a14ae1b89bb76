"""From encoded images to square crops."""

import collections
import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from resflax.data import decoding
from resflax.data.decoding import UnreadableImage, center_crop, random_resized_crop, scale_crop

EVERY_CROP = {
    "random": lambda data, size: random_resized_crop(data, size, np.random.default_rng(3)),
    "scale": lambda data, size: scale_crop(
        data, size, np.random.default_rng(3), shorter=(2 * size, 3 * size)
    ),
    "center": lambda data, size: center_crop(data, size, resize=size + 4),
}


def encode(image, kind="PNG", **settings):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **settings
    )
    return file.getvalue()


def smooth(width, height):
    """Waves of all directions, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width][..., None] / 40
    waves = np.sin(x * [1, 0.3, 2] + y * [0.2, 1.5, -1]) + np.cos(y * [0.5, 1, 0.2])
    return np.round(127.5 + 60 * waves).astype(np.uint8)


def noisy(width=160, height=120):
    """Detail down to the pixel."""
    rng = np.random.default_rng(0)
    return np.clip(smooth(width, height) + rng.normal(scale=20, size=(height, width, 1)), 0, 255)


def jpeg(width=160, height=120, **settings):
    return encode(noisy(width, height).astype(np.uint8), "JPEG", **({"quality": 90} | settings))


def plane(width=256, height=256):
    """An image whose red is x and whose green is y: a crop shows where it was taken."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return encode(np.stack([x, y, 0 * x], -1))


def place(crop):
    """Left, top, width and height of a crop of `plane`, to within a pixel or so."""
    size = len(crop)
    found = []
    for line in (crop[size // 2, :, 0].astype(float), crop[:, size // 2, 1].astype(float)):
        slope, start = np.polyfit(np.arange(3, size - 3) + 0.5, line[3:-3] + 0.5, 1)
        found.append((start, slope * size))
    (left, width), (top, height) = found
    return np.array([left, top, width, height])


# --- which rectangle -----------------------------------------------------------------------------


def test_area_and_ratio_of_random_crops_are_as_asked():
    rng = np.random.default_rng(0)
    data = plane()
    crop = functools.partial(random_resized_crop, data, 32, rng, scale=(0.1, 0.5))
    left, top, width, height = np.array([place(crop()) for _ in range(600)]).T
    area, shape = width * height / 256**2, np.log(width / height)
    # Both are uniform: compared with the quantiles of that.
    quantiles = np.linspace(0, 1, 11)
    np.testing.assert_allclose(np.quantile(area, quantiles), 0.1 + 0.4 * quantiles, atol=0.03)
    widest = np.log(4 / 3)
    expected = widest * (2 * quantiles - 1)
    np.testing.assert_allclose(np.quantile(shape, quantiles), expected, atol=0.05)
    for start, side in ((left, width), (top, height)):
        share = start / (256 - side)
        np.testing.assert_allclose(np.quantile(share, quantiles), quantiles, atol=0.08)
    assert abs(np.corrcoef(area, shape)[0, 1]) < 0.15


def test_the_default_is_a_twelfth_of_the_image_or_more():
    rng = np.random.default_rng(0)
    data = plane(200, 150)
    places = np.array([place(random_resized_crop(data, 32, rng)) for _ in range(300)])
    area = places[:, 2] * places[:, 3] / (200 * 150)
    assert 0.07 < area.min() < 0.12
    assert 0.8 < area.max() <= 1.05


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(200, 40, (73.3, 0, 53.3, 40)), (40, 200, (0, 73.3, 40, 53.3)), (60, 50, (0, 0, 60, 50))],
)
def test_what_never_fits_becomes_the_middle(width, height, expected):
    # More than the whole image fits in no try.
    rng = np.random.default_rng(0)
    crop = random_resized_crop(plane(width, height), 32, rng, scale=(1.5, 2.0))
    np.testing.assert_allclose(place(crop), expected, atol=1.2)


def test_scale_crops_have_a_random_shorter_side():
    rng = np.random.default_rng(0)
    data = plane(250, 200)
    crop = functools.partial(scale_crop, data, 32, rng, shorter=(40, 80))
    left, top, width, height = np.array([place(crop()) for _ in range(600)]).T
    np.testing.assert_allclose(width, height, atol=2)
    shorter = 200 * 32 / width
    quantiles = np.linspace(0, 1, 6)
    np.testing.assert_allclose(np.quantile(shorter, quantiles), 40 + 40 * quantiles, atol=3)
    for start, side, whole in ((left, width, 250), (top, height, 200)):
        share = start / (whole - side)
        np.testing.assert_allclose(np.quantile(share, quantiles), quantiles, atol=0.08)


def test_a_scale_crop_of_the_whole_shorter_side():
    crop = scale_crop(plane(250, 200), 64, np.random.default_rng(0), shorter=(64, 64))
    _, top, width, height = place(crop)
    np.testing.assert_allclose((top, width, height), (0, 200, 200), atol=1)


@pytest.mark.parametrize(("width", "height"), [(240, 160), (160, 240)])
def test_the_middle_after_the_shorter_side_is_resized(width, height):
    crop = center_crop(plane(width, height), 64, resize=80)
    side = 160 * 64 / 80
    expected = ((width - side) / 2, (height - side) / 2, side, side)
    np.testing.assert_allclose(place(crop), expected, atol=1)


def test_small_images_are_enlarged():
    crop = center_crop(plane(8, 8), 64, resize=64)
    np.testing.assert_allclose(place(crop[8:-8, 8:-8]), (1, 1, 6, 6), atol=0.3)


def test_sides_that_leave_too_little_are_refused():
    with pytest.raises(ValueError, match="resize 31 must be at least size 32"):
        center_crop(plane(), 32, resize=31)
    for shorter in ((31, 64), (64, 40)):
        with pytest.raises(ValueError, match=r"shorter \(.*\) must be .* at least size 32"):
            scale_crop(plane(), 32, np.random.default_rng(0), shorter=shorter)


@pytest.mark.parametrize("name", ["random", "scale"])
def test_a_crop_depends_on_the_generator_alone(name):
    crop = {"random": random_resized_crop, "scale": scale_crop}[name]
    data = jpeg()
    first, again = (crop(data, 24, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, crop(data, 24, np.random.default_rng(8)))


# --- which pixels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(6))
def test_a_crop_is_that_of_the_whole_image(settings, seed):
    data = jpeg(203, 151, **settings)
    # The same draws give the box, which a crop does not tell.
    box = decoding._random_box(
        203, 151, np.random.default_rng(seed), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)
    )
    whole = Image.open(io.BytesIO(data)).resize((104, 104), Image.Resampling.BILINEAR, box)
    crop = random_resized_crop(data, 104, np.random.default_rng(seed))
    np.testing.assert_allclose(crop, np.asarray(whole), atol=2)


@pytest.mark.skipif(decoding.cykooz_resizer is None, reason="resflax[fast] is not installed")
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_both_packages_read_alike(kind, format, monkeypatch):
    if (kind, format) == ("CMYK", "PNG"):
        pytest.skip("there are none")
    data = encode(Image.fromarray(noisy(203, 151).astype(np.uint8)).convert(kind), format)
    fast = {name: crop(data, 97) for name, crop in EVERY_CROP.items()}
    monkeypatch.setattr(decoding, "cykooz_resizer", None)
    for name, crop in EVERY_CROP.items():
        np.testing.assert_allclose(fast[name], crop(data, 97), atol=1, err_msg=name)


@pytest.mark.skipif(decoding.cykooz_resizer is None, reason="resflax[fast] is not installed")
def test_what_is_read_is_what_pillow_can_read(monkeypatch):
    # A remainder before the end of the file, as in some of ImageNet's: only a warning to Pillow.
    data = encode(noisy(203, 151).astype(np.uint8), "JPEG")
    data = data[:-2] + b"\x12\x34\x56" + data[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        decoding.simplejpeg.decode_jpeg(data)
    crop = center_crop(data, 97, resize=100)
    monkeypatch.setattr(decoding, "cykooz_resizer", None)
    np.testing.assert_allclose(crop, center_crop(data, 97, resize=100), atol=1)


def test_pixels_are_means_over_what_they_cover():
    # A point-wise resampling of a chequered board has stripes.
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    crop = center_crop(encode(board), 20, resize=20)
    np.testing.assert_allclose(crop, 127.5, atol=12)


@pytest.mark.parametrize("times", [4, 5, 9, 17])
def test_large_jpegs_differ_little_where_less_is_decoded(times):
    picture = Image.fromarray(noisy(400, 300).astype(np.uint8))
    data = encode(picture.resize((400 * times // 2, 300 * times // 2)), "JPEG", quality=90)
    crop = center_crop(data, 140, resize=150).astype(float)
    whole = Image.open(io.BytesIO(data))
    side = whole.height * 140 / 150
    left, top = (whole.width - side) / 2, (whole.height - side) / 2
    box = (left, top, left + side, top + side)
    expected = np.asarray(whole.resize((140, 140), Image.Resampling.BILINEAR, box), float)
    assert np.abs(crop - expected).mean() < 2
    assert abs((crop - expected).mean()) < 0.3


# By value of the Exif tag, how an upright image is stored.
STORED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("tag", STORED)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_stand_upright(tag, kind):
    exif = Image.Exif()
    exif[0x0112] = tag
    upright = smooth(90, 60)
    settings = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    stored = encode(np.ascontiguousarray(STORED[tag](upright)), kind, exif=exif, **settings)
    with Image.open(io.BytesIO(stored)) as image:
        difference = np.asarray(ImageOps.exif_transpose(image), int) - upright
    assert np.abs(difference).max() < 8
    for name, crop in EVERY_CROP.items():
        expected = crop(encode(upright), 20)
        np.testing.assert_allclose(crop(stored, 20), expected, atol=4, err_msg=name)


@pytest.mark.parametrize(
    ("rgb", "cmyk"), [((255, 0, 0), (0, 255, 255, 0)), ((0, 0, 0), (0, 0, 0, 255))]
)
def test_cmyk_is_read_as_adobe_stores_it(rgb, cmyk):
    # Pillow writes the Adobe marker, and the inks inverted, as Photoshop does.
    data = encode(Image.new("CMYK", (40, 40), cmyk), "JPEG", quality=95)
    assert b"Adobe" in data
    crop = center_crop(data, 16, resize=16)
    np.testing.assert_allclose(crop, np.broadcast_to(rgb, (16, 16, 3)), atol=3)


def png(bits, colour, rows):
    """A PNG of samples that Pillow does not write; the rows are those of the file, in bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    width = len(rows[0]) * 8 // (bits * channels)
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_scaled(colour, channels):
    ramp = np.repeat(np.linspace(0, 65535, 32), 2 * channels).reshape(1, 64, channels)
    rows = [row.astype(">u2").tobytes() for row in np.repeat(ramp, 64, 0)]
    crop = center_crop(png(16, colour, rows), 64, resize=64)
    expected = np.linspace(0, 255, 32).repeat(2)
    np.testing.assert_allclose(crop, np.broadcast_to(expected[None, :, None], crop.shape), atol=6)
    # Scaled, not clipped: dark ones are dark, and few are white.
    assert (crop == 255).mean() < 0.1


def palette(transparency=None):
    image = Image.new("P", (30, 30), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return encode(image) if transparency is None else encode(image, transparency=transparency)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(Image.new("L", (30, 30), 77)), (77, 77, 77)),
        (encode(Image.new("L", (30, 30), 77), "JPEG"), (77, 77, 77)),
        (encode(Image.new("L", (30, 30), 77), transparency=77), (77, 77, 77)),
        (encode(Image.new("1", (30, 30), 1)), (255, 255, 255)),
        (png(2, 0, [b"\xaa" * 8] * 32), (170, 170, 170)),
        (palette(), (10, 200, 30)),
        (palette(1), (10, 200, 30)),
        (palette(b"\xff\x40"), (10, 200, 30)),
        (encode(Image.new("RGB", (30, 30), (1, 2, 3)), transparency=(1, 2, 3)), (1, 2, 3)),
        # Under the transparency there is a colour: it is kept.
        (encode(Image.new("RGBA", (30, 30), (10, 200, 30, 0))), (10, 200, 30)),
        (encode(Image.new("LA", (30, 30), (77, 128))), (77, 77, 77)),
    ],
)
def test_every_mode_becomes_rgb(data, colour):
    for crop in EVERY_CROP.values():
        pixels = crop(data, 8)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.broadcast_to(colour, (8, 8, 3)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_channel_is_grey(kind):
    colours = Image.fromarray(smooth(64, 48))
    crop = center_crop(encode(colours, kind, quality=98), 20, resize=24, channels=1)
    expected = center_crop(encode(colours.convert("L")), 20, resize=24, channels=1)
    assert crop.shape == (20, 20, 1)
    np.testing.assert_allclose(crop, expected, atol=3)


def test_crops_are_contiguous():
    exif = Image.Exif()
    exif[0x0112] = 7
    for crop in EVERY_CROP.values():
        for mode in ("L", "RGB"):
            data = encode(Image.new(mode, (50, 40), 9), exif=exif)
            assert crop(data, 8).flags.c_contiguous


# --- what cannot be read -------------------------------------------------------------------------


GIF = encode(Image.new("P", (9, 9)), "GIF")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "has no bytes"),
        (b"\0" * 500, "is not an image"),
        (b"<html>not found</html>", "is not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "begins as a PNG"),
        (GIF, "is a GIF; JPEG and PNG can be read"),
        (jpeg()[:2], "begins as a JPEG, but has no header"),
        (jpeg()[:100], "Truncated"),
        (plane()[:20], "Truncated"),
        (jpeg()[:-2000], "truncated"),
        (plane()[:-200], "truncated|broken"),
    ],
)
def test_what_cannot_be_read_is_told_why(data, reason):
    for crop in EVERY_CROP.values():
        with pytest.raises(UnreadableImage, match=reason) as caught:
            crop(data, 8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_no_truncated_jpeg_becomes_grey(share, settings):
    data = jpeg(320, 240, **settings)
    for crop in EVERY_CROP.values():
        with pytest.raises(UnreadableImage):
            crop(data[: int(share * len(data))], 32)


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_garbled_bytes_are_an_error_or_an_image():
    rng = np.random.default_rng(0)
    noticed = collections.Counter()
    files = {"JPEG": jpeg(), "PNG": encode(noisy().astype(np.uint8))}
    for kind, data in files.items():
        for _ in range(100):
            garbled = bytearray(data)
            where = rng.integers(len(data) - 40)
            garbled[where : where + 40] = rng.bytes(40)
            try:
                assert center_crop(bytes(garbled), 16, resize=16).shape == (16, 16, 3)
            except UnreadableImage:
                noticed[kind] += 1
    # A decoder of JPEG goes on at most errors; nearly every byte of a PNG is summed up.
    assert 5 < noticed["JPEG"] < 95
    assert noticed["PNG"] > 90


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_garbled_orientation_is_no_reason():
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = smooth(60, 60)
    data = encode(upright, exif=exif.tobytes()[:-12] + b"\xff" * 3)
    np.testing.assert_allclose(
        center_crop(data, 20, resize=20), center_crop(encode(upright), 20, resize=20)
    )


def test_a_header_that_asks_for_all_memory_is_refused():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = plane()
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(UnreadableImage, match="pixels"):
        center_crop(data[:16] + header + crc + data[33:], 8, resize=8)
