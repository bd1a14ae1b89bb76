"""Whose a checkpoint is: the config and the data in its manifest, beside those of a run."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import ml_collections

from resflax import config as config_lib
from resflax.checkpoint.manifest import DamageError, Manifest
from resflax.data.sources import Description
from resflax.run import workdir as workdir_lib


class StrangerError(DamageError):
    """A checkpoint is whole, and of another run or step; the message says what differs."""

    kind = "is not this run's"


def of_run(
    config: ml_collections.ConfigDict, description: Description, **counts: int
) -> dict[str, Any]:
    """What a checkpoint of a run has in its manifest's facts, to be known by.

    Args:
      config: of the run.
      description: of its data set.
      **counts: of its images, where they are known.
    """
    data = dataclasses.asdict(description) | counts
    return {"config": json.loads(config_lib.to_json(config)), "data": data}


def require(manifest: Manifest, step: int, run: dict[str, Any] | None = None) -> None:
    """Raises StrangerError unless a checkpoint is of a step, and of a run.

    What an older version did not note is not compared.

    Args:
      manifest: of the checkpoint.
      step: that its directory is named after.
      run: see of_run; None: any.
    """
    if manifest.step not in (None, step):
        raise StrangerError(f"its directory holds the state of step {manifest.step}.")
    facts, run = manifest.facts, run or {}
    changes = []
    if "config" in facts and "config" in run:
        try:
            saved, wanted = (
                config_lib.from_json(json.dumps(owner["config"])) for owner in (facts, run)
            )
        except config_lib.ConfigError as error:  # of a later version
            raise StrangerError(f"its config is {error}") from None
        changes = config_lib.difference(saved, wanted, but=config_lib.MAY_DIFFER)
    changes += workdir_lib.data_difference(facts.get("data", {}), run.get("data", {}))
    if changes:
        raise StrangerError(f"its config or data were others ({'; '.join(changes)}).")


def digests(manifest: Manifest) -> set[str]:
    """SHA-256 of the config that a checkpoint was saved with, as it was and as it is written now.

    Version 0.1 wrote each argument of the network that was not set as null.
    """
    facts = manifest.facts
    found = {facts.get("config_sha256", "")}
    if "config" in facts:
        with contextlib.suppress(config_lib.ConfigError):  # of a later version
            config = config_lib.from_json(json.dumps(facts["config"]))
            found.add(hashlib.sha256(config_lib.to_json(config).encode()).hexdigest())
    return found


def doubt(manifest: Manifest, workdir: pathlib.Path) -> str:
    """What cannot be told of a checkpoint whose version noted no more than its config's digest.

    Returns:
      A sentence; '' where the digest is that of the run's config, or there is nothing to compare.
    """
    digest = manifest.facts.get("config_sha256")
    path = workdir / workdir_lib.CONFIG
    if digest is None or "config" in manifest.facts or not path.exists():
        return ""
    texts = path.read_text(), config_lib.to_json(workdir_lib.read_config(workdir))
    if digest in (hashlib.sha256(text.encode()).hexdigest() for text in texts):
        return ""
    return (
        f"the checkpoint of step {manifest.step} was saved with another config than {path}, or by "
        "another version of resflax, which noted no more than a digest of it."
    )
