"""The convolution and its two gradients by their definition, in float64."""

import numpy as np


def convolution(x, kernel, *, stride=1, padding=((0, 0), (0, 0)), groups=1):
    """[N, H, W, C] and [k_h, k_w, C / groups, F] -> [N, H', W', F]."""
    kernel = np.asarray(kernel, np.float64)
    weights, padded = _weights(kernel, groups), _padded(x, padding)
    rows, columns = _size(padded, kernel, stride)
    y = sum(
        _grouped(_under(padded, tap, stride, rows, columns), groups) @ weights[tap]
        for tap in np.ndindex(*kernel.shape[:2])
    )
    return _joined(y).reshape(len(x), rows, columns, -1)


def gradients(x, kernel, dy, *, stride=1, padding=((0, 0), (0, 0)), groups=1):
    """The gradients of `x` and of `kernel`, where that of the result is `dy` [N, H', W', F]."""
    kernel, dy = np.asarray(kernel, np.float64), np.asarray(dy, np.float64)
    weights, padded = _weights(kernel, groups), _padded(x, padding)
    (_, rows, columns, _), dy = dy.shape, _grouped(dy, groups)
    dx, dweights = np.zeros_like(padded), np.zeros_like(weights)
    for tap in np.ndindex(*kernel.shape[:2]):
        pixels = _under(padded, tap, stride, rows, columns)
        dweights[tap] = np.swapaxes(_grouped(pixels, groups), 1, 2) @ dy
        back = _joined(dy @ np.swapaxes(weights[tap], 1, 2)).reshape(pixels.shape)
        _under(dx, tap, stride, rows, columns)[...] += back
    (top, bottom), (left, right) = padding
    dx = dx[:, top : padded.shape[1] - bottom, left : padded.shape[2] - right]
    return dx, np.moveaxis(dweights, 2, 3).reshape(kernel.shape)


def _padded(x, padding):
    return np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))


def _size(padded, kernel, stride):
    sides = zip(padded.shape[1:3], kernel.shape[:2], strict=True)
    return [(pixels - taps) // stride + 1 for pixels, taps in sides]


def _under(images, tap, stride, rows, columns):
    """The pixels that a tap of the kernel meets: a view of [N, H', W', C]."""
    i, j = tap
    return images[:, i : i + stride * rows : stride, j : j + stride * columns : stride]


def _grouped(images, groups):
    """[N, H, W, C] -> [groups, N * H * W, C / groups]."""
    return np.moveaxis(images.reshape(-1, groups, images.shape[-1] // groups), 1, 0)


def _joined(pixels):
    """[groups, N * H * W, C / groups] -> [N * H * W, C]."""
    return np.moveaxis(pixels, 0, 1).reshape(pixels.shape[1], -1)


def _weights(kernel, groups):
    """[k_h, k_w, C / groups, F] -> [k_h, k_w, groups, C / groups, F / groups]."""
    return np.moveaxis(kernel.reshape(*kernel.shape[:3], groups, -1), 3, 2)
