"""Times the host's way from JPEG files to batches of crops, beside tf.data's.

python -m benchmarks.pipeline [--images N] [--size PIXELS] [--threads N] [--peer tf.data]
  [--json FILE]

The files are of ImageNet's usual size, 500 x 375, with edges and detail at all scales, so that a
decoder has as much to do as on a photograph. Both read them in a random order, crop a random
rectangle (Inception's), resample it bilinearly and batch the crops as uint8; mirroring is left to
the device. tf.data's decoder decodes only the crop, its crops are smaller in the mean, and its
resampling is not antialiased, as in most ImageNet pipelines of TensorFlow: all three save it time.
In one form it is antialiased, as ours is.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
from PIL import Image, ImageDraw

from resflax.bench import peers, report
from resflax.bench.rounds import Costs, Entry, Result, measure, ratio
from resflax.data import decoding, pipeline
from resflax.data.bad import BadImages
from resflax.data.examples import DecodedSource
from resflax.data.folder import FolderSource
from resflax.process.arguments import Parser, path_option

WIDTH, HEIGHT, QUALITY = 500, 375, 90

# Passes over the files in a contender's turn, in one: a pipeline takes a moment to fill.
_PASSES = 3

# Passes between the two looks at the memory that the process holds.
_MEMORY_PASSES = 10

_STATM = pathlib.Path("/proc/self/statm")


def jpegs(count: int, seed: int = 0) -> Iterator[bytes]:
    """Images of edges and of noise whose power falls with its frequency as that of photographs.

    Args:
      count: of the images.
      seed: of all of them.

    Yields:
      JPEG files of 500 x 375 pixels, of quality 90 and 50 to 100 kB.
    """
    rng = np.random.default_rng(seed)
    side = 1024
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    spectrum = np.fft.rfft2(rng.normal(size=(3, side, side))) / (frequency + 1 / side) ** 1.4
    fields = np.fft.irfft2(spectrum, (side, side))
    fields /= fields.std()
    for _ in range(count):
        top, left = rng.integers(side - HEIGHT), rng.integers(side - WIDTH)
        field = fields[:, top : top + HEIGHT, left : left + WIDTH]
        mixed = np.tensordot(rng.normal(size=(3, 3)) * 12 + 30, field, 1).transpose(1, 2, 0)
        mixed += rng.uniform(90, 160, 3)
        image = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
        _draw_shapes(image, rng)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


def _draw_shapes(image: Image.Image, rng: np.random.Generator) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers((WIDTH, HEIGHT)).tolist()
        w, h = rng.integers(10, 100, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x, y, x + w, y + h), outline=colour, width=3)
        draw.line((x, y, x - w, y + h), fill=colour, width=2)


def write_folder(folder: pathlib.Path, count: int) -> FolderSource:
    """Writes so many of the `jpegs` into a folder, all of class 0; returns them as a source."""
    files = []
    for i, data in enumerate(jpegs(count)):
        files.append(folder / f"{i}.jpg")
        files[-1].write_bytes(data)
    return FolderSource.of([(path, 0) for path in files])


def batches(
    source: FolderSource, *, size: int, batch_size: int, threads: int, passes: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """Batches of random crops, uint8 [batch_size, size, size, 3], as training reads them.

    Args:
      source: of the encoded images.
      size: side of the crops, pixels.
      batch_size: crops in a batch; what does not fill one is left out.
      threads: that read and decode, a batch each.
      passes: over the files; each in another order and with other crops.
      seed: of the order and of the crops.
    """

    def decode(data: bytes, rng: np.random.Generator) -> np.ndarray:
        return decoding.random_resized_crop(data, size, rng)

    decoded = DecodedSource(source, decode, decode, (size, size, 3), BadImages(0))
    train_batches = pipeline.TrainBatches(
        len(source),
        batch_size=batch_size,
        seed=seed,
        read=decoded.train_batch,
        # They stay on the host: what is measured ends there.
        put=lambda batch, axis: batch,
        threads=threads,
    )
    steps = passes * train_batches.steps_per_epoch
    return (batch["image"] for _, batch in train_batches.take([1] * steps))


class OwnContender:
    """Our pipeline: see rounds.Contender. A step is a pass over the files."""

    def __init__(self, source: FolderSource, size: int, batch_size: int, threads: int):
        self._source = source
        self._settings = {"size": size, "batch_size": batch_size, "threads": threads}
        self._turns = itertools.count()

    def run(self, steps: int) -> None:
        """Makes the batches of so many passes, and drops them."""
        turn = batches(self._source, passes=steps, seed=next(self._turns), **self._settings)
        for _ in turn:
            pass

    def costs(self) -> Costs:
        """Nothing but time is looked at."""
        return Costs()


class TensorFlowContender:
    """tf.data with the decoder that decodes no more than the crop. A step is a pass.

    Args:
      source: of the files.
      size: side of the crops, pixels.
      batch_size: crops in a batch.
      threads: that decode; None lets tf.data tune them.
      antialias: whether a pixel is a mean over all that it covers, as ours are.
    """

    def __init__(
        self,
        source: FolderSource,
        size: int,
        batch_size: int,
        threads: int | None,
        antialias: bool,
    ):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        calls = tf.data.AUTOTUNE if threads is None else threads

        def crop(path: Any) -> Any:
            data = tf.io.read_file(path)
            begin, extent, _ = tf.image.sample_distorted_bounding_box(
                tf.io.extract_jpeg_shape(data),
                tf.zeros((0, 0, 4)),
                area_range=(0.08, 1.0),
                aspect_ratio_range=(3 / 4, 4 / 3),
                max_attempts=10,
                use_image_if_no_bounding_boxes=True,
            )
            box = tf.concat([begin[:2], extent[:2]], 0)
            image = tf.io.decode_and_crop_jpeg(data, box, channels=3)
            image = tf.image.resize(image, (size, size), "bilinear", antialias=antialias)
            return tf.cast(image, tf.uint8)

        def turn(passes: int) -> Any:
            return (
                tf.data.Dataset.from_tensor_slices(paths)
                .shuffle(len(paths))
                .repeat(passes)
                .map(crop, calls, deterministic=False)
                .batch(batch_size, drop_remainder=True)
                .prefetch(tf.data.AUTOTUNE)
            )

        paths = list(source.files)
        self._turn = turn

    def run(self, steps: int) -> None:
        """Makes the batches of so many passes, and drops them."""
        for _ in self._turn(steps).as_numpy_iterator():
            pass

    def costs(self) -> Costs:
        """Nothing but time is looked at."""
        return Costs()


def resident_bytes() -> int | None:
    """Memory that this process holds; None where the system does not say."""
    if not _STATM.exists():
        return None
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)
    console = report.Screen()
    load = report.load()
    if load > peers.cores() / 2:
        console.note(f"other programs are running: {load:.1f} in the last minute")
    with tempfile.TemporaryDirectory(prefix="resflax-bench-") as folder, console.progress():
        console.tell(f"{options.images} JPEGs")
        source = write_folder(pathlib.Path(folder), options.images)
        entries = list(_entries(source, options))
        console.tell("memory")
        memory = _memory(source, options)
        results = measure(
            entries,
            repeats=options.repeats,
            steps=_PASSES,
            max_seconds=math.inf,
            tell=console.tell,
        )
        file_bytes = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
    # Batches are whole: what is left over is not decoded.
    images = options.images // options.batch * options.batch
    _print(results, images, file_bytes / options.images, memory)
    if options.json:
        command = shlex.join(["python", "-m", "benchmarks.pipeline", *argv])
        settings = {k: str(v) if k == "json" else v for k, v in vars(options).items()}
        written = report.document([], {}, command, settings, load)
        written |= {
            "versions": written["versions"] | _versions(),
            "mean_file_bytes": file_bytes / options.images,
            "images_per_pass": images,
            "resident_bytes_by_pass": memory,
            "measurements": [_row(result, results[0], images) for result in results],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    return int(not results[0].seconds)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    first, _, _ = __doc__.partition("\n")
    parser = Parser(prog="python -m benchmarks.pipeline", description=first)
    add = parser.add_argument
    add("--images", type=int, default=512, metavar="N", help="files, each decoded in every pass")
    add("--size", type=int, default=224, metavar="PIXELS", help="side of the crops")
    add("--batch", type=int, default=64, metavar="N", help="crops in a batch")
    add("--threads", type=int, default=peers.cores(), metavar="N", help="default: one for a core")
    add("--peer", choices=("tf.data",), help="beside whom")
    add("--repeats", type=int, default=9, metavar="N", help="rounds, 3 or more")
    add("--json", type=path_option, metavar="FILE", help="write all that is measured")
    options = parser.parse_args(argv)
    for name, least in (("batch", 1), ("images", options.batch), ("size", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}.")
    if options.repeats < 3:
        parser.error(f"--repeats {options.repeats} must be at least 3.")
    if options.peer and importlib.util.find_spec("tensorflow") is None:
        parser.error(
            f"--peer {options.peer} needs tensorflow, which is not installed: "
            'pip install "resflax[tf]".'
        )
    return options


def _entries(source: FolderSource, options: argparse.Namespace) -> Iterator[Entry]:
    arguments = (source, options.size, options.batch)
    yield Entry("resflax", "", functools.partial(OwnContender, *arguments, options.threads))
    if options.peer:
        given = f"{options.threads} threads"
        for form, threads, antialias in (
            ("tuned", None, False),
            (given, options.threads, False),
            (f"{given}, antialiased", options.threads, True),
        ):
            build = functools.partial(TensorFlowContender, *arguments, threads, antialias)
            yield Entry("tf.data", form, build)


def _memory(source: FolderSource, options: argparse.Namespace) -> list[int | None]:
    """What the process holds after each pass of one pipeline, the first of which is a warm-up."""
    made = batches(
        source,
        size=options.size,
        batch_size=options.batch,
        threads=options.threads,
        passes=1 + _MEMORY_PASSES,
    )
    a_pass = len(source) // options.batch
    return [resident_bytes() for i, _ in enumerate(made, 1) if i % a_pass == 0]


def _print(
    results: Sequence[Result], images: int, file_bytes: float, memory: list[int | None]
) -> None:
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(
        title=f"JPEGs of {WIDTH} x {HEIGHT}, {file_bytes / 1000:.0f} kB in the mean",
        title_justify="left",
        title_style="bold",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in ("images/s", "images/s, core", "time / ours"):
        table.add_column(heading, justify="right")
    for result in results:
        name = f"{result.peer} {result.form}".rstrip()
        if result.failure:
            table.add_row(name, "failed", style="dim")
            continue
        rate = images / result.median
        cells = [f"{rate:,.0f}", f"{rate / peers.cores():,.0f}"]
        if result is not results[0]:
            cells.append(report.spread(ratio(results[0], result)))
        table.add_row(name, *cells, style="bold" if result is results[0] else None)
    console.print(table)
    where = report.machine()
    lines = [f"host: {where['cpu']}, {where['cores']} cores"]
    if memory[0] and memory[-1]:
        held = f"{memory[0] / 2**20:,.0f} MiB, after {_MEMORY_PASSES} more passes "
        lines.append(f"memory held: {held}{memory[-1] / 2**20:,.0f} MiB")
    for line in lines:
        console.print(line, style="dim", soft_wrap=True, markup=False)


def _row(result: Result, ours: Result, images: int) -> dict[str, Any]:
    row: dict[str, Any] = {"peer": result.peer, "form": result.form, "failure": result.failure}
    if result.seconds:
        rate = images / result.median
        row |= {
            "seconds_of_a_pass": result.seconds,
            "images_per_second": rate,
            "images_per_second_and_core": rate / peers.cores(),
            "ratio": None if result is ours else ratio(ours, result)._asdict(),
        }
    return row


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for library in (
        "grain",
        "pillow",
        "cykooz-resizer",
        "simplejpeg",
        "tensorflow-cpu",
        "tensorflow",
    ):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
