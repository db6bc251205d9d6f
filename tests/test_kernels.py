"""C++ under MLX: the primitive against PyTorch, wrong calls, threads, and the cache of what is compiled."""
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashconv.kernels import build, primitive
from flashconv.kernels.primitive import spec

if sys.platform != "linux": pytest.skip("kernels are built on Linux only", allow_module_level=True)
if not build.compiler(): pytest.skip("no C++ compiler is installed", allow_module_level=True)
if primitive.available() is False: pytest.fail(f"no kernels: {primitive.info()}", pytrace=False)

glue = primitive._glue
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def on_cpu():
    with mx.stream(mx.cpu): yield


# Against PyTorch -----------------------------------------------------------------------------------
# Whole numbers, whose sums are exact in any order: results are equal, not close.

def layers(count, seed=0):
    "Random layers: (spec's arguments, shape of x, shape of w); transposed ones take y for x."
    rng = random.Random(seed)
    for _ in range(count):
        n, transposed = rng.choice([1, 2, 2, 3]), rng.random() < 0.5
        kernel = [rng.randint(1, 4 if n < 3 else 2) for _ in range(n)]
        stride = [rng.randint(1, 3) for _ in range(n)]
        dilation = [rng.randint(1, 3) for _ in range(n)]
        padding = [rng.randint(0, k) for k in kernel]
        extra = [rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation)]
        groups = rng.choice([1, 1, 2, 3])
        channels, outputs = groups * rng.randint(1, 3), groups * rng.randint(1, 3)
        size = [(k - 1) * d + 1 + rng.randint(0, 5) for k, d in zip(kernel, dilation)]
        if transposed: size = [s + 2 * p for s, p in zip(size, padding)]
        w = (channels, outputs // groups) if transposed else (outputs, channels // groups)
        yield dict(stride=tuple(stride), padding=tuple((p, p) for p in padding), dilation=tuple(dilation),
                   groups=groups, channels_last=rng.random() < 0.5,
                   output_padding=tuple(extra) if transposed else None), \
            (rng.randint(1, 3), channels, *size), (*w, *kernel), outputs


LAYERS = [pytest.param(*layer, id=str(i)) for i, layer in enumerate(layers(60))]


def reference(torch, layer):
    "PyTorch's function of (x, w, bias), channels first."
    n, transposed = len(layer["stride"]), layer["output_padding"] is not None
    padding = [p for p, _ in layer["padding"]]

    def convolve(x, w, bias=None):
        if transposed:
            f = getattr(torch.nn.functional, f"conv_transpose{n}d")
            return f(x, w, bias, layer["stride"], padding, layer["output_padding"], layer["groups"], layer["dilation"])
        f = getattr(torch.nn.functional, f"conv{n}d")
        return f(x, w, bias, layer["stride"], padding, layer["dilation"], layer["groups"])
    return convolve


def whole(shape):
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(np.float32)


def moved(layer, array, to_last):
    "Between channels first and the layer's own layout."
    if not layer["channels_last"]: return array
    return np.moveaxis(array, 1, -1) if to_last else np.moveaxis(array, -1, 1)


def first(layer, array): return moved(layer, np.array(array), False)
def ours(layer, array): return mx.array(np.ascontiguousarray(moved(layer, array, True)))


def equal(actual, expected):
    actual, expected = np.array(actual), expected.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("layer, x, w, outputs", LAYERS)
def test_values_and_derivatives(torch, layer, x, w, outputs):
    "Forward, all gradients, and the gradient of gradients, which are all four kinds in every role."
    x, w, b = whole(x), whole(w), whole((outputs,))
    tx, tw, tb = (torch.tensor(a, requires_grad=True) for a in (x, w, b))
    ty = reference(torch, layer)(tx, tw, tb)
    cotangent, u, v, r = whole(ty.shape), whole(x.shape), whole(w.shape), whole(b.shape)
    tc = torch.tensor(cotangent, requires_grad=True)
    dx, dw, db = torch.autograd.grad(ty, (tx, tw, tb), tc, create_graph=True)
    again = sum((torch.tensor(a) * g).sum() for a, g in ((u, dx), (v, dw), (r, db)))
    second = torch.autograd.grad(again, (tx, tw, tc))

    call, X, W, B, C = spec(**layer), ours(layer, x), mx.array(w), mx.array(b), ours(layer, cotangent)

    def gradients(X, W, C):
        y, grads = mx.vjp(lambda *a: call(*a), (X, W, B), (C,))
        return (*y, *grads)

    y, gx, gw, gb = gradients(X, W, C)
    for a, e in ((first(layer, y), ty), (first(layer, gx), dx), (gw, dw), (gb, db)): equal(a, e)

    def scalar(X, W, C):
        _, gx, gw, gb = gradients(X, W, C)
        return (ours(layer, u) * gx).sum() + (mx.array(v) * gw).sum() + (mx.array(r) * gb).sum()

    hx, hw, hc = mx.grad(scalar, (0, 1, 2))(X, W, C)
    for a, e in ((first(layer, hx), second[0]), (hw, second[1]), (first(layer, hc), second[2])): equal(a, e)


@pytest.mark.parametrize("layer, x, w, outputs", LAYERS[:20])
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_jvp(torch, layer, x, w, outputs, moving):
    x, w, b = arrays = whole(x), whole(w), whole((outputs,))
    tangents = [whole(a.shape[::-1]).reshape(a.shape) for a in arrays]
    call, mine = spec(**layer), [ours(layer, x), mx.array(w), mx.array(b)]
    mine_t = [ours(layer, tangents[0]), mx.array(tangents[1]), mx.array(tangents[2])]

    def theirs(*given): return reference(torch, layer)(*(given[moving.index(i)] if i in moving else torch.tensor(a)
                                                         for i, a in enumerate(arrays)))
    def f(*given): return call(*(given[moving.index(i)] if i in moving else a for i, a in enumerate(mine)))
    _, expected = torch.func.jvp(theirs, tuple(torch.tensor(arrays[i]) for i in moving),
                                 tuple(torch.tensor(tangents[i]) for i in moving))
    _, (actual,) = mx.jvp(f, [mine[i] for i in moving], [mine_t[i] for i in moving])
    equal(first(layer, actual), expected)


@pytest.mark.parametrize("layer, x, w, outputs", LAYERS[:20])
@pytest.mark.parametrize("axes", [(0, None, None), (1, None, 0), (None, 0, None), (2, 1, 0), (0, 0, None), (None, None, 0)])
def test_vmap(torch, layer, x, w, outputs, axes):
    "The same as one call for each entry, for results and gradients."
    call, size = spec(**layer), 3
    shapes = (ours(layer, whole(x)).shape, w, (outputs,))
    given = [whole((size, *shape)) for shape in shapes]
    inputs = [mx.array(np.moveaxis(a, 0, axis) if axis is not None else a[0]) for a, axis in zip(given, axes)]
    y = call(*(mx.array(a[0]) for a in given))
    weight = mx.array(whole(y.shape))

    def f(*a): return (call(*a), *mx.grad(lambda *a: (weight * call(*a) * call(*a)).sum(), (0, 1, 2))(*a))
    actual = mx.vmap(f, in_axes=axes)(*inputs)
    for i in range(size):
        for whole_batch, one in zip(actual, f(*(mx.array(a[i if axis is not None else 0]) for a, axis in zip(given, axes)))):
            assert mx.array_equal(whole_batch[i], one)


@pytest.mark.parametrize("layer, x, w, outputs", LAYERS[:30])
def test_compile_without_shapes(torch, layer, x, w, outputs):
    "What was traced at one size is right at others: results, gradients, and those of gradients."
    call = spec(**layer)
    W, B = mx.array(whole(w)), mx.array(whole((outputs,)))

    def f(X, W, B):
        y = call(X, W, B)
        grads = mx.grad(lambda *a: (call(*a) ** 2).sum(), (0, 1, 2))(X, W, B)
        second = mx.grad(lambda X: (mx.grad(lambda X: (call(X, W, B) ** 2).sum())(X) ** 2).sum())(X)
        return (y, *grads, second)
    compiled = mx.compile(f, shapeless=True)
    for more in (0, 1, 2, 5):
        X = ours(layer, whole((x[0] + more, x[1], *(size + more for size in x[2:]))))
        for a, e in zip(compiled(X, W, B), f(X, W, B)):
            assert a.shape == e.shape and mx.allclose(a, e, rtol=1e-5)
