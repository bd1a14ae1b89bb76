"""The peers of a network: timm's, torchvision's, PyTorch's twin of it, and stock Flax."""

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import parity
from resflax.bench import ours, stock
from resflax.bench.case import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Case
from resflax.bench.rounds import Costs, Entry
from resflax.errors import UserError
from resflax.interop import peers as libraries
from resflax.interop.torch import to_torch
from resflax.models import count

# What must be installed for each.
PACKAGES: dict[str, Sequence[str]] = {
    "timm": ("torch", "timm"),
    "torch": ("torch",),
    "flax": ("flax",),
}

# Prefixes of timm's names, and the layout of the weights that such networks have.
_TIMM_LAYOUTS = {"legacy_": "timm_legacy", "resnetv2_": "timm_v2", "": "timm"}


def check(peer: str) -> None:
    """Raises UserError where a peer cannot run here."""
    for package in PACKAGES[peer]:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--peer {peer} needs {package}, which is not installed: "
                'pip install "resflax[peers]".'
            )
    if "torch" not in PACKAGES[peer]:
        return
    if jax.default_backend() not in ("cpu", "gpu"):
        raise UserError(f"--peer {peer} does not run on the {jax.default_backend()} of JAX.")
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UserError(f"--peer {peer}: torch {torch.__version__} sees no GPU.")


def entries(case: Case, peer: str, *, compiled: bool) -> list[Entry]:
    """The ways in which a peer computes a case.

    Args:
      case: what is measured.
      peer: of PACKAGES.
      compiled: whether torch.compile is one of them.

    Raises:
      UserError: if the peer has not this network.
    """
    if peer == "flax":
        plain = Case(case.name, case.plain, case.size, case.batch, case.mode)
        build = functools.partial(ours.Contender, plain, stock.apply_fn(plain.model))
        return [Entry("flax", "", build)]
    make = _timm(case) if peer == "timm" else _torch(case)
    forms = {"channels_last": (True, False), "contiguous": (False, False)}
    if compiled:
        forms["torch.compile"] = (True, True)
    return [
        Entry(peer, form, functools.partial(TorchContender, case, make, last, optimised))
        for form, (last, optimised) in forms.items()
    ]


class TorchContender:
    """A network of torch and its training step or logits: see rounds.Contender.

    Args:
      case: what is measured.
      make: makes the network.
      channels_last: whether images and kernels lie as ours do in memory.
      compiled: whether torch.compile optimises the network.
    """

    def __init__(
        self, case: Case, make: Callable[[], Any], channels_last: bool, compiled: bool
    ) -> None:
        import torch

        _use_whole_machine()
        self._trains = case.trains
        self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = _without_zeros(make())
        network = network.to(self._device, memory_format=layout).train(case.trains)
        images, labels = case.examples()
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        self._images = batch.to(self._device).contiguous(memory_format=layout)
        self._labels = torch.from_numpy(labels).long().to(self._device)
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            LEARNING_RATE,
            MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            fused=self._device == "cuda",
        )
        self._autocast = functools.partial(
            torch.autocast, self._device, torch.bfloat16, enabled=case.dtype.name == "bfloat16"
        )
        self._network = torch.compile(network) if compiled else network
        self._compile_seconds = None
        if compiled:
            start = time.perf_counter()
            self.run(1)
            self._compile_seconds = time.perf_counter() - start

    def run(self, steps: int) -> None:
        """Runs the step; training goes on from the parameters that it left."""
        import torch

        for _ in range(steps):
            if self._trains:
                self._train()
            else:
                with torch.inference_mode(), self._autocast():
                    self._network(self._images)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def costs(self) -> Costs:
        """The compiler's time includes that of a first step."""
        import torch

        memory = {}
        if self._device == "cuda":
            memory[ours.PEAK] = torch.cuda.max_memory_allocated()
        return Costs(None, self._compile_seconds, memory)

    def _train(self) -> None:
        from torch.nn import functional

        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._network(self._images)
            # With auxiliary classifiers, the first are the network's.
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss = functional.cross_entropy(logits, self._labels)
        loss.backward()
        self._optimizer.step()


def _without_zeros(network: Any) -> Any:
    """Sets norms' scales to 1, as ours are.

    timm's last ones of a branch are 0, so that at first no gradient flows through most layers:
    processors are faster on zeros.
    """
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return network


def _use_whole_machine() -> None:
    import torch

    torch.set_num_threads(cores())
    torch.backends.cudnn.benchmark = True


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _timm(case: Case) -> Callable[[], Any]:
    return _counterpart(case, "timm")


def _torch(case: Case) -> Callable[[], Any]:
    """A twin of CIFAR's networks; of the others torchvision's, if it has them."""
    if getattr(case.model, "stem", "") != "cifar":
        return _counterpart(case, "torchvision")
    from resflax.bench.twin import Twin

    make = functools.partial(Twin, case.plain)
    try:
        params = sum(p.numel() for p in make().parameters())
    except UserError as error:
        raise UserError(f"--peer torch has no {case.name}: {error}.") from error
    expected = count(case.model, case.image_shape).params
    if params != expected:
        raise UserError(f"the twin of {case.name} has {params} parameters, not {expected}.")
    return make


def _counterpart(case: Case, library: str) -> Callable[[], Any]:
    """The constructor of a library's network that has the logits of ours, given its weights."""
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{library}, which has the peer of {case.name}, is not installed.")
    refusals = []
    for known in parity.cases():
        if known.library == library and known.model == case.name and not known.overrides:
            make = functools.partial(
                libraries.build,
                library,
                known.peer,
                num_classes=case.model.num_classes,
                **known.arguments,
            )
            refusal = _refusal(case, known, make)
            if not refusal:
                return make
            refusals.append(refusal)
    if not refusals:
        raise UserError(f"{library} has no {case.name}; --peer torch has CIFAR's ResNets.")
    raise UserError(f"{library} computes something else than {case.name}: {refusals[0]}")


def _refusal(case: Case, known: parity.Case, make: Callable[[], Any]) -> str:
    """Why a library's network is not the counterpart; '' if it is."""
    layout = known.library
    if layout == "timm":
        layout = next(v for k, v in _TIMM_LAYOUTS.items() if known.peer.startswith(k))
    # The names and shapes of the weights decide, not their values.
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), case.variables)
    try:
        expected = to_torch(case.plain, zeros, layout)
    except UserError as error:
        return str(error)
    import torch

    with torch.device("meta"):
        found = make().state_dict()
    for name in sorted(expected.keys() | found.keys()):
        shapes = [
            tuple(state[name].shape) if name in state else None for state in (expected, found)
        ]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} here and {shapes[1]} in {known.peer}."
    return ""
