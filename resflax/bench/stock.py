"""Stock Flax as a peer: the same network, its layers computed by flax.linen's own."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn

from resflax.models import layers
from resflax.models.interception import intercepted
from resflax.ops import pool


def apply_fn(model: nn.Module) -> Callable[..., Any]:
    """The network's `apply` with flax.linen.Conv, flax.linen.BatchNorm and lax's max-pool.

    The variables are those of the network, under the same names.

    Args:
      model: a network without loops over blocks.
    """
    if hasattr(model, "form"):
        # One convolution where the other forms of a ResNeXt block have many.
        model = model.clone(form="c")

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with intercepted(_replace), _lax_max_pool():
            return model.apply(variables, *args, **kwargs)

    return apply


def _replace(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Calls a layer of Flax, on the same variables, in the place of one of ours."""
    module = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if isinstance(module, layers.Conv):
        return _conv(module)(*args, **kwargs)
    if isinstance(module, layers.BatchNorm):
        return _batch_norm(module)(*args, **kwargs)
    return call(*args, **kwargs)


def _conv(module: layers.Conv) -> nn.Module:
    # Its variables are found by its scope, which is that of the layer it stands for.
    scope: Any = module.scope
    padding = module.padding if module.padding is not None else [k // 2 for k in module.window]
    return nn.Conv(
        module.filters,
        module.window,
        strides=(module.stride, module.stride),
        padding=[(p, p) for p in padding],
        feature_group_count=module.groups,
        use_bias=module.use_bias,
        dtype=module.dtype,
        parent=scope,
    )


def _batch_norm(module: layers.BatchNorm) -> nn.Module:
    scope: Any = module.scope
    return nn.BatchNorm(
        use_running_average=module.use_running_average,
        momentum=module.momentum,
        epsilon=module.epsilon,
        use_scale=module.use_scale,
        dtype=module.dtype,
        parent=scope,
    )


@contextlib.contextmanager
def _lax_max_pool() -> Iterator[None]:
    """While it lasts, which is while a network is traced, max-pools have lax's gradient."""
    own = pool.max_pool
    pool.max_pool = functools.partial(own, lowering="lax")
    try:
        yield
    finally:
        pool.max_pool = own
