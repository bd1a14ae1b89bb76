"""Tests of the convolution's lowerings against its definition, in value and both gradients."""

import functools
import re

import definition
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from resflax.ops import conv
from resflax.ops.conv import conv2d, dense_kernel, num_blocks

SAME = ((1, 1), (1, 1))
VALID = ((0, 0), (0, 0))


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _operands(size, kernel_size, c_in, c_out, groups, dtype=jnp.float32):
    # Height and width differ, so that a lowering that confuses them is seen.
    x = _normal(0, 2, size, size + 2, c_in, dtype=dtype)
    return x, _normal(1, kernel_size, kernel_size, c_in // groups, c_out, dtype=dtype)


def _expected(x, kernel, **settings):
    y = definition.convolution(x, kernel, **settings)
    dy = _normal(2, *y.shape)
    return [a.astype(np.float32) for a in (y, *definition.gradients(x, kernel, dy, **settings))]


def _value_and_grads(lowering, x, kernel, **settings):
    @jax.jit
    def run(x, kernel):
        y, pull = jax.vjp(lambda *xs: conv2d(*xs, lowering=lowering, **settings), x, kernel)
        return y, *pull(_normal(2, *y.shape, dtype=y.dtype))

    return run(x, kernel)


def _assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


# kernel height and width, stride, padding, groups, channels in and out, height and width
CASES = [
    # Every residue of the padded size by the stride, and padding that differs by side.
    (3, 3, 1, SAME, 1, 6, 10, (7, 8)),
    (3, 3, 1, VALID, 2, 6, 10, (5, 6)),
    (3, 3, 1, ((0, 1), (2, 1)), 3, 12, 30, (5, 4)),
    (3, 3, 2, SAME, 1, 5, 7, (7, 8)),
    (3, 3, 2, SAME, 32, 64, 64, (8, 7)),
    (3, 3, 2, VALID, 4, 12, 8, (8, 9)),
    (3, 3, 2, ((3, 0), (0, 2)), 2, 64, 32, (6, 7)),
    (3, 3, 3, SAME, 1, 4, 6, (9, 10)),
    (3, 3, 3, ((2, 0), (0, 1)), 8, 32, 64, (8, 11)),
    (2, 2, 1, ((0, 1), (1, 0)), 1, 3, 5, (5, 6)),
    (2, 2, 2, VALID, 4, 8, 12, (7, 6)),
    (2, 2, 3, VALID, 1, 3, 5, (8, 9)),  # pixels between the windows
    (5, 5, 1, ((2, 2), (2, 2)), 1, 3, 4, (6, 5)),
    (5, 5, 2, ((2, 1), (1, 2)), 16, 16, 32, (9, 8)),
    (7, 7, 2, ((3, 3), (3, 3)), 1, 3, 8, (11, 12)),
    (7, 7, 3, ((3, 3), (3, 3)), 1, 3, 4, (8, 5)),
    (1, 1, 1, VALID, 4, 64, 32, (5, 3)),
    (1, 1, 2, VALID, 2, 6, 4, (7, 8)),  # and where no window lies at all
    (1, 1, 3, VALID, 1, 5, 9, (7, 8)),
    (1, 1, 1, SAME, 1, 4, 4, (3, 2)),
    (1, 7, 1, ((0, 0), (3, 3)), 1, 4, 6, (3, 8)),
    (3, 1, 2, ((1, 1), (0, 0)), 2, 8, 6, (6, 5)),
    (3, 3, 1, SAME, 17, 17, 17, (5, 6)),  # no number of blocks but 1
    (3, 3, 1, SAME, 64, 64, 64, (4, 5)),
    (3, 3, 1, SAME, 32, 512, 512, (2, 3)),  # as many blocks as there can be
    (3, 3, 2, SAME, 2, 32, 32, (1, 1)),
    (4, 4, 4, VALID, 1, 3, 6, (9, 8)),  # one pixel of each phase to a window
]


LOWERINGS = ["blocks", "merged", "phases", "lax"]


# Each case with two of the four is enough before a commit.
@pytest.mark.parametrize(
    ("lowering", "height", "width", "stride", "padding", "groups", "c_in", "c_out", "size"),
    [
        pytest.param(lowering, *case, marks=[pytest.mark.long] * ((i + j // 2) % 2))
        for i, lowering in enumerate(LOWERINGS)
        for j, case in enumerate(CASES)
    ],
)
def test_compositions_agree_with_the_definition(
    lowering, height, width, stride, padding, groups, c_in, c_out, size
):
    x = _normal(0, 2, *size, c_in)
    kernel = _normal(1, height, width, c_in // groups, c_out)
    settings = {"stride": stride, "padding": padding, "groups": groups}
    if lowering == "phases" and groups > 1:
        with pytest.raises(ValueError, match=r"not for \d+ groups"):
            conv2d(x, kernel, lowering=lowering, **settings)
        return
    expected = _expected(x, kernel, **settings)
    _assert_close(_value_and_grads(lowering, x, kernel, **settings), expected, 1e-5)


def _scan(layer, x):
    return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=3)[0]


def _map(layer, x):
    return jax.lax.map(lambda row: layer(row[None])[0], x)


def _fori(layer, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: layer(x), x)


@pytest.mark.parametrize("loop", [_scan, _map, _fori], ids=["scan", "map", "fori_loop"])
@pytest.mark.parametrize(
    ("groups", "kernel_size", "stride"), [(1, 3, 1), (32, 3, 1), (4, 5, 1), (1, 3, 2)]
)
def test_in_a_loop_every_convolution_has_images_first_and_channels_last(
    groups, kernel_size, stride, loop
):
    x, kernel = _operands(8, kernel_size, 64, 64, groups)
    padding = ((kernel_size // 2,) * 2,) * 2

    def forms(lowering):
        def layer(kernel, x):
            y = conv2d(x, kernel, stride=stride, padding=padding, groups=groups, lowering=lowering)
            # Back to the size: what a loop carries has one.
            return jnp.repeat(jnp.repeat(y, stride, axis=1), stride, axis=2)

        def loss(x, kernel):
            return jnp.sum(loop(functools.partial(layer, kernel), x))

        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel).as_text()
        stuffed = re.findall(r"lhs_dilate = \[(?!1, 1\])", text)  # with zeros
        numbers = r"dim_numbers = \[(.*?)\]x\[(.*?)\]->\[(.*?)\]"
        return set(re.findall(numbers, text)), len(stuffed)

    # XLA's results are the same, only slow: the program is where that is seen.
    assert forms("blocks") == ({("b, 0, 1, f", "0, 1, i, o", "b, 0, 1, f")}, 0)
    plain, stuffed = forms("lax")
    assert len(plain) > 1
    assert (stuffed > 0) == (stride > 1)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("size", "c_in", "c_out"), [(7, 5, 9), (8, 64, 16)])
def test_dot_agrees_with_the_definition(size, c_in, c_out, stride):
    operands = _operands(size, 1, c_in, c_out, 1)
    expected = _expected(*operands, stride=stride)
    _assert_close(_value_and_grads("dot", *operands, stride=stride), expected, 1e-5)


@pytest.mark.devices(1, 8)
@pytest.mark.parametrize(
    ("kernel_size", "groups"), [(1, 1), (1, 4), (3, 1), (3, 32)], ids=lambda v: str(v)
)
def test_the_default_lowering_agrees_with_the_definition(kernel_size, groups):
    operands = _operands(7, kernel_size, 64, 32, groups)
    expected = _expected(*operands, groups=groups)
    _assert_close(_value_and_grads(None, *operands, groups=groups), expected, 1e-5)


@pytest.mark.parametrize(
    ("lowering", "kernel_size", "groups"),
    [("blocks", 3, 8), ("merged", 3, 8), ("phases", 3, 1), ("dot", 1, 1)],
)
def test_bfloat16_agrees_with_float32_within_its_rounding(lowering, kernel_size, groups):
    operands = _operands(7, kernel_size, 32, 32, groups, jnp.bfloat16)
    actual = _value_and_grads(lowering, *operands, groups=groups)
    assert all(a.dtype == jnp.bfloat16 for a in actual)
    exact = _value_and_grads("lax", *(o.astype(jnp.float32) for o in operands), groups=groups)
    # Eight bits of mantissa: each result is rounded once, and so was the cotangent.
    _assert_close([a.astype(jnp.float32) for a in actual], exact, 2**-7)


def test_each_group_sees_its_own_channels_only():
    x, kernel = _operands(5, 3, 64, 32, 8)
    y = conv2d(x, kernel, groups=8, lowering="blocks")
    changed = conv2d(x.at[..., 8:16].add(1.0), kernel, groups=8, lowering="blocks")
    same = np.all(np.asarray(y == changed), axis=(0, 1, 2))
    assert same.tolist() == [not 4 <= channel < 8 for channel in range(32)]


@pytest.mark.parametrize(
    ("kernel", "groups"),
    [
        ((3, 3, 3, 12), 4),  # 6 input channels in 4 groups
        ((3, 3, 2, 10), 3),  # 10 output channels in 3 groups
        ((3, 3, 6, 12), 2),  # a dense kernel
        ((3, 3, 3, 12), 1),
    ],
)
@pytest.mark.parametrize("lowering", ["lax", "blocks", None])
def test_kernels_that_do_not_fit_are_refused(kernel, groups, lowering):
    with pytest.raises(ValueError, match=rf"{groups} groups.*6.*{kernel[-1]}.*kernel"):
        conv2d(jnp.zeros((1, 5, 5, 6)), jnp.zeros(kernel), groups=groups, lowering=lowering)


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [((3, 3, 6, 4), {}), ((1, 1, 3, 4), {"groups": 2}), ((1, 1, 6, 4), {"padding": SAME})],
)
def test_dot_is_refused_where_it_is_no_matrix_product(kernel, settings):
    with pytest.raises(ValueError, match="1x1 kernels without padding or groups"):
        conv2d(jnp.zeros((1, 5, 5, 6)), jnp.zeros(kernel), lowering="dot", **settings)


@pytest.mark.parametrize(
    ("platform", "settings", "lowering"),
    [
        ("gpu", {"images": True}, "phases"),
        ("gpu", {"pointwise": True}, "merged"),
        ("gpu", {"fits_native": True}, "merged"),
        ("tpu", {"images": True}, "lax"),
        ("cpu", {"pointwise": True}, "dot"),
        ("cpu", {"images": True}, "blocks"),
    ],
)
def test_the_platform_and_the_shapes_choose(platform, settings, lowering):
    # A private function, since the other platforms are not here: test_gpu.py compares the results.
    plain = {"pointwise": False, "fits_native": False, "images": False}
    assert conv._choose_lowering(platform, **plain | settings) == lowering


def test_groups_of_sixteen_channels_stay_as_they_are():
    assert [num_blocks(c, 32, most=32) for c in (128, 256, 512, 1024)] == [8, 16, 32, 32]


def test_num_blocks_divides_the_groups_and_fills_a_register():
    for groups in range(1, 65):
        for width in (1, 2, 4, 5, 8, 16, 40):
            channels = groups * width
            blocks = num_blocks(channels, groups)
            assert groups % blocks == 0
            assert channels // blocks >= 16 or blocks == 1
            assert blocks <= 16
            finer = [d for d in range(blocks + 1, min(groups, 16) + 1) if groups % d == 0]
            assert all(channels // d < 16 for d in finer)
    assert [num_blocks(512, groups) for groups in (1, 8, 32, 64)] == [1, 8, 16, 16]


def test_dense_kernel_is_block_diagonal():
    kernel = _normal(0, 3, 3, 2, 12)
    dense = np.array(dense_kernel(kernel, 4))
    assert dense.shape == (3, 3, 8, 12)
    for i in range(4):
        rows, columns = slice(2 * i, 2 * i + 2), slice(3 * i, 3 * i + 3)
        np.testing.assert_array_equal(dense[:, :, rows, columns], kernel[..., columns])
        dense[:, :, rows, columns] = 0
    assert not dense.any()


def test_dense_kernel_of_one_group_is_the_kernel():
    kernel = _normal(0, 3, 3, 4, 6)
    np.testing.assert_array_equal(dense_kernel(kernel, 1), kernel)


def _loss_and_grads(x, kernel):
    def loss(x, kernel):
        y = conv2d(x, kernel, padding=SAME, groups=32, lowering="blocks")
        return jnp.sum(y**2)

    return jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)


def _per_device(x, kernel):
    value, (grad_x, grad_kernel) = _loss_and_grads(x, kernel)
    return jax.lax.psum(value, "data"), (grad_x, jax.lax.psum(grad_kernel, "data"))


# XLA gathers the batch for its own grouped convolution where jit alone shards it.
@pytest.mark.devices(8)
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_a_sharded_batch_is_never_gathered(mapped):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = _loss_and_grads
    if mapped:
        step = jax.shard_map(
            _per_device,
            mesh=mesh,
            in_specs=(P("data"), P()),
            out_specs=(P(), (P("data"), P())),
            check_vma=False,
        )
    operands = _normal(0, 16, 6, 6, 64), _normal(1, 3, 3, 2, 64)
    placed = [
        jax.device_put(o, NamedSharding(mesh, spec))
        for o, spec in zip(operands, (P("data"), P()), strict=True)
    ]
    compiled = jax.jit(step).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    actual, expected = compiled(*placed), _loss_and_grads(*operands)
    _assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected), 1e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("lowering", "kernel_size", "groups"), [("blocks", 3, 16), ("dot", 1, 1), (None, 3, 16)]
)
def test_gradients_in_a_shard_map_that_checks_what_varies(lowering, kernel_size, groups):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    operands = _normal(0, 8, 4, 3, 32), _normal(1, kernel_size, kernel_size, 32 // groups, 32)
    plain = functools.partial(conv2d, groups=groups, lowering=lowering)
    mapped = jax.shard_map(plain, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))

    def grads(convolve):
        return jax.jit(jax.grad(lambda *xs: jnp.sum(convolve(*xs) ** 2), argnums=(0, 1)))(*operands)

    lax = functools.partial(conv2d, groups=groups, lowering="lax")
    _assert_close(grads(mapped), grads(lax), 1e-5)
