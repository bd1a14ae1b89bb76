"""Tests of the compiled convolutions against their definition, in value and in both gradients."""

import os
import pathlib
import platform
import shutil
import subprocess
import sys

import definition
import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from resflax.ops import native, norm
from resflax.ops.conv import conv2d

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no compiled kernels")

SAME = ((1, 1), (1, 1))
SUMS = jax.ShapeDtypeStruct((2, 32), jnp.float32)


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _value_and_grads(x, kernel, dy, lowering="native", **settings):
    @jax.jit
    def run(x, kernel, dy):
        y, pull = jax.vjp(lambda *xs: conv2d(*xs, lowering=lowering, **settings), x, kernel)
        return y, *pull(dy)

    return run(x, kernel, dy)


def _check(images, kernel, **settings):
    x, kernel = _normal(0, *images), _normal(1, *kernel)
    y = definition.convolution(x, kernel, **settings)
    dy = _normal(2, *y.shape)
    expected = y, *definition.gradients(x, kernel, dy, **settings)
    actual = _value_and_grads(x, kernel, dy, **settings)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [
        (16, 16, 1),
        (16, 32, 1),
        (32, 16, 1),
        (128, 64, 2),
        (32, 32, 32),  # of one channel each
        (32, 32, 16),
        (64, 64, 16),
        (48, 48, 6),  # three vectors, of two groups each
        (64, 64, 4),
        (1024, 1024, 64),
    ],
)
def test_every_width_of_groups(channels, outputs, groups, stride):
    kernel = (3, 3, channels // groups, outputs)
    _check((3, 7, 9, channels), kernel, stride=stride, padding=SAME, groups=groups)


# Widths of 1 to 30 are computed by all the numbers of pixels at a time, and their remainders.
@pytest.mark.first(10)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8, 13, 14, 15, 30])
@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (16, 4)])
def test_every_size_of_images(channels, groups, size):
    kernel = (3, 3, channels // groups, channels)
    for stride in (1, 2):
        settings = {"stride": stride, "padding": SAME, "groups": groups}
        _check((2, size + 1, size, channels), kernel, **settings)


@pytest.mark.first(7)
@pytest.mark.parametrize(
    ("window", "padding"),
    [
        ((1, 1), ((0, 0), (0, 0))),
        ((2, 3), ((0, 1), (1, 1))),
        ((5, 1), ((2, 2), (0, 0))),
        ((3, 3), ((0, 2), (2, 0))),
        ((7, 7), ((3, 3), (3, 3))),
        ((3, 3), ((0, 0), (0, 0))),
        ((1, 1), ((1, 1), (1, 1))),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_window_and_padding(window, padding, stride):
    for channels, groups in ((32, 1), (32, 8)):
        kernel = (*window, channels // groups, channels)
        _check((2, 9, 8, channels), kernel, stride=stride, padding=padding, groups=groups)


@pytest.mark.first(8)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("window", "stride", "outputs"),
    [((7, 7), 2, 64), ((3, 3), 1, 16), ((3, 3), 2, 48), ((5, 1), 1, 32), ((2, 4), 2, 320)],
)
def test_photographs(channels, window, stride, outputs):
    padding = tuple((k // 2, (k - 1) // 2) for k in window)
    for size in ((17, 30), (64, 33)):
        kernel = (*window, channels, outputs)
        _check((2, *size, channels), kernel, stride=stride, padding=padding)


# Of several sets of slabs, and bands of which the last has fewer rows, in one phase or in both.
@pytest.mark.first(3)
@pytest.mark.parametrize(("height", "stride"), [(61, 1), (61, 2), (64, 2)])
@pytest.mark.parametrize(("channels", "groups"), [(256, 64), (64, 1), (192, 12)])
def test_images_of_many_rows_are_computed_in_bands(channels, groups, height, stride):
    kernel = (3, 3, channels // groups, channels)
    _check((2, height, 40, channels), kernel, padding=SAME, groups=groups, stride=stride)


def test_the_result_does_not_depend_on_the_run():
    operands = _normal(0, 9, 14, 14, 32), _normal(1, 3, 3, 4, 32), _normal(2, 9, 14, 14, 32)
    first = _value_and_grads(*operands, padding=SAME, groups=8)
    for _ in range(5):
        again = _value_and_grads(*operands, padding=SAME, groups=8)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_in_loops_under_vmap_and_in_bfloat16():
    x, kernel = _normal(0, 2, 6, 6, 16), _normal(1, 3, 3, 4, 16)

    def loss(lowering, kernel, x=x):
        def body(x, _):
            return conv2d(x, kernel, padding=SAME, groups=4, lowering=lowering), None

        return jnp.sum(jax.lax.scan(body, x, None, length=3)[0] ** 2)

    expected = jax.grad(loss, argnums=1)("lax", kernel)
    actual = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)("native", kernel)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    each = jax.vmap(lambda k: conv2d(x, k, padding=SAME, groups=4, lowering="native"))
    np.testing.assert_array_equal(
        each(jnp.stack([kernel, 2 * kernel]))[1],
        conv2d(x, 2 * kernel, padding=SAME, groups=4, lowering="native"),
    )
    halves = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    assert conv2d(*halves, padding=SAME, groups=4).dtype == jnp.bfloat16


def test_what_it_does_not_know_is_refused():
    for channels, groups, stride in ((24, 1, 1), (16, 1, 3), (12, 3, 1)):
        x, kernel = jnp.zeros((1, 5, 5, channels)), jnp.zeros((3, 3, channels // groups, channels))
        with pytest.raises(ValueError, match="'native' is not for kernels"):
            conv2d(x, kernel, stride=stride, groups=groups, lowering="native")


@pytest.mark.devices(8)
def test_devices_that_hold_parts_of_the_batch_compute_them_alone():
    x, kernel = _normal(0, 16, 6, 6, 32), _normal(1, 3, 3, 4, 32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(
        lambda x, kernel: conv2d(x, kernel, padding=SAME, groups=8),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    text = jax.jit(local).lower(x, kernel).compile().as_text()
    assert "resflax_Forward" in text
    assert "all-gather" not in text
    expected = conv2d(x, kernel, padding=SAME, groups=8, lowering="lax")
    np.testing.assert_allclose(local(x, kernel), expected, atol=1e-5 * np.abs(expected).max())
    # Under automatic sharding XLA would gather the batch for a call that it cannot see into.
    automatic = jax.jit(lambda x, kernel: conv2d(x, kernel, padding=SAME, groups=8))
    assert "resflax_Forward" not in automatic.lower(x, kernel).compile().as_text()


FORCED = """
import jax.numpy as jnp
from resflax.ops.conv import conv2d
conv2d(jnp.ones((1, 5, 5, 16)), jnp.ones((1, 1, 16, 16)), lowering="native")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "path",
    [pytest.param(os.environ["PATH"], marks=pytest.mark.slow), ""],
    ids=["compiler", "no compiler"],
)
def test_the_kernels_that_are_asked_for_are_compiled(tmp_path, path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": path, "CXX": ""}
    result = forked.run("-c", FORCED, environment=environment)
    assert (result.code == 0) == bool(path)
    assert path or "need a C++ compiler" in result.errors


@pytest.mark.slow
@pytest.mark.parametrize("without", ["avx512f", "avx"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these vectors are of x86")
def test_processors_of_narrower_vectors(tmp_path, without):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if f"__{without.upper()}__" not in macros:
        pytest.skip("this processor's are no wider")
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -mno-{without}\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "RESFLAX_TEST_CACHE": str(tmp_path), "CXX": str(wrapper)}
    tests = "every_width or photographs or bands or many_channels or products or pool"
    files = [__file__, str(pathlib.Path(__file__).with_name("test_pool.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *files, "-k", tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert len(list(tmp_path.glob("resflax/kernels/*.so"))) == 1


CHOICE = """
import jax, jax.numpy as jnp
from resflax.ops.conv import conv2d
f = jax.jit(lambda x, k: conv2d(x, k, groups=4))
print("custom" if "resflax_Forward" in f.lower(jnp.ones((1, 5, 5, 16)),
      jnp.ones((3, 3, 4, 16))).as_text() else "plain")
"""


@pytest.mark.parametrize(
    ("change", "choice", "told"),
    [
        ({}, "custom", ""),
        ({"RESFLAX_NATIVE": "0"}, "plain", ""),
        ({"PATH": "", "CXX": ""}, "plain", "there is no C++ compiler; Debian's is apt-get"),
    ],
    ids=["compiler", "switched off", "no compiler"],
)
def test_the_choice_of_one_device(change, choice, told):
    # Both compute the same: which one runs is seen in the program only.
    result = forked.run("-c", CHOICE, environment=change)
    assert result.output.strip() == choice
    assert told in result.errors
    assert result.errors.count("UserWarning") == bool(told)
    assert told or not result.errors


@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [(32, 32, 1), (48, 80, 1), (64, 128, 2), (128, 64, 1), (512, 32, 1), (256, 256, 8)],
)
def test_winograd_over_many_channels(channels, outputs, groups):
    kernel = (3, 3, channels // groups, outputs)
    _check((3, 7, 9, channels), kernel, padding=SAME, groups=groups)


@pytest.mark.parametrize(
    ("images", "padding"),
    [
        ((1, 1, 1), SAME),
        ((2, 1, 2), SAME),
        ((1, 3, 3), ((0, 0), (0, 0))),
        ((5, 4, 6), ((2, 0), (0, 2))),
        ((2, 7, 7), ((0, 1), (2, 1))),
        ((2, 5, 6), ((2, 2), (2, 2))),
        ((2, 5, 6), ((3, 0), (0, 0))),  # too wide for it: computed directly
        ((17, 30, 31), SAME),  # tiles of several tasks
    ],
)
def test_winograd_of_every_size_and_padding(images, padding):
    _check((*images, 32), (3, 3, 32, 32), padding=padding)


def test_which_algorithm_is_chosen():
    # All compute the same: which one runs is seen in the program only.
    def names(channels, stride=1, padding=SAME):
        kernel = jnp.ones((3, 3, channels, channels))
        f = jax.jit(lambda x: conv2d(x, kernel, stride=stride, padding=padding, lowering="native"))
        return f.lower(jnp.ones((1, 5, 5, channels))).as_text()

    assert "resflax_WinogradForward" in names(32)
    assert "resflax_Forward" in names(16)
    assert "resflax_Forward" in names(32, stride=2)
    assert "resflax_Forward" in names(32, padding=((3, 0), (0, 0)))


# Rows of channels that fill no panel, some panels and a half, and a few tiles; rows that fill no
# strip, and those of several blocks and chunks.
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("images", "channels", "outputs"),
    [
        ((1, 1, 1), 16, 16),
        ((2, 3, 5), 48, 80),
        ((3, 17, 19), 32, 64),
        ((2, 21, 25), 288, 528),
        ((1, 40, 41), 16, 272),
    ],
)
def test_products(images, channels, outputs, stride):
    _check((*images, channels), (1, 1, channels, outputs), stride=stride)


def test_what_is_written_around_the_caches():
    x = _normal(0, 2, 200, 170, 32)
    assert x.nbytes > 8 << 20
    _check(x.shape, (1, 1, 32, 48))
    y = jax.jit(lambda x: norm.relu(norm.Affine(x, jnp.full((1, 32), 2.0), jnp.ones((1, 32)))))(x)
    np.testing.assert_array_equal(y, np.maximum(2 * x + 1, 0))


def test_wide_groups_that_winograd_does_not_suit_are_none_of_the_kernels():
    with pytest.raises(ValueError, match="not for kernels"):
        conv2d(
            jnp.ones((1, 5, 5, 512)),
            jnp.ones((3, 3, 512, 32)),
            padding=((3, 0), (0, 0)),
            lowering="native",
        )


def test_channels_that_fill_no_vector_are_no_products_of_the_kernels():
    with pytest.raises(ValueError, match="not for kernels"):
        conv2d(jnp.ones((1, 2, 2, 24)), jnp.ones((1, 1, 24, 16)), lowering="native")


# Each two of the four together.
@pytest.mark.parametrize(
    ("channels", "rectify", "added", "gated"),
    [
        (16, False, False, True),
        (16, True, True, False),
        (48, False, True, False),
        (48, True, False, True),
        (80, False, True, True),
        (80, True, False, False),
    ],
)
def test_batch_norm_is_that_of_xla(channels, rectify, added, gated, monkeypatch):
    x, residual, dy = (_normal(i, 3, 7, 9, channels) for i in range(3))
    x += 1.0
    scale, bias, gates = _normal(3, channels), _normal(4, channels), _normal(5, 3, channels)

    def normalized(x, scale, bias, residual, gates):
        x, means, squares = norm.moments(x)
        mean = means.mean(0)
        scale = scale * jax.lax.rsqrt(squares.mean(0) - mean**2 + 1e-5)
        y = norm.Affine(x, scale[None], (bias - mean * scale)[None], means)
        if gated:
            y = y.gated(gates * y.pooled())
        if added:
            y = norm.add(residual, y)
        return norm.relu(y) if rectify else norm.value(y)

    results = []
    for usable in (True, False):
        monkeypatch.setattr(native, "usable", lambda usable=usable: usable)

        @jax.jit
        def run(*operands):
            y, pull = jax.vjp(normalized, *operands)
            return y, *pull(dy)

        results.append(run(x, scale, bias, residual, gates))
    for a, e in zip(*results, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_runs_of_positions_are_all_summed():
    x = np.abs(_normal(0, 2, 13, 17, 32))  # 221 positions: six whole runs, and a part of one
    mean, square = jax.jit(lambda x: native.call("Moments", (SUMS, SUMS), x))(x)
    np.testing.assert_allclose(mean, x.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(square, (x**2).mean((1, 2)), rtol=1e-6)
