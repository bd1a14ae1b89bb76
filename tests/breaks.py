"""Breaks the package in one line at a time, and shows which test notices it.

python tests/breaks.py [--tests DIR] [--long] [--unbroken] [NUMBER ...]

Each break is made in a copy of the checkout, where its tests are then to fail. Exit code 1: those
of a break passed, or none of them ran. Without numbers all breaks are made.
"""

import argparse
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 600  # after which tests are ended

# Exit codes of tests that have noticed something, beside those of processes that a signal ended.
NOTICED = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
TIMED_OUT = 124  # as of `timeout`


class Break(NamedTuple):
    """A mistake.

    Attributes:
      file: in which it is made.
      old: what stands there, once in the file.
      new: what takes its place.
      tests: that notice it: arguments of pytest, after variables of the environment.
    """

    file: str
    old: str
    new: str
    tests: str


BREAKS = (
    # --- resflax/ops -----------------------------------------------------------------------------
    # NaN becomes zero in the kernels.
    Break(
        "resflax/ops/kernels/norm.cc",
        "sum = sum < 0.0f ? Vector{} : sum",
        "sum = sum > 0.0f ? sum : Vector{}",
        "tests/test_nan.py -k 'resnet and kernels'",
    ),
    # The last of equal maxima has the gradient.
    Break(
        "resflax/ops/kernels/pool.cc",
        "(pixel > best) | (pixel != pixel)",
        "(pixel >= best) | (pixel != pixel)",
        "tests/test_pool.py -k 'ties or equal'",
    ),
    # The gradient's kernel is not turned around.
    Break(
        "resflax/ops/kernels/winograd.cc",
        "turned + (kTaps - 1 - tap) * s.in",
        "turned + tap * s.in",
        "tests/test_native.py -k winograd",
    ),
    # The compiler may take it that no number is NaN.
    Break("resflax/ops/library.py", '"-O3"', '"-Ofast"', "tests/test_pool.py tests/test_nan.py"),
    # No kernels on one device.
    Break(
        "resflax/ops/native.py",
        "jax.device_count() == 1",
        "jax.device_count() > 1",
        "tests/test_native.py -k choice",
    ),
    # XLA loses NaN where it fuses a maximum with a sum.
    Break(
        "resflax/ops/activation.py",
        "jnp.where(x < 0, jnp.zeros_like(x), x)",
        "jnp.maximum(x, 0)",
        "tests/test_nan.py -k summed",
    ),
    # Images of bfloat16 are not left to XLA.
    Break(
        "resflax/ops/norm.py",
        "return x.dtype == jnp.float32 and x.shape[-1] % 16 == 0",
        "return x.shape[-1] % 16 == 0",
        "tests/test_norm.py tests/test_vgg.py tests/test_bench.py -k bfloat16",
    ),
    # The gradient of what is the same on all devices is not summed over them.
    Break(
        "resflax/ops/norm.py",
        "_affine(*varying.alike(y.x, y.scale, y.shift, y.residual), rectify)",
        "_affine(y.x, y.scale, y.shift, y.residual, rectify)",
        "RESFLAX_TEST_DEVICES=8 tests/test_norm.py -k eight_devices",
    ),
    # --- resflax/models --------------------------------------------------------------------------
    # The variance is that of a device.
    Break(
        "resflax/models/layers.py",
        "mean, square = lax.pmean((mean, square), axis_name)",
        "mean = lax.pmean(mean, axis_name)",
        "RESFLAX_TEST_DEVICES=8 tests/test_norm.py -k eight_devices",
    ),
    # Groups that do not divide the channels.
    Break(
        "resflax/models/layers.py",
        "math.gcd(32, x.shape[-1])",
        "min(32, x.shape[-1])",
        "tests/test_norm.py -k group_norm",
    ),
    # XLA loses NaN in the maximum of a squeeze.
    Break(
        "resflax/models/gates.py",
        '"max": pool.global_max_pool',
        '"max": lambda x: jnp.max(x, axis=(1, 2)).astype(jnp.float32)',
        "tests/test_nan.py -k global",
    ),
    # Stochastic depth per sample shrinks the branch.
    Break("resflax/models/residual.py", "y * kept / keep", "y * kept", "tests/test_skip.py"),
    # The tenth block of a loop comes before the second.
    Break(
        "resflax/models/repeat.py",
        "packed.pop(name) for name in names",
        "packed.pop(name) for name in sorted(names)",
        "tests/test_repeat.py",
    ),
    # A loop begins with one block too many.
    Break(
        "resflax/models/resnet.py",
        "1 < len(numbers) >= self.scan > 0",
        "1 < len(numbers) > self.scan > 0",
        "tests/test_repeat.py",
    ),
    # Compression rounds to the nearest number.
    Break(
        "resflax/models/densenet.py",
        "int(self.compression * x.shape[-1])",
        "round(self.compression * x.shape[-1])",
        "tests/test_densenet.py",
    ),
    # The multiply-adds of groups are those of a dense convolution.
    Break(
        "resflax/models/count.py",
        "math.prod(kernel.shape[:-1]), out.size",
        'math.prod(kernel.shape[:-1]) * getattr(module, "groups", 1), out.size',
        "tests/test_count.py tests/test_zoo.py",
    ),
    # --- resflax ---------------------------------------------------------------------------------
    # Convolutions stay with YNNPACK.
    Break(
        "resflax/process/runtime.py",
        "{_CONVOLUTION_FLAG}=-{",
        "{_CONVOLUTION_FLAG}={",
        "tests/test_runtime.py -k flag",
    ),
    # A gradient that is not finite spoils the parameters.
    Break(
        "resflax/steps.py",
        "jnp.isfinite(mean) & jnp.isfinite(grad_norm)",
        "jnp.isfinite(mean)",
        "tests/test_steps.py tests/test_failure.py",
    ),
    # A constant is right.
    Break(
        "resflax/metrics.py",
        "jnp.sum(logits >= true, axis=-1) - 1",
        "jnp.sum(logits > true, axis=-1)",
        "tests/test_metrics.py",
    ),
    # Steps fall later by the length of the warm-up.
    Break(
        "resflax/optimizers.py",
        "round(e * steps_per_epoch) - warmup:",
        "round(e * steps_per_epoch):",
        "tests/test_optimizers.py",
    ),
    # A run that goes on forgets its best evaluation.
    Break(
        "resflax/train.py",
        "best = checkpointer.best or (0, 0.0)",
        "best = (0, 0.0)",
        "tests/test_train.py",
    ),
    # The key of the next step is recorded.
    Break(
        "resflax/run/failure.py",
        "jnp.asarray(key_data)), error.step - 1)",
        "jnp.asarray(key_data)), error.step)",
        "tests/test_failure.py",
    ),
    # Frozen parameters have a gradient.
    Break(
        "resflax/transfer.py",
        "leaf if train else lax.stop_gradient(leaf)",
        "leaf",
        "tests/test_transfer.py",
    ),
    # --- resflax/data ----------------------------------------------------------------------------
    # The last place of a crop is never drawn.
    Break(
        "resflax/data/transforms.py",
        "(2,), 0, 2 * padding + 1)",
        "(2,), 0, 2 * padding)",
        "tests/test_data.py tests/test_augmentation.py",
    ),
    # The last example counts twice where a batch is filled up.
    Break(
        "resflax/data/examples.py",
        "(indices < len(self)).astype",
        "(indices <= len(self)).astype",
        "tests/test_data.py",
    ),
    # Every epoch has the same order.
    Break(
        "resflax/data/pipeline.py",
        "default_rng((seed, epoch))",
        "default_rng(seed)",
        "tests/test_data.py",
    ),
    # Photographs that are stored on their side are mirrored.
    Break(
        "resflax/data/decoding.py",
        "6: _Orientation(swapped=True, mirrored_y=True)",
        "6: _Orientation(swapped=True, mirrored_x=True)",
        "tests/test_decoding.py",
    ),
    # --- resflax/checkpoint ----------------------------------------------------------------------
    # An error of the thread that saves is swallowed.
    Break(
        "resflax/checkpoint/saver.py",
        "begun.result()",
        "begun.exception()",
        "tests/test_checkpoint.py",
    ),
    # The oldest checkpoint is gone on from.
    Break(
        "resflax/checkpoint/store.py",
        "for step in reversed(steps(workdir)):",
        "for step in steps(workdir):",
        "tests/test_checkpoint.py",
    ),
    # --- resflax/analysis ------------------------------------------------------------------------
    # The norms are of the filters' rows.
    Break(
        "resflax/analysis/landscape.py",
        "tuple(range(kernel.ndim - 1))",
        "tuple(range(1, kernel.ndim))",
        "tests/test_analysis_landscape.py",
    ),
    # Batches of all sizes weigh the same.
    Break(
        "resflax/analysis/channels.py",
        "np.average(share, axis=0, weights=sizes)",
        "np.average(share, axis=0)",
        "tests/test_analysis_units.py",
    ),
    # The shift of a deleted branch is left.
    Break(
        "resflax/analysis/lesions.py",
        "y._replace(scale=y.scale * keep, shift=y.shift * keep)",
        "y._replace(scale=y.scale * keep)",
        "tests/test_analysis_lesion.py",
    ),
    # --- resflax/interop -------------------------------------------------------------------------
    # Kernels are read with their height and width exchanged.
    Break(
        "resflax/interop/weights.py",
        "lambda x: x.transpose(2, 3, 1, 0)",
        "lambda x: x.transpose(3, 2, 1, 0)",
        "tests/test_torch.py -k logits",
    ),
    # The stem's pool of Keras is that of PyTorch.
    Break(
        "resflax/interop/keras.py",
        '"stem_pool": "zeros"',
        '"stem_pool": "symmetric"',
        "tests/test_keras.py",
    ),
    # --- resflax/report --------------------------------------------------------------------------
    # The time of earlier starts is forgotten.
    Break(
        "resflax/report/runs.py",
        "return sum(ends) + max(",
        "return max(",
        "tests/test_report.py tests/test_runs.py",
    ),
    # The deviation is that of all seeds there are.
    Break(
        "resflax/report/learning.py",
        "np.std(by_epoch[epoch], ddof=1)",
        "np.std(by_epoch[epoch])",
        "tests/test_report.py",
    ),
    # --- resflax/bench ---------------------------------------------------------------------------
    # Above 1 the peer is faster.
    Break("resflax/bench/rounds.py", "[t / o for", "[o / t for", "tests/test_bench.py -k ratio"),
    # Of the pixels that a stride leaves out only some are not read.
    Break(
        "resflax/bench/roofline.py",
        "return module.stride**2",
        "return module.stride",
        "tests/test_bench.py -k roofline",
    ),
    # --- launch ----------------------------------------------------------------------------------
    # The restarts of a run are shared by its nodes.
    Break(
        "launch/kubernetes.py",
        "options.restarts * num_nodes if",
        "options.restarts if",
        "tests/test_kubernetes.py",
    ),
    # Two sweeps are at work in one directory.
    Break("launch/lock.py", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |", "tests/test_lock.py"),
    # --- what loses runs, or shows a wrong number ------------------------------------------------
    # A power cut leaves a checkpoint's name without its bytes.
    Break(
        "resflax/checkpoint/saver.py",
        "            disk.sync_tree(path)\n",
        "            pass\n",
        "tests/test_power.py",
    ),
    # A deletion that is cut short leaves half a checkpoint.
    Break(
        "resflax/checkpoint/store.py",
        "    (directory(workdir) / str(step)).rename(path)\n",
        "    path = directory(workdir) / str(step)\n",
        "tests/test_checkpoint.py tests/test_power.py",
    ),
    # A checkpoint that was cut short in its deletion stays for ever.
    Break(
        "resflax/checkpoint/store.py",
        "                _remove(path)\n\n\ndef _remove",
        "                pass\n\n\ndef _remove",
        "tests/test_checkpoint.py",
    ),
    # A write that fails leaves its temporary file.
    Break(
        "resflax/disk.py",
        "            temporary.unlink()",
        "            pass",
        "tests/test_disk.py",
    ),
    # A full disk leaves half a record.
    Break(
        "resflax/run/writers.py",
        "                self._file.truncate(end)",
        "                pass",
        "tests/test_writers.py",
    ),
    # A dead owner holds the lock.
    Break(
        "resflax/run/lock.py",
        "            return not owner.lives",
        "            return False",
        "tests/test_run_lock.py",
    ),
    # An owner that was replaced writes on.
    Break(
        "resflax/run/lock.py",
        "        if self._is_lost:",
        "        if False:",
        "tests/test_run_lock.py",
    ),
    # A process that has a dead owner's number holds its lock.
    Break(
        "resflax/run/lock.py",
        'return _started(self.pid) in ("", self.process)',
        "return True",
        "tests/test_run_lock.py",
    ),
    # A step under another number is gone on from.
    Break(
        "resflax/checkpoint/origin.py",
        "    if manifest.step not in (None, step):",
        "    if False:",
        "tests/test_origin.py",
    ),
    # A config that was edited by hand is evaluated.
    Break(
        "resflax/checkpoint/origin.py",
        '    if "config" in facts and "config" in run:',
        "    if False:",
        "tests/test_origin.py",
    ),
    # Skipped updates count from each start.
    Break(
        "resflax/checkpoint/saver.py",
        '            "skipped": state.skipped,',
        '            "skipped": 0 * state.skipped,',
        "tests/test_checkpoint.py",
    ),
    # A state whose parameters overflowed is saved.
    Break(
        "resflax/run/progress.py",
        "        if not_finite is not None:",
        "        if False:",
        "tests/test_failure.py",
    ),
    # An image with a logit of NaN has a finite loss.
    Break(
        "resflax/metrics.py",
        "jnp.where(finite, cross_entropy(logits, labels), jnp.nan)",
        "cross_entropy(logits, labels)",
        "tests/test_metrics.py",
    ),
    # An evaluation that is not finite is the best.
    Break(
        "resflax/checkpoint/store.py",
        "    return metrics[BEST_METRIC] if finite else -1.0",
        "    return metrics[BEST_METRIC]",
        "tests/test_checkpoint.py tests/test_failure.py",
    ),
    # A number that float32 cannot hold is taken.
    Break(
        "resflax/validation.py",
        "not abs(part) <= _LARGEST",
        "not abs(part) <= math.inf",
        "tests/test_validation.py",
    ),
    # A config may have fields of its own.
    Break(
        "resflax/process/command.py",
        "        config_lib.require_whole(config)",
        "        pass",
        "tests/test_command.py tests/test_config.py",
    ),
    # Pixels from 0 to 1 are taken for those from 0 to 255.
    Break(
        "resflax/data/preprocessing.py",
        '(array.dtype.kind == "f" and high <= 1)',
        "False",
        "tests/test_preprocessing.py",
    ),
    # Classes in another order are evaluated.
    Break(
        "resflax/data/sources.py",
        "    if difference := other_names(found.label_names, trained.label_names):",
        "    if difference := None:",
        "tests/test_evaluate.py",
    ),
    # A channel that never varies is divided by zero.
    Break(
        "resflax/data/sources.py",
        "np.where(variance > _NO_VARIANCE, variance, 1.0)",
        "variance",
        "tests/test_sources.py",
    ),
    # Hidden files are images.
    Break(
        "resflax/data/folder.py",
        '    return name.startswith(".") or name in _SYSTEM',
        "    return False",
        "tests/test_folder.py",
    ),
    # An archive may unpack to any size.
    Break(
        "resflax/data/idx.py",
        "archive.read(size + 1)",
        "archive.read()",
        "tests/test_arrays.py tests/test_prepare.py",
    ),
    # A damaged library is loaded.
    Break(
        "resflax/ops/library.py",
        '        if _is_own(file) and file.stem.endswith(f"-{_digest(file.read_bytes())}"):',
        "        if _is_own(file):",
        "tests/test_library.py",
    ),
    # Another user's library is loaded.
    Break(
        "resflax/ops/library.py",
        "    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022",
        "    return True",
        "tests/test_library.py",
    ),
    # The second signal waits for a save.
    Break(
        "resflax/run/interruption.py",
        "            _stop_at_once(128 + number)",
        "            raise KeyboardInterrupt",
        "tests/test_interruption.py",
    ),
    # The summary of runs is code in a page.
    Break(
        "resflax/report/table.py",
        "html.escape(summary(study))",
        "summary(study)",
        "tests/test_report.py",
    ),
    # Other processes do not learn that one has failed.
    Break(
        "resflax/process/distributed.py",
        "        tell(type(error), error)\n        # The",
        "        # The",
        "tests/test_distributed.py -k one_fails",
    ),
    # --- what a researcher brings ----------------------------------------------------------
    # The deviation forgets the number that left the window.
    Break(
        "resflax/run/progress.py",
        "(value - self.mean + old - mean)",
        "(value - self.mean)",
        "tests/test_progress.py",
    ),
    # A resumed run begins with the first batches.
    Break(
        "resflax/data/pipeline.py",
        "self._batches[self.step :]",
        "self._batches[0:]",
        "tests/test_data.py",
    ),
    # A file of a later orbax is damage.
    Break(
        "resflax/checkpoint/manifest.py",
        'sorted(name for name in found if name.partition("/")[0] in items)',
        "sorted(found - {FILE})",
        "tests/test_manifest.py",
    ),
    # A Ctrl-C in a callback is forgotten.
    Break(
        "resflax/process/entry.py",
        "    if issubclass(unraisable.exc_type, KeyboardInterrupt):\n        _end()\n",
        "",
        "tests/test_entry.py",
    ),
    # An accuracy of a result may be any number.
    Break(
        "resflax/run/workdir.py",
        "if numbers[name] < 0 or numbers[name] > 1:",
        "if False:",
        "tests/test_workdir.py",
    ),
    # SAM descends before it takes the gradient.
    Break(
        "resflax/steps.py",
        "lambda p, g: p + scale * g",
        "lambda p, g: p - scale * g",
        "tests/test_steps.py",
    ),
    # Focal loss weighs what is classified well.
    Break(
        "resflax/losses.py",
        "others**gamma * log_p",
        "(1 - others) ** gamma * log_p",
        "tests/test_losses.py",
    ),
    # The teacher learns.
    Break(
        "resflax/losses.py",
        "lax.stop_gradient(self.apply(self.variables, images))",
        "self.apply(self.variables, images)",
        "tests/test_losses.py",
    ),
    # A field of another loss is ignored.
    Break(
        "resflax/validation.py",
        '            _unset(config, f"{group}.{name}.{field}", chosen)',
        "            pass",
        "tests/test_config.py tests/test_losses.py tests/test_optimizers.py",
    ),
    # Images to validate on are trained on.
    Break(
        "resflax/data/shares.py",
        "rows = np.setdiff1d(rows, chosen)",
        "rows = rows",
        "tests/test_shares.py",
    ),
    # Wrong labels are right ones.
    Break(
        "resflax/data/shares.py",
        "rng.integers(1, num_classes, len(wrong))",
        "rng.integers(0, num_classes, len(wrong))",
        "tests/test_shares.py",
    ),
    # A part of the user's own may have any shape.
    Break(
        "resflax/models/constructors.py",
        "    if out.ndim != 4 if shape is None else out.shape != shape:",
        "    if False:",
        "tests/test_constructors.py",
    ),
    # A run with a network of the user's own is restored as the config's.
    Break(
        "resflax/checkpoint/restored.py",
        '        workdir_lib.require_part(workdir, "model", "network")',
        "        pass",
        "tests/test_parts.py",
    ),
    # The network of the config is trained in the place of the user's.
    Break(
        "resflax/parts.py",
        "        if self.model is None:\n            return config_lib.build_model",
        "        if True:\n            return config_lib.build_model",
        "tests/test_parts.py",
    ),
)


def main() -> int:
    """Makes the breaks of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", type=pathlib.Path, default=ROOT, help="of which checkout")
    parser.add_argument("--long", action="store_true", help="the long tests too")
    parser.add_argument("--unbroken", action="store_true", help="break nothing: all must pass")
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="default: all")
    options = parser.parse_args()
    wrong = 0
    for number in options.numbers or range(1, len(BREAKS) + 1):
        one = BREAKS[number - 1]
        start = time.monotonic()
        line, code, said = run(one, options.tests, long=options.long, unbroken=options.unbroken)
        seconds = time.monotonic() - start
        if options.unbroken:
            wrong += code != 0
            print(f"{number:2} {one.tests}: {said}, {seconds:.0f} s", flush=True)
            continue
        is_caught = code in NOTICED or code < 0
        wrong += not is_caught
        verdict = f"caught by {said}" if is_caught else f"NOT CAUGHT ({said})"
        change = f"{one.old} -> {one.new}"
        print(f"{number:2} {one.file}:{line}: {change}: {verdict}, {seconds:.0f} s", flush=True)
    return int(wrong > 0)


def run(
    one: Break, tests: pathlib.Path = ROOT, *, long: bool = False, unbroken: bool = False
) -> tuple[int, int, str]:
    """Runs the tests of a break in a copy of the checkout.

    Args:
      one: the break.
      tests: the checkout whose tests are run.
      long: whether the long tests are run too.
      unbroken: whether to leave the break out.

    Returns:
      The line of the break, pytest's exit code, and the test that failed, or its last line.
    """
    with tempfile.TemporaryDirectory(prefix="break-") as name:
        folder = pathlib.Path(name)
        _copy(ROOT, folder)
        if tests != ROOT:
            shutil.rmtree(folder / "tests")
            _copy(tests, folder, "tests", "pyproject.toml")
        # What was compiled is used again, and what is compiled here is kept.
        cache = ROOT / ".pytest_cache" / "resflax"
        cache.mkdir(parents=True, exist_ok=True)
        (folder / ".pytest_cache").mkdir()
        (folder / ".pytest_cache" / "resflax").symlink_to(cache.resolve())
        path = folder / one.file
        text = path.read_text()
        if text.count(one.old) != 1:
            sys.exit(f"error: {one.file} has {one.old!r} {text.count(one.old)} times, not once.")
        if not unbroken:
            path.write_text(text.replace(one.old, one.new))
        line = text.count("\n", 0, text.index(one.old)) + 1
        chosen = ["-m", "not slow and not gpu"] if long else []
        return line, *_pytest(one.tests, chosen, folder)


def _copy(source: pathlib.Path, target: pathlib.Path, *paths: str) -> None:
    """Copies the files of a checkout that git does not ignore, or those under some paths."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (source / name).is_file():  # and was not deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def _pytest(arguments: str, chosen: list[str], folder: pathlib.Path) -> tuple[int, str]:
    """Runs tests in a folder up to the first failure: the exit code, and what is said of them."""
    words = shlex.split(arguments)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = chosen + [word for word in words if word.partition("=")[0] not in variables]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    defaults = {"RESFLAX_TEST_DEVICES": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-n0", "-x", "--tb=no", "-p", "no:cacheprovider", *words],
        cwd=folder,
        env={**os.environ, **defaults, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return TIMED_OUT, f"the tests go on after {SECONDS} s"
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    return process.returncode, failed[1] if failed else output.strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
