"""What is published of the named networks: counts and errors, row by row with their sources."""

import csv
import dataclasses
import functools
import importlib.resources
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of published.csv; what a source does not say is None or, of an error, empty.

    Attributes:
      model: name of the network.
      overrides: what `create_model` is told beside the name.
      num_classes: units of the classifier: 1000 on ImageNet, 10 and 100 on CIFAR.
      input_size: side of the images, pixels.
      params: trainable parameters.
      gmacs: 10^9 multiply-adds of one image, to four decimals.
      top1, top5: errors in percent, as printed: '23.870', '>60', 'fail(>20)'.
      source: who counted, and which table of which paper (by its arXiv number) has the errors.
    """

    model: str
    overrides: dict[str, Any]
    num_classes: int
    input_size: int
    params: int | None
    gmacs: float | None
    top1: str
    top5: str
    source: str


@functools.cache
def table() -> tuple[Published, ...]:
    """All rows, in the order of the file."""
    text = importlib.resources.files("resflax.models").joinpath("published.csv").read_text("utf-8")
    return tuple(
        Published(
            row["model"],
            json.loads(row["overrides"] or "{}"),
            int(row["num_classes"]),
            int(row["input_size"]),
            int(row["params"]) if row["params"] else None,
            float(row["gmacs"]) if row["gmacs"] else None,
            row["top1"],
            row["top5"],
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def published(name: str) -> tuple[Published, ...]:
    """The rows of a network, with and without overrides; none if nothing is published of it."""
    return tuple(row for row in table() if row.model == name)
