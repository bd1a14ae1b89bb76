"""A checkpoint's manifest: what it must be, byte by byte, so that damage is never restored.

It is written before the checkpoint gets its name, and lists every file with its SHA-256, every
leaf with its shape, dtype and checksum, and what the checkpoint was made by. It has a digest of its
own. A checkpoint without one was not finished.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator
from typing import Any, Self

import flax
import jax
import jaxlib
import numpy as np
import optax
import orbax.checkpoint as ocp

from resflax.errors import UserError

FILE = "manifest.json"

# Orbax writes a time stamp into this file after the manifest; the rest of it must be as it was.
_STAMPED = "_CHECKPOINT_METADATA"
_STAMP = "commit_timestamp_nsecs"


class DamageError(UserError):
    """A checkpoint is not what was saved; the message names the file, and what is wrong with it."""

    kind = "is damaged"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a checkpoint.

    Attributes:
      shape: of the array.
      dtype: its name.
      checksum: see resflax.checkpoint.leaves.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint must be.

    Attributes:
      leaves: by item and path, such as 'variables/params/head/kernel'.
      metrics: of the evaluation of its state; empty if there was none.
      facts: what made it: see `facts`.
      files: bytes and SHA-256 of each, by its path in the checkpoint.
    """

    leaves: dict[str, Leaf]
    metrics: dict[str, float]
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def write(self, checkpoint: pathlib.Path) -> None:
        """Completes it with the files that are there, and puts it beside them."""
        names = set(_files(checkpoint)) - {FILE}
        files = {name: _digest(checkpoint / name) for name in sorted(names)}
        body = dataclasses.asdict(dataclasses.replace(self, files=files))
        (checkpoint / FILE).write_text(_text(body))

    @classmethod
    def read(cls, checkpoint: pathlib.Path) -> Self:
        """That of a checkpoint, whose files are not looked at.

        Raises:
          DamageError: if it has none, or a damaged one.
        """
        path = checkpoint / FILE
        try:
            text = path.read_text()
            body = json.loads(text)
            del body["sha256"]
            if text != _text(body):
                raise ValueError
            leaves = {
                name: Leaf(tuple(leaf["shape"]), leaf["dtype"], tuple(leaf["checksum"]))
                for name, leaf in body["leaves"].items()
            }
            files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
            return cls(leaves, body["metrics"], body["facts"], files)
        except FileNotFoundError:
            raise DamageError(f"{path} is missing: the save was not finished.") from None
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamageError(f"{path} is not what was written.") from None

    @classmethod
    def verify(cls, checkpoint: pathlib.Path, item: str = "") -> Self:
        """That of a checkpoint, each of whose files is as it was written.

        Args:
          checkpoint: its directory.
          item: of the checkpoint: only its files are read; '': all.

        Raises:
          DamageError: if one is not.
        """
        manifest = cls.read(checkpoint)
        if missing := sorted(manifest.files.keys() - set(_files(checkpoint))):
            raise DamageError(f"{checkpoint / missing[0]} is missing.")
        if strangers := manifest.strangers(checkpoint):
            raise DamageError(f"{checkpoint / strangers[0]} was not there when it was saved.")
        for name, (size, digest) in manifest.files.items():
            if item and not name.startswith(f"{item}/"):
                continue
            path = checkpoint / name
            try:
                found = _digest(path)
            except OSError as error:
                raise DamageError(f"{path} cannot be read: {error.strerror}.") from None
            if found[0] != size:
                raise DamageError(f"{path} has {found[0]:,} bytes, not {size:,} as when saved.")
            if found[1] != digest:
                raise DamageError(f"{path} is not what was written: its SHA-256 differs.")
        return manifest

    def strangers(self, checkpoint: pathlib.Path) -> list[str]:
        """Files among a checkpoint's arrays that are not of it.

        Those beside its items are no strangers: another version of orbax may leave some there after
        the manifest, as this one leaves a mark, and nothing reads them.
        """
        items = {name.partition("/")[0] for name in self.leaves}
        found = set(_files(checkpoint)) - self.files.keys()
        return sorted(name for name in found if name.partition("/")[0] in items)

    @property
    def step(self) -> int | None:
        """The step of the state, which is the checksum of a single number; None if it has none."""
        leaf = self.leaves.get("optimizer/step")
        return None if leaf is None else leaf.checksum[0]

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(size for size, _ in self.files.values())


def facts(config_text: str) -> dict[str, Any]:
    """What a checkpoint is made by, for whoever wants to repeat it.

    Args:
      config_text: of the run's config, of which the digest is noted.
    """
    return {
        "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        "revision": _revision(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "orbax": ocp.__version__,
            "numpy": np.__version__,
        },
        "topology": {
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
        },
    }


@functools.cache
def _revision() -> str | None:
    """The git commit of the code, with '-dirty' where it was changed; None: it is installed."""
    file = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # In a virtual environment inside a repository, that one is another project's.
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _files(checkpoint: pathlib.Path) -> Iterator[str]:
    # Unlike Path.rglob, this goes on where a run at work deletes a directory meanwhile.
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            yield pathlib.Path(folder, name).relative_to(checkpoint).as_posix()


def _digest(path: pathlib.Path) -> tuple[int, str]:
    """The bytes of a file, and their SHA-256."""
    if path.name == _STAMPED:
        text = path.read_text(errors="replace")
        # A number, whichever it is, or none.
        unstamped = re.sub(rf'"{_STAMP}": (\d+|null)', f'"{_STAMP}": ', text).encode()
        return len(unstamped), hashlib.sha256(unstamped).hexdigest()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def _text(body: dict[str, Any]) -> str:
    """The file, with a digest of what else is in it: not a byte of it can be another."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digest, **body}, indent=1) + "\n"
