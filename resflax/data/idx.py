"""Files of the IDX format, in which MNIST and its family are published.

yann.lecun.com/exdb/mnist, 'File formats': two zero bytes, a byte for the type of the numbers, a
byte for the number of dimensions, the size of each as a big-endian uint32, and the numbers.
"""

import gzip
import io
import math
import os
import pathlib
import struct
import zlib

import numpy as np

from resflax.errors import UserError

_UINT8 = 0x08
_GZIP = b"\x1f\x8b"


class IdxError(UserError):
    """The file cannot be read, or is none of the format; the message says which and why."""


def read(path: str | pathlib.Path) -> np.ndarray:
    """The array in a file, gzipped or not: uint8, read-only.

    Raises:
      IdxError: if it is no whole file of bytes in this format.
    """
    return parse(contents(path), path)


def contents(path: str | pathlib.Path) -> bytes:
    """The bytes of a file; if it is gzipped, which its first bytes say, those that were packed.

    Raises:
      IdxError: if it cannot be read, or the archive is broken.
    """
    try:
        data = pathlib.Path(path).read_bytes()
        return _unpacked(data, path) if data.startswith(_GZIP) else data
    except EOFError:
        raise IdxError(f"{path} is a gzip archive that was cut short: copy it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"{path} is a broken gzip archive ({error}): copy it again.") from None
    except OSError as error:
        raise IdxError(f"{path} cannot be read: {error.strerror}.") from None


def _unpacked(data: bytes, path: str | pathlib.Path) -> bytes:
    """What a gzip archive holds, as far as its header says: an archive may unpack to any size.

    A byte more is unpacked, so that `parse` sees that it is there.
    """
    with gzip.open(io.BytesIO(data)) as archive:
        head = archive.read(4)
        rank = head[3] if len(head) == 4 else 0
        head += archive.read(4 * rank)
        if len(head) < 4 + 4 * rank or head[:3] != bytes([0, 0, _UINT8]):
            return head
        size = math.prod(struct.unpack_from(f">{rank}I", head, 4))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory:
            raise IdxError(
                f"{path} would have {size:,} bytes unpacked, by its header; this machine has "
                f"{memory:,} bytes of memory."
            )
        return head + archive.read(size + 1)


def parse(data: bytes, path: str | pathlib.Path) -> np.ndarray:
    """The array in the bytes of a file.

    Args:
      data: of the file, unpacked.
      path: that errors name.

    Raises:
      IdxError: if they are no whole array of bytes in this format.
    """
    rank = data[3] if len(data) >= 4 else 0
    if data[:3] != bytes([0, 0, _UINT8]) or not rank:
        raise IdxError(
            f"{path} begins with the bytes {data[:4].hex(' ') or '(none)'}; an IDX file of uint8 "
            "begins with 00 00 08 and its number of dimensions."
        )
    start = 4 + 4 * rank
    if len(data) < start:
        raise IdxError(f"{path} has {len(data)} bytes; its header alone has {start}.")
    shape = struct.unpack_from(f">{rank}I", data, 4)
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise IdxError(
            f"{path} has {len(data):,} bytes (unpacked); with its shape "
            f"{' x '.join(map(str, shape))} it would have {expected:,}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
