"""PyTorch's arrays by name: from a file or a mapping, out of what training has put around them."""

import argparse
import os
import pathlib
import pickle
import shlex
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from resflax.errors import UserError

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # the last: model.pth.tar

# Entries of a checkpoint that hold a network's arrays. The first that is there is taken, as by
# timm: an average of the weights before the weights.
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")

# What torch.nn.parallel and torch.compile put before all names.
_MODULES = ("module", "_orig_mod")

# A count of torch.optim.swa_utils.AveragedModel beside the arrays.
_AVERAGED = "n_averaged"


def arrays(
    source: str | os.PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False
) -> dict[str, np.ndarray]:
    """The arrays of a network by their names; torch's floating types as float32.

    What training puts around them is taken off: a dictionary 'state_dict', 'model',
    'state_dict_ema' or 'model_ema', and these words, 'module' and '_orig_mod' before all names.
    Where several of those are there, an average is taken first, and a warning says so.

    Args:
      source: a .safetensors file; a .pth, .pt, .bin, .ckpt or .tar file, if `allow_pickle`; or
        arrays of PyTorch or NumPy by name.
      allow_pickle: see `resflax.interop.torch.from_torch`.

    Raises:
      UserError: if the file cannot be read, is a pickle that is not allowed, or holds other things.
    """
    if not isinstance(source, Mapping):
        path = pathlib.Path(source)
        if path.suffix == ".safetensors":
            source = _safetensors(path)
        elif path.suffix in _PICKLES:
            source = _pickle(path, allow_pickle)
        else:
            raise UserError(f"{path} must be a file .safetensors, {', '.join(_PICKLES)}.")
    return {key: _array(key, value) for key, value in _unwrapped(source).items()}


def _unwrapped(source: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = {name: source[name] for name in _ENTRIES if isinstance(source.get(name), Mapping)}
    inner = inner or _by_first_word(source)
    if not inner:
        return source
    taken, *others = inner
    if others:
        warnings.warn(
            f"the weights are there as {taken!r} and as {', '.join(map(repr, others))}: {taken!r} "
            "is read.",
            stacklevel=2,
        )
    return _unwrapped(inner[taken])


def _by_first_word(source: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays by what stands before their names, where that is a known word before all."""
    known = (*_ENTRIES, *_MODULES)
    inner: dict[str, dict[str, Any]] = {}
    for key, value in source.items():
        if key != _AVERAGED:
            word, _, name = str(key).partition(".")
            inner.setdefault(word, {})[name] = value
    if not inner.keys() <= {*known}:
        return {}
    return {word: inner[word] for word in known if word in inner}


def _array(key: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # torch's; torch itself need not be imported to tell
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not hasattr(value, "shape"):
        raise UserError(
            f"{key!r} is a {type(value).__name__}, not an array: pass the mapping of arrays by "
            f"name. Training's own is found under {', '.join(map(repr, _ENTRIES))}."
        )
    return np.asarray(value)


def _safetensors(path: pathlib.Path) -> Mapping[str, Any]:
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no whole .safetensors file: {error}") from error


def _pickle(path: pathlib.Path, allow_pickle: bool) -> Mapping[str, Any]:
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can run code when it is read. This converts it, by torch "
            f"2.6 or later, which reads weights alone: {_conversion(path)} (or pass "
            "allow_pickle=True to resflax.from_torch, which reads it so)."
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is read by torch: pip install 'resflax[torch]'.") from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise UserError(
            f"torch {torch.__version__} does not read pickles safely (CVE-2025-32434): install 2.6 "
            "or later, or convert the file to .safetensors."
        )
    try:
        # The command line that training had: a bag of values, which timm and torchvision save.
        with torch.serialization.safe_globals([argparse.Namespace]):
            source = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no whole file of weights alone: {reason}") from error
    if not isinstance(source, Mapping):
        raise UserError(f"{path} holds a {type(source).__name__}, not a mapping of arrays by name.")
    return source


def _conversion(path: pathlib.Path) -> str:
    """The command that makes a .safetensors file of a pickle."""
    code = (
        "from safetensors.numpy import save_file; from resflax.interop.state_dict import arrays; "
        f"save_file(arrays({str(path)!r}, allow_pickle=True), "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
    return shlex.join(["python", "-c", code])
