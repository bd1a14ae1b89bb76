"""Prints the table of the networks: python -m resflax.models [PATTERN]."""

import sys

import rich.box
import rich.console
import rich.table

from resflax.models import count, create_model, list_models
from resflax.models.zoo import image_size


def main(argv: list[str]) -> int:
    """Prints the networks whose names match; returns the exit code."""
    pattern = argv[1] if len(argv) > 1 else "*"
    names = list_models(pattern)
    if not names:
        print(f"error: no network matches {pattern!r}; try '*{pattern}*'.", file=sys.stderr)
        return 2
    table = rich.table.Table("network", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("image", "parameters", "10^9 MACs"):
        table.add_column(heading, justify="right")
    for name in names:
        side = image_size(name)
        cost = count(create_model(name), (side, side, 3))
        table.add_row(name, str(side), f"{cost.params:,}", f"{cost.macs / 1e9:.4f}")
    rich.console.Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
