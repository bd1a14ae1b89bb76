"""Where prepared data sets live."""

import os
import pathlib

from resflax.errors import UserError


def data_dir() -> pathlib.Path:
    """The directory of prepared data sets, which may not exist yet.

    $RESFLAX_DATA_DIR; else $XDG_DATA_HOME/resflax; else ~/.local/share/resflax. An empty variable
    counts as none.

    Raises:
      UserError: if none is set, and there is no home directory.
    """
    own = os.environ.get("RESFLAX_DATA_DIR")
    if own:
        return pathlib.Path(own).expanduser()
    shared = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    try:
        return pathlib.Path(shared).expanduser() / "resflax"
    except RuntimeError:  # as in a container whose user is a number
        raise UserError(
            "there is no home directory for prepared data sets; RESFLAX_DATA_DIR names another one."
        ) from None
