"""Contenders of JAX: a network's step, compiled, on one device."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from resflax.bench.case import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Case
from resflax.bench.rounds import Costs
from resflax.steps import train_step
from resflax.train_state import TrainState, create_train_state

# Who says how much memory is in use: the compiler of a step, or the device of all that ran on it.
ANALYSIS, PEAK = "analysis", "peak"


class Contender:
    """A compiled step on a batch: see rounds.Contender.

    Args:
      case: what is measured.
      apply_fn: instead of the network's `apply`.
    """

    def __init__(self, case: Case, apply_fn: Callable[..., Any] | None = None):
        self._bytes_before, self._peak_before = _memory_stats()
        self._trains = case.trains
        state = jax.jit(functools.partial(create_state, case, apply_fn))()
        self._batch = jax.device_put(_batch(case))
        step = step_function(case)
        start = time.perf_counter()
        lowered = step.lower(state, self._batch)
        traced = time.perf_counter()
        self._step = lowered.compile()
        self._trace_seconds = traced - start
        self._compile_seconds = time.perf_counter() - traced
        self._state: TrainState = state

    def run(self, steps: int) -> None:
        """Runs the step; training goes on from the state that it left."""
        result: Any = None
        for _ in range(steps):
            result = self._step(self._state, self._batch)
            if self._trains:
                self._state, result = result
        jax.block_until_ready(result)

    def costs(self) -> Costs:
        """The compiler's times, and the memory: see `analysed_bytes`."""
        memory = {}
        _, peak = _memory_stats()
        # The device remembers the highest peak since the process began, which may be another's.
        if peak > self._peak_before:
            memory[PEAK] = peak - self._bytes_before
        analysed = analysed_bytes(self._step)
        if analysed is not None:
            memory[ANALYSIS] = analysed
        return Costs(self._trace_seconds, self._compile_seconds, memory)


def create_state(case: Case, apply_fn: Callable[..., Any] | None = None) -> TrainState:
    """The state before the first step, with the optimizer that all contenders have."""
    optimizer = optax.identity()
    if case.trains:
        optimizer = optax.chain(
            optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM)
        )
    return create_train_state(
        case.model, optimizer, case.image_shape, apply_fn=apply_fn, seed=0, ema=False
    )


def step_function(case: Case) -> Any:
    """The jitted step from a state and a batch: to a state and metrics, or to logits."""
    if not case.trains:
        return jax.jit(_logits)
    step = functools.partial(train_step, axis_name=None, augment=lambda keys, images: images)
    return jax.jit(step, donate_argnums=0)


def abstract_arguments(case: Case) -> tuple[Any, Any]:
    """The shapes of what `step_function` takes; nothing is allocated."""
    images = jax.ShapeDtypeStruct((case.batch, *case.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    state = jax.eval_shape(functools.partial(create_state, case))
    return state, {"image": images, "label": labels}


def analysed_bytes(compiled: Any) -> int | None:
    """Arguments, results and temporary arrays of a compiled step, if the compiler says.

    What a donated argument and a result share is counted once.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    arrays = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return arrays - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes


def _logits(state: TrainState, batch: dict[str, jax.Array]) -> jax.Array:
    return state.apply_fn(state.eval_variables, batch["image"], train=False)


def _batch(case: Case) -> dict[str, Any]:
    images, labels = case.examples()
    return {"image": images, "label": labels}


def _memory_stats() -> tuple[int, int]:
    """Bytes in use on the device now and at most so far; zeros where it does not count them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use", 0)
