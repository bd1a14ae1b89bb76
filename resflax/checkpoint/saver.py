"""The checkpoints of a run that trains: saved in the background, verified, and gone on from.

A step's checkpoint has the items 'variables', 'ema' (where averages are kept), 'optimizer' (with
the step, the random key and the number of skipped updates), so that a script reads no more than the
variables. The step is the position in the data, too.
"""

import concurrent.futures
import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from resflax import disk
from resflax.checkpoint import leaves, store
from resflax.checkpoint.manifest import Manifest
from resflax.errors import UserError
from resflax.models import repeat
from resflax.process import distributed
from resflax.train_state import TrainState


class SaveError(UserError):
    """A state was not saved, and those before it are still there; the message says why."""


class Checkpointer:
    """Saves and restores the states of one run, in the background where it can."""

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int,
        *,
        facts: dict[str, Any] | None = None,
        report: Callable[[str], None] = lambda text: None,
        unsaved: Callable[[str], None] | None = None,
    ):
        """Opens the run's checkpoints; damaged ones are set aside.

        Args:
          workdir: absolute.
          keep: how many of the latest to keep; the best by the evaluation's top-1 stays besides.
          facts: for the manifests: see manifest.facts, and origin.of_run: another run's checkpoints
            are set aside as damaged ones are.
          report: is told what was found damaged or unfinished.
          unsaved: is told where a state cannot be saved, and why; None: SaveError is raised.

        Raises:
          CheckpointError: if there are checkpoints, and all of them are damaged.
        """
        self._workdir = workdir
        self._keep = keep
        self._facts = facts or {}
        self._unsaved = unsaved
        # Of the save that is under way: its step, and what makes its manifest.
        self._saving: tuple[int, Callable[[], Manifest]] | None = None
        # Of the evaluations of the states that are there, by step.
        self._metrics: dict[int, dict[str, float]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._begun: concurrent.futures.Future[None] | None = None
        self._report = report
        distributed.on_first(lambda: store.tidy(workdir, report, self._facts))
        for step in store.steps(workdir):
            self._metrics[step] = Manifest.read(store.directory(workdir) / str(step)).metrics
        self._manager = self._open()

    def save(self, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts to save a state; training may go on, and donate it.

        Args:
          state: one copy (see DataParallel.single).
          metrics: of the state's evaluation, if there was one.

        Raises:
          SaveError: if there is no room for it, or the one before could not be written.
        """
        self.wait()
        step = int(state.step)
        if not self._has_room(step, _items(state)):
            return
        alone = jax.process_count() == 1
        if alone:
            packed, checksums = snapshot(state)
        else:
            packed = _items(state)
            checksums = leaves.checksums(packed, state.loops)
        # By the time of the manifest the arrays may be gone.
        outlines = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed)

        def manifest() -> Manifest:
            shapes = _unpacked_shapes(outlines, state.loops)
            sums = repeat.unpack(jax.device_get(checksums), state.loops)
            described = {p: leaves.shape_and_dtype(x) for p, x in leaves.by_path(shapes).items()}
            return Manifest(leaves.describe(described, sums), metrics or {}, self._facts)

        def begin() -> None:
            # On the host, where a slice costs nothing: the stacks have hundreds.
            items = repeat.unpack(_on_host(packed), state.loops) if state.loops else packed
            args = ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            )
            if not self._manager.save(step, args=args, metrics=metrics):
                raise SaveError(f"there is a later one, of step {self._manager.latest_step()}.")

        def finish() -> None:
            if alone:
                # Before orbax's own threads take over, it reads all arrays and makes directories.
                begin()
            self._manager.wait_until_finished()
            self._finish(step, metrics or {})

        self._saving = step, manifest
        with self._told():
            if not alone:
                # It agrees with the other processes, in an order with what else they agree about.
                begin()
            self._begun = self._thread.submit(finish)

    def restore_latest(
        self, state: TrainState, sharding: jax.sharding.Sharding
    ) -> TrainState | None:
        """The latest state, or None if there is none.

        Args:
          state: of the same shapes as the saved one; its values do not matter.
          sharding: of the restored arrays.

        Raises:
          CheckpointError: if its arrays are others, not those that were saved, or not finite.
        """
        step = max(self._metrics, default=None)
        if step is None:
            return None
        path = store.directory(self._workdir) / str(step)
        manifest = Manifest.read(path)
        wanted = _items(state)
        if "optimizer/skipped" not in manifest.leaves:
            # Saved before skipped updates were counted over the whole run.
            del wanted["optimizer"]["skipped"]
            state = state.replace(skipped=0 * state.skipped)
        shapes = _unpacked_shapes(wanted, state.loops)
        leaves.require_same(manifest.leaves, shapes, f"the checkpoint of step {step}")
        targets = {name: abstract(tree, sharding) for name, tree in shapes.items()}
        args = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path, args=args)
        items = {name: repeat.pack(restored[name], state.loops) for name in targets}
        sums = repeat.unpack(jax.device_get(leaves.checksums(items, state.loops)), state.loops)
        leaves.require_checksums(manifest.leaves, sums, f"the checkpoint of step {step}")
        state = state.replace(**items["variables"], **items["optimizer"], ema=items.get("ema"))
        if (array := spoilt(state)) is not None:
            raise store.CheckpointError(
                f"the checkpoint of step {step} is not finite: {array} has an infinite number or "
                f"NaN. Move {store.directory(self._workdir) / str(step)} away, to go on from the "
                "one before."
            )
        return state

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the best finite evaluation of those kept, and its top-1; None without."""
        step = store.best(self._metrics)
        return None if step is None else (step, self._metrics[step][store.BEST_METRIC])

    def wait(self) -> None:
        """Returns when what was to be saved is on disk.

        Raises:
          SaveError: if it could not be written.
        """
        with self._told():
            begun, self._begun = self._begun, None
            if begun is not None:
                begun.result()
        self._saving = None

    def close(self) -> None:
        """Waits and ends the background threads.

        Raises:
          SaveError: if the last state could not be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            store.directory(self._workdir),
            options=ocp.CheckpointManagerOptions(
                # It has them written; which of them are there, and stay, is the store's affair.
                best_fn=store.quality,
                step_prefix=store.UNFINISHED,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
            ),
        )

    def _complete(self) -> None:
        """Writes the manifest, when orbax has written all files, and brings all to the disk."""
        if jax.process_index() == 0 and self._saving is not None:
            step, manifest = self._saving
            path = store.unfinished(self._workdir, step)
            path = path.with_name(path.name + store.ORBAX_UNFINISHED)
            manifest().write(path)
            disk.sync_tree(path)

    def _finish(self, step: int, metrics: dict[str, float]) -> None:
        """Gives a checkpoint its name; when it is on the disk, deletes those it makes needless."""
        is_first = jax.process_index() == 0
        if is_first:
            store.finish(self._workdir, step)
        self._metrics[step] = metrics
        for old in sorted(self._metrics.keys() - store.kept(self._metrics, self._keep)):
            del self._metrics[old]
            if is_first:
                try:
                    store.delete(self._workdir, old)
                except OSError as error:  # the state is saved all the same
                    self._report(
                        f"the checkpoint of step {old} cannot be deleted: {error.strerror}."
                    )

    def _has_room(self, step: int, items: Any) -> bool:
        wanted = sum(leaves.num_bytes(array) for array in jax.tree.leaves(items))
        free = shutil.disk_usage(store.directory(self._workdir)).free
        # All processes do the same, though one may see less of the disk than another.
        has_room = distributed.agreed(free >= wanted)
        if not has_room:
            self._failed(
                f"the state of step {step} was not saved: it takes {wanted / 2**20:,.1f} MiB, and "
                f"{free / 2**20:,.1f} MiB are free in {self._workdir}."
            )
        return has_room

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Where the save that is under way fails, tells of it, and makes room for the next one."""
        try:
            yield
        # Orbax and tensorstore pass on whatever the file system has against it.
        except Exception as error:
            if self._saving is None:
                raise
            step, self._saving = self._saving[0], None
            # A new one: this one counts the step as saved. What is left of it goes.
            if jax.process_index() == 0:
                store.sweep(self._workdir)
            self._manager = self._open()
            self._failed(f"the state of step {step} could not be saved: {_said(error)}.")

    def _failed(self, text: str) -> None:
        if self._unsaved is None:
            raise SaveError(f"{text} The states before it are there; the same command goes on.")
        self._unsaved(f"{text} The run goes on.")


def spoilt(state: TrainState) -> str | None:
    """The path of the first parameter, statistic or average that is not finite; None if all are.

    Args:
      state: one copy (see DataParallel.single).
    """
    items = {name: tree for name, tree in _items(state).items() if name != "optimizer"}
    return leaves.not_finite(items, state.loops)


def snapshot(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a save has the devices do: a copy of what is saved, beside it, and its checksums."""
    return _snapshot(_items(state), state.loops)


@functools.partial(jax.jit, static_argnums=1)
def _snapshot(items: dict[str, Any], loops: repeat.Loops) -> tuple[dict[str, Any], dict[str, Any]]:
    return jax.tree.map(jnp.copy, items), leaves.checksums(items, loops)


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes of a tree's arrays, to be restored with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {
            "opt_state": state.opt_state,
            "step": state.step,
            "key": state.key,
            "skipped": state.skipped,
        },
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _on_host(items: dict[str, Any]) -> dict[str, Any]:
    """But the random key: off its devices it would be this process's alone."""

    def on_host(x: jax.Array) -> Any:
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.device_get(x)

    return jax.tree.map(on_host, items)


def _unpacked_shapes(items: dict[str, Any], loops: repeat.Loops) -> dict[str, Any]:
    return jax.eval_shape(functools.partial(repeat.unpack, loops=loops), items)


def _said(error: Exception) -> str:
    """The first line of an error, which tensorstore follows with its own."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
