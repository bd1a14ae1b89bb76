"""Makes data sets ready to be trained on; the only place that downloads."""

import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from resflax.data import idx
from resflax.data import tfds as prepared
from resflax.data.arrays import LABEL_NAMES
from resflax.errors import UserError

# zalandoresearch/fashion-mnist, README, 'Labels'.
FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip

# Of the unpacked bytes of each file, and what we call the array in it. The archives themselves
# differ: Debian has packed them again.
_FASHION_MNIST = {
    "train_images": (
        "train-images-idx3-ubyte",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train_labels": (
        "train-labels-idx1-ubyte",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test_images": (
        "t10k-images-idx3-ubyte",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "test_labels": (
        "t10k-labels-idx1-ubyte",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}

# That a server may take to answer.
_NETWORK_SECONDS = 20


class PrepareError(UserError):
    """The data set cannot be prepared; the message says why."""


def fashion_mnist(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Fashion-MNIST (arXiv 1708.07747) from its four IDX files: 60,000 and 10,000 images.

    Debian's package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist.

    Args:
      source: directory of the files, gzipped or not, whose unpacked bytes are checked.
      target: the directory to be made, of .npy files and label_names.txt; it appears whole or not
        at all. One that is there and the same is left.

    Returns:
      `target`.

    Raises:
      PrepareError: if a file is missing or not the published one, or `target` is something else.
    """
    arrays = {
        name: _published(source, file, digest) for name, (file, digest) in _FASHION_MNIST.items()
    }
    if _there(target, arrays):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise PrepareError(
            f"{target.parent} cannot be written: {error.strerror or error}."
        ) from None
    try:
        for name, array in arrays.items():
            np.save(building / f"{name}.npy", array, allow_pickle=False)
        (building / LABEL_NAMES).write_text("\n".join(FASHION_MNIST_LABELS) + "\n")
        building.chmod(0o755)  # mkdtemp's is for its owner alone
        os.rename(building, target)
    except OSError as error:
        # Another process may have been faster.
        if not _there(target, arrays):
            raise PrepareError(f"{target} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _published(source: pathlib.Path, file: str, digest: str) -> np.ndarray:
    candidates = [source / f"{file}{ending}" for ending in (".gz", "")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise PrepareError(
            f"there is no {candidates[0]} (nor without .gz); on Debian, apt-get install "
            "dataset-fashion-mnist puts the four files in /usr/share/datasets/fashion-mnist."
        )
    try:
        data = idx.contents(path)
        if hashlib.sha256(data).hexdigest() != digest:
            raise PrepareError(
                f"{path} is not Fashion-MNIST's {file}: the SHA-256 of its unpacked bytes begins "
                f"with {hashlib.sha256(data).hexdigest()[:12]}, that of the published ones with "
                f"{digest[:12]}."
            )
        return idx.parse(data, path)
    except idx.IdxError as error:
        raise PrepareError(str(error)) from None


def _there(target: pathlib.Path, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the data set is at `target` already.

    Raises:
      PrepareError: if something else is.
    """
    if not os.path.lexists(target):
        return False
    for name, array in arrays.items():
        file = target / f"{name}.npy"
        try:
            same = np.array_equal(np.load(file, mmap_mode="r", allow_pickle=False), array)
        except (OSError, ValueError, EOFError):
            same = False
        if not same:
            raise PrepareError(
                f"{target} is there, but {file.name} in it is not the data set's: remove {target}, "
                "which is never overwritten, and prepare again."
            )
    names = target / LABEL_NAMES
    if not names.is_file() or names.read_text().splitlines() != list(FASHION_MNIST_LABELS):
        raise PrepareError(
            f"{target} is there, but {names.name} in it is not the data set's: remove {target}, "
            "which is never overwritten, and prepare again."
        )
    print(f"{target} is there already, and whole: it was left as it is.")
    return True


def tfds(name: str, data_dir: pathlib.Path | None = None) -> pathlib.Path:
    """Downloads a data set of TFDS and prepares it as array_record, which is read at random.

    Args:
      name: NAME[/CONFIG][:VERSION], as TFDS writes it.
      data_dir: of TFDS; None: $TFDS_DATA_DIR, or else ~/tensorflow_datasets.

    Returns:
      Its directory. One that is there is left.

    Raises:
      PrepareError: if TFDS has no such data set, the network does not answer, a package is needed
        that is not installed, or the library gives up for another reason.
    """
    there = _prepared(name, data_dir)
    if there is not None:
        print(f"{there} is there already: it was left as it is.")
        return there
    # Imported here: they take seconds.
    import requests
    import tensorflow_datasets as library

    try:
        builder = library.builder(
            name, data_dir=prepared.root(data_dir), file_format="array_record"
        )
        # Its copy of prepared data in Google's cloud is of another format, and without a network
        # the library waits for it for minutes.
        config = library.download.DownloadConfig(try_download_gcs=False)
        _check_network(name, builder, prepared.root(data_dir) / "downloads")
        builder.download_and_prepare(download_config=config)
    except PrepareError:
        raise
    except library.core.DatasetNotFoundError:
        raise PrepareError(
            f"TFDS {library.__version__} has no data set {name!r}; "
            "www.tensorflow.org/datasets/catalog lists them."
        ) from None
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        install = "'resflax[tf]'" if package == "tensorflow" else package
        raise PrepareError(
            f"TFDS needs {package} to prepare {name}: pip install {install}. What was downloaded "
            "is kept, and to read the data set takes no TensorFlow."
        ) from error
    except (requests.exceptions.RequestException, ConnectionError, TimeoutError) as error:
        raise PrepareError(
            f"{name} cannot be downloaded: the network does not answer: {_one_line(error)}"
        ) from error
    # Whatever a data set's own code raises.
    except Exception as error:
        raise PrepareError(f"{name} cannot be prepared: {_one_line(error)}") from error
    return pathlib.Path(builder.data_dir)


def _check_network(name: str, builder: Any, downloads: pathlib.Path) -> None:
    """That a server of the data set answers at all: the library would try for minutes.

    Where files are there already, or are to be put there by hand, they may be all that is needed.
    """
    import requests

    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if by_hand or any(path.is_file() for path in downloads.rglob("*")):
        return
    for url in sorted(builder.url_infos or ())[:1]:
        try:
            requests.head(url, timeout=_NETWORK_SECONDS)
        except requests.exceptions.RequestException as error:
            raise PrepareError(
                f"{name} cannot be downloaded: the network does not answer at {url}."
            ) from error


def _prepared(name: str, data_dir: pathlib.Path | None) -> pathlib.Path | None:
    try:
        where = prepared.find(name, data_dir)
    except prepared.TfdsError:
        return None
    if "array_record" not in prepared.formats(where):
        raise PrepareError(
            f"{where} is there, with files of another format, and is never overwritten. This adds "
            f"array_record files: {prepared.conversion(where)}"
        )
    return where


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
