"""The images of a data set that cannot be read: counted, named, and too many of them an error."""

import threading
from collections.abc import Iterator

from resflax.errors import UserError


class UnreadableImage(UserError):  # noqa: N818 - what is wrong is the image
    """There is no image that can be read; the message is the reason: 'it has no bytes'."""


class BadImagesError(UserError):
    """More images cannot be read than config.data.max_bad allows."""


class BadImages:
    """Those met so far, each counted once; safe between threads."""

    def __init__(self, most: int):
        """Allows `most` of them."""
        self._most = most
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def __iter__(self) -> Iterator[str]:
        """Lines 'name: reason', in the order in which they were met."""
        with self._lock:
            lines = [f"{name}: {reason}" for name, reason in self._reasons.items()]
        return iter(lines)

    def add(self, name: str, reason: str) -> None:
        """Takes down an image.

        Raises:
          BadImagesError: if there are too many now.
        """
        with self._lock:
            self._reasons.setdefault(name, reason)
            count = len(self._reasons)
        if count > self._most:
            raise BadImagesError(
                f"{name} cannot be read: {reason}. It is number {count} of such images, and "
                f"config.data.max_bad allows {self._most}; python -m resflax.data verify names all."
            )
