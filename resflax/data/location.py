"""Where prepared data sets live."""

import os
import pathlib


def data_dir() -> pathlib.Path:
    """The directory of prepared data sets, which may not exist yet.

    $RESFLAX_DATA_DIR; else $XDG_DATA_HOME/resflax; else ~/.local/share/resflax. An empty variable
    counts as none.
    """
    own = os.environ.get("RESFLAX_DATA_DIR")
    if own:
        return pathlib.Path(own).expanduser()
    shared = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return pathlib.Path(shared).expanduser() / "resflax"
