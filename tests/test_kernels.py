"""C++ under MLX: the primitive against PyTorch, wrong calls, threads, and the cache of what is compiled."""
import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import flashconv.functional as F
from flashconv.kernels import build, pool, primitive
from flashconv.kernels.primitive import spec

if sys.platform != "linux": pytest.skip("kernels are built on Linux only", allow_module_level=True)
if os.environ.get("FLASHCONV_KERNELS") == "off": pytest.skip("FLASHCONV_KERNELS=off", allow_module_level=True)
found = primitive.available()  # an error where FLASHCONV_KERNELS=require
if not build.compiler(): pytest.skip("no C++ compiler is installed", allow_module_level=True)
if not found: pytest.fail(f"no kernels: {primitive.info()}", pytrace=False)

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


@pytest.mark.parametrize("layer, x, w, outputs", LAYERS[:8])
@pytest.mark.parametrize("outer, inner", [((0, None, None), (0, None, None)), ((0, None, None), (None, 0, 0)), ((None, 0, None), (1, None, 0)),
                                          ((0, 0, 0), (0, 0, 0)), ((None, 0, 0), (None, 0, None)), ((None, None, 0), (0, None, None))])
def test_vmap_of_vmap(layer, x, w, outputs, outer, inner):
    call, sizes = spec(**layer), (2, 3)
    shapes = (ours(layer, whole(x)).shape, w, (outputs,))
    given = [[[whole((*shape, i + j)[:len(shape)]) + i - j for j in range(3)] for i in range(2)] for shape in shapes]

    def f(*a): return (call(*a), *mx.grad(lambda *a: (call(*a) ** 2).sum(), (0, 1, 2))(*a))

    def stacked(arrays, out, into):
        if into is None: arrays = [row[:1] for row in arrays]
        if out is None: arrays = arrays[:1]
        a = np.array(arrays)
        a = np.moveaxis(a, 1, into + 1) if into is not None else a[:, 0]
        return mx.array(np.moveaxis(a, 0, out) if out is not None else a[0])
    inputs = [stacked(a, o, i) for a, o, i in zip(given, outer, inner)]
    actual = mx.vmap(mx.vmap(f, in_axes=inner), in_axes=outer)(*inputs)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            one = f(*(mx.array(a[i if o is not None else 0][j if into is not None else 0]) for a, o, into in zip(given, outer, inner)))
            for all_of_them, each in zip(actual, one): assert mx.array_equal(all_of_them[i, j], each)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0), (0, None, 0), (0, 0, None)])
def test_vmap_without_shapes(axes, last):
    "More calls, more images and larger ones, after the trace."
    call = spec((2, 1), ((1, 1), (0, 0)), (1, 1), 1, last)

    def f(*a): return mx.vmap(lambda *a: call(*a), in_axes=axes)(*a)
    def g(*a): return (f(*a), *mx.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2))(*a))
    compiled = mx.compile(g, shapeless=True)
    for calls, images, size in ((3, 2, 8), (3, 4, 9), (2, 1, 11), (5, 2, 8)):
        if axes[2] is None and axes[1] == 0 and calls != 3: continue  # the bias's repeats are traced by MLX
        arrays = [mx.array(whole((calls, *shape) if axis == 0 else shape)) for axis, shape in zip(axes, (
            (images, size, 9, 2) if last else (images, 2, size, 9), (4, 2, 3, 3), (4,)))]
        for a, e in zip(compiled(*arrays), g(*arrays)): assert a.shape == e.shape and mx.array_equal(a, e)


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


@pytest.mark.parametrize("name", ("conv1d", "conv_transpose1d"))
def test_an_unbatched_stride_is_not_baked_in(name):
    "Traced for an input that is shorter than the stride, and right for others."
    w, f = mx.array(whole((2, 2, 3))), getattr(F, name)
    compiled = mx.compile(lambda x: f(x, w, stride=5), shapeless=True)
    for size in (3, 30, 17):
        x = mx.array(whole((2, size)))
        assert mx.array_equal(compiled(x), f(x[None], w, stride=5)[0])


# Dtypes, views, nothing at all ------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layer, x, w, outputs", LAYERS[:12])
def test_half_precision(torch, layer, x, w, outputs, dtype):
    "Sums of whole numbers are exact in float32, and rounded once, after the bias."
    x, w, b = 7 * whole(x), 7 * whole(w), 3 * whole((outputs,))
    expected = reference(torch, layer)(*map(torch.tensor, (x, w, b)))
    y = spec(**layer)(*(a.astype(getattr(mx, dtype)) for a in (ours(layer, x), mx.array(w), mx.array(b))))
    assert y.dtype == getattr(mx, dtype)
    equal(first(layer, y.astype(mx.float32)), expected.to(getattr(torch, dtype)).float())


VIEWS = {
    "transposed": lambda a: mx.contiguous(a.swapaxes(2, 3)).swapaxes(2, 3),
    "broadcast": lambda a: mx.broadcast_to(a[:, :, :1], a.shape),
    "every other": lambda a: mx.repeat(a, 2, axis=3)[..., ::2],
    "backwards": lambda a: mx.contiguous(a[:, :, ::-1])[:, :, ::-1],
    "the end of another": lambda a: mx.concatenate([a, a], axis=0)[a.shape[0]:],
    "channels last in memory": lambda a: mx.contiguous(a.moveaxis(1, -1)).moveaxis(-1, 1),
}


@pytest.mark.parametrize("x_view", VIEWS)
@pytest.mark.parametrize("w_view", VIEWS)
def test_views(x_view, w_view):
    call = spec((1, 2), ((1, 1), (0, 2)), (1, 1), 2)
    x, w, b = mx.array(whole((2, 4, 5, 6))), mx.array(whole((6, 2, 3, 2))), mx.array(whole((12,)))[::2]
    views = VIEWS[x_view](x), VIEWS[w_view](w)
    expected = call(*(mx.array(np.array(a)) for a in views), mx.array(np.array(b)))
    mx.eval(views)
    assert mx.array_equal(call(*views, b), expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("x, w", [((0, 4, 5, 6), (6, 2, 3, 3)), ((2, 0, 5, 6), (6, 0, 3, 3)), ((2, 4, 5, 6), (0, 2, 3, 3))])
def test_nothing_to_sum(x, w, last):
    "No images give no results; no channels give the bias; gradients of nothing are zeros."
    layer = dict(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), groups=2, channels_last=last)
    call, b = spec(**layer), mx.arange(float(w[0]))
    X, W = ours(layer, whole(x)), mx.array(whole(w))
    y, grads = mx.vjp(lambda *a: call(*a), (X, W, b), (mx.ones(call(X, W, b).shape),))
    y = first(layer, y[0])
    assert y.shape == (x[0], w[0], 5, 6)
    if x[1] == 0: np.testing.assert_array_equal(y, np.broadcast_to(np.arange(w[0])[:, None, None], y.shape))
    assert [g.shape for g in grads] == [X.shape, W.shape, b.shape]
    assert not mx.any(grads[0]) and not mx.any(grads[1]) and mx.all(grads[2] == x[0] * 30)
    transposed = spec(**layer, output_padding=(0, 0))
    b = mx.arange(2.0 * w[1])
    y = first(layer, transposed(mx.ones((2, 5, 6, w[0]) if last else (2, w[0], 5, 6)), W, b))
    if w[0] == 0: np.testing.assert_array_equal(y, np.broadcast_to(np.arange(4)[:, None, None], y.shape))


# Wrong calls -------------------------------------------------------------------------------------

GOOD = dict(stride=[1, 1], padding=[(0, 0), (0, 0)], dilation=[1, 1])
WRONG_LAYERS = [
    dict(stride=[]), dict(stride=[], padding=[], dilation=[]), dict(stride=[1] * 4, padding=[(0, 0)] * 4, dilation=[1] * 4),
    dict(stride=[1]), dict(dilation=[1, 1, 1]), dict(padding=[(0, 0)]), dict(output_padding=[0]),
    *(dict(stride=[1, bad]) for bad in (0, -1, -2**63, 2**63, 1.5, "1", None)),
    *(dict(dilation=[bad, 1]) for bad in (0, -1, -2**63, 2**63, 1.5, "1", None)),
    *(dict(padding=[(0, 0), bad]) for bad in ((-1, 0), (0, -1), (2**31, 0), (0, 2**63), (0,), (0, 0, 0), 0, None, (0.5, 0))),
    *(dict(groups=bad) for bad in (0, -1, 2**31, 2**63, None, 1.0)),
    *(dict(output_padding=[0, bad]) for bad in (-1, 2**31, 2**63, None)),
    dict(channels_last=None), dict(channels_last="no"),
]


@pytest.mark.parametrize("wrong", WRONG_LAYERS, ids=str)
def test_wrong_layers(wrong):
    with pytest.raises((ValueError, TypeError)): glue.Spec(**(GOOD | wrong))


def z(*shape, dtype=mx.float32):
    "An array of any shape that takes no memory."
    return mx.broadcast_to(mx.zeros((1,) * len(shape), dtype), shape)


X, W, Y, B = z(2, 4, 5, 6), z(6, 2, 3, 3), z(2, 6, 3, 4), z(6)
LONG = 2**31 - 1


def s(axes=2, **more):
    return glue.Spec(**(dict(stride=[1] * axes, padding=[(0, 0)] * axes, dilation=[1] * axes, groups=2) | more))


WRONG_CALLS = {
    "numpy": lambda: s()(np.zeros((2, 4, 5, 6), np.float32), W),
    "nothing": lambda: s()(None, W),
    "a number": lambda: s()(X, 1.0),
    "a bias that is a list": lambda: s()(X, W, [1.0] * 6),
    "a stream that is a word": lambda: s()(X, W, stream="cpu"),
    "one array": lambda: s()(X),
    "unbatched": lambda: s()(z(4, 5, 6), W),
    "one axis too many": lambda: s()(z(1, 2, 4, 5, 6), W),
    "weight without taps": lambda: s()(X, z(6, 2)),
    "no axes": lambda: s()(z(), z()),
    **{f"{dtype}": lambda dtype=dtype: s()(X.astype(dtype), W.astype(dtype))
       for dtype in (mx.float64, mx.complex64, mx.int32, mx.uint8, mx.bool_)},
    "two dtypes": lambda: s()(X, W.astype(mx.float16)),
    "a bias of another dtype": lambda: s()(X, W, B.astype(mx.bfloat16)),
    "channels": lambda: s()(z(2, 5, 5, 6), W),
    "channels in the other layout": lambda: s(channels_last=True)(X, W),
    "outputs that groups don't divide": lambda: s()(X, z(5, 2, 3, 3)),
    "no taps": lambda: s()(X, z(6, 2, 0, 3)),
    "no length": lambda: s(padding=[(5, 5), (5, 5)])(z(2, 4, 0, 6), W),
    "kernel too large": lambda: s()(z(2, 4, 2, 6), W),
    "dilation too large": lambda: s(dilation=[2**63 - 1, 1])(X, W),
    "padding too long": lambda: s(padding=[(LONG, 0), (0, 0)])(X, W),
    "a length that overflows": lambda: s(padding=[(LONG, LONG), (0, 0)])(z(1, 4, LONG, 6), W),
    "too many elements": lambda: s()(z(LONG, 4, LONG, 3), z(2, 2, 1, 1)),
    "a result of too many elements": lambda: s()(z(2**29, 4, 2**15, 2**15), z(2, 2, 1, 1)),
    "a short bias": lambda: s()(X, W, z(5)),
    "a column for a bias": lambda: s()(X, W, z(6, 1)),
    "a scalar for a bias": lambda: s()(X, W, z()),
    "transposed: channels": lambda: s(output_padding=[0, 0])(X, W),
    "transposed: bias": lambda: s(output_padding=[0, 0])(Y, W, B),
    "transposed: nothing left": lambda: s(output_padding=[0, 0], padding=[(9, 9), (0, 0)])(Y, W),
    "transposed: too long": lambda: s(output_padding=[0, 0], stride=[2**62, 1])(Y, W),
    "transposed: dilated too far": lambda: s(output_padding=[0, 0], dilation=[1, 2**62])(Y, W),
    "transposed: no length": lambda: s(output_padding=[0, 0])(z(2, 6, 0, 4), W),
    "transposed: too many channels": lambda: s(output_padding=[0, 0])(z(2, 6, 3, 4), z(6, LONG, 3, 3)),
    "input gradient: another shape": lambda: s().input_gradient(W, Y, [2, 4, 5, 7]),
    "input gradient: strided": lambda: s(stride=[2, 2]).input_gradient(W, Y, [2, 4, 9, 9]),
    "input gradient: negative": lambda: s(stride=[2, 2]).input_gradient(W, Y, [2, 4, -5, 9]),
    "input gradient: long": lambda: s(stride=[2, 2]).input_gradient(W, Y, [2, 4, 2**31, 9]),
    "input gradient: rank": lambda: s(stride=[2, 2]).input_gradient(W, Y, [2, 4, 7]),
    "input gradient: swapped": lambda: s().input_gradient(Y, W, [2, 4, 5, 6]),
    "weight gradient: kernel": lambda: s().weight_gradient(X, Y, [6, 2, 2, 3]),
    "weight gradient: channels": lambda: s().weight_gradient(X, Y, [6, 4, 3, 3]),
    "weight gradient: batch": lambda: s().weight_gradient(z(3, 4, 5, 6), Y, [6, 2, 3, 3]),
    "weight gradient: no taps": lambda: s().weight_gradient(X, Y, [6, 2, 0, 3]),
    "bias gradient: rank": lambda: s().bias_gradient(z(2, 6, 3)),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_wrong_calls(wrong):
    "An exception, before there is anything to evaluate; the right call works as before."
    with pytest.raises((ValueError, TypeError)): WRONG_CALLS[wrong]()
    assert mx.array_equal(s()(X, W, mx.ones(6)), mx.ones((2, 6, 3, 4)))


def test_shapes_that_stop_fitting():
    "A function compiled without shapes checks each call's own."
    f = mx.compile(lambda x, w: s()(x, w), shapeless=True)
    assert f(X, W).shape == (2, 6, 3, 4) and f(z(1, 4, 9, 9), W).shape == (1, 6, 7, 7)
    for x in (z(2, 5, 5, 6), z(2, 4, 2, 6)):
        with pytest.raises(ValueError): mx.eval(f(x, W))


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_no_gpu_here():
    with pytest.raises(ValueError, match="gpu"): s()(X, W, stream=mx.gpu)


# Other kernels in place of ours -------------------------------------------------------------------

@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    "Compiles C++ that stands in for the kernels, and gives the library."
    folder = tmp_path_factory.mktemp("kernels")

    def compiled(name, body):
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        source.write_text(f'#include "conv.h"\n#include <ctime>\nusing namespace flashconv;\n{body}', encoding="utf-8")
        subprocess.run([*build.compiler(), "-shared", "-fPIC", f"-I{build.SOURCES}", source, "-o", library], check=True)
        return library
    return compiled


@pytest.fixture
def replaced(compiled):
    "The same, called by the glue until the test is over."
    def replaced(name, body):
        library = compiled(name, body)
        build.use(glue, library)
        return ctypes.CDLL(str(library))
    yield replaced
    build.use(glue, primitive.info().files[1])


RUN = """extern "C" int flashconv_run(const Convolution* g, const void*, const void*, const void*, void* result,
                                        const Threads* threads)"""


def test_memory_runs_out(replaced):
    replaced("full", f"{RUN} {{ return (void)g, (void)result, (void)threads, 1; }}")
    with pytest.raises(RuntimeError, match="no memory"): mx.eval(s()(X, W))
    build.use(glue, primitive.info().files[1])
    assert mx.array_equal(s()(X, W, mx.ones(6)), mx.ones((2, 6, 3, 4)))


def test_what_is_computed_once(replaced):
    "mx.compile merges equal calls and keeps those that differ."
    library = replaced("count", f"""static int64_t calls = 0;
        extern "C" int64_t count() {{ return calls; }}
        {RUN} {{ return (void)threads, calls++, *static_cast<float*>(result) = float(g->kind), 0; }}""")

    def calls(f, *arrays):
        before = library.count()
        mx.eval(mx.compile(f)(*arrays))
        return library.count() - before
    x, w, y = mx.ones((1, 2, 9)), mx.ones((2, 1, 3)), mx.ones((1, 2, 4))
    one, same, other, strided = s(1), s(1), s(1, dilation=[2]), s(1, stride=[2])
    assert calls(lambda x, w: one(x, w) + same(x, w), x, w) == 1
    assert calls(lambda x, w: one(x, w)[..., :5] + other(x, w), x, w) == 2
    assert calls(lambda x, w: one(x, w) + one(x, w, mx.ones(2)), x, w) == 2
    assert calls(lambda w, y: strided.input_gradient(w, y, [1, 2, 9])[..., :5]
                 + strided.input_gradient(w, y, [1, 2, 10])[..., :5], w, y) == 2
    assert calls(lambda x, y: one.weight_gradient(x, y, [2, 1, 6]).sum()
                 + one.bias_gradient(y).sum(), x, y) == 2
    assert calls(mx.grad(lambda x, w: one(x, w).sum() + same(x, w).sum(), (0, 1)), x, w) == 2


def test_geometry_at_the_border(replaced):
    "What the kernels are told about a call, field by field."
    library = replaced("tell", f"""static Convolution last;
        extern "C" const Convolution* told() {{ return &last; }}
        {RUN} {{ return last = *g, *static_cast<float*>(result) = float(threads->count), 0; }}""")
    library.told.restype = ctypes.POINTER(ctypes.c_int32 * 60)

    def told():
        raw = bytes(library.told().contents)
        ints = np.frombuffer(raw[:12], np.int32)
        return [*ints.tolist()] + np.frombuffer(raw[16:16 + 8 * 22], np.int64).tolist()
    x, w = mx.zeros((2, 4, 7, 9)), mx.zeros((6, 2, 3, 2))
    call = glue.Spec([2, 3], [(1, 5), (0, 2)], [1, 2], 2)
    y = call(x, w)
    mx.eval(y)
    lengths, steps = [1, 7, 9, 1, 3, 2, 1, 6, 3], [1, 2, 3, 1, 1, 2, 0, 1, 0]
    assert told() == [0, 0, 0, 2, 2, 2, 3, *lengths, *steps]
    mx.eval(call.input_gradient(w, y, x.shape))
    assert told() == [1, 0, 0, 2, 2, 2, 3, *lengths, *steps]
    mx.eval(call.weight_gradient(x, y, w.shape))
    assert told() == [2, 0, 0, 2, 2, 2, 3, *lengths, *steps]
    mx.eval(call.bias_gradient(y.astype(mx.bfloat16)))
    assert told()[:7] == [3, 2, 0, 2, 1, 1, 6] and told()[13:16] == [1, 6, 3]
    mx.eval(glue.Spec([1], [(0, 0)], [2**62], 1, True)(mx.zeros((1, 8, 2), mx.float16), mx.zeros((5, 2, 1), mx.float16)))
    assert told() == [0, 1, 1, 1, 1, 2, 5, 1, 1, 8, 1, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1, 1, 0, 0, 0]


# Threads, streams, interrupts and exits ------------------------------------------------------------

def child(code, *arguments, **variables):
    "A process that runs `code`, in a group of its own; None takes a variable away."
    env = {name: value for name, value in os.environ.items()
           if not name.startswith("FLASHCONV_") or name == "FLASHCONV_CACHE"}
    env = {name: str(value) for name, value in (env | variables).items() if value is not None}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=env, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(process):
    "What a process prints if it ends well within two minutes and complains of nothing."
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, (process.returncode, out, err)
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_numbers_of_threads(count):
    "The same bits on any number of threads."
    before = glue.threads()
    x, w = mx.random.normal((2, 8, 9, 33)), mx.random.normal((12, 4, 3, 3))
    expected = mx.grad(lambda *a: (s()(*a) ** 2).sum(), (0, 1))(x, w)
    mx.eval(expected)
    try:
        glue.set_threads(count)
        assert glue.threads() == count
        for a, e in zip(mx.grad(lambda *a: (s()(*a) ** 2).sum(), (0, 1))(x, w), expected): assert mx.array_equal(a, e)
    finally: glue.set_threads(before)


@pytest.mark.parametrize("count", [0, -1, 1025, 2**63, 1.0, None])
def test_wrong_numbers_of_threads(count):
    with pytest.raises((ValueError, TypeError)): glue.set_threads(count)


def test_streams_at_once():
    "Each thread has a stream; each stream gets its own results, with products in between."
    w = mx.random.normal((6, 2, 3, 3))
    inputs = [mx.random.normal((2, 4, 16, 16)) for _ in range(4)]
    with mx.stream(mx.cpu): expected = [s()(x, w) for x in inputs]
    mx.eval(w, inputs, expected)
    wrong = []

    def work(i):
        stream = mx.new_stream(mx.cpu)
        for _ in range(100):
            y = s()(inputs[i], w, stream=stream)
            flat = mx.reshape(y, (12, -1), stream=stream)
            mx.eval(mx.matmul(flat, mx.transpose(flat, stream=stream), stream=stream))
            if not np.array_equal(np.array(y), np.array(expected[i])): wrong.append(i)
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers: worker.start()
    for worker in workers: worker.join(timeout=120)
    assert not wrong and not any(worker.is_alive() for worker in workers)


SLOW = f"{RUN} {{ timespec t{{0, 700000000}}; nanosleep(&t, nullptr); return (void)g, (void)result, (void)threads, 0; }}"
IN_FLIGHT = """
import sys, time
import mlx.core as mx
from flashconv.kernels import build, pool, primitive
assert primitive.available()
mx.set_default_device(mx.cpu)
build.use(primitive._glue, sys.argv[1])
x, w, call = mx.ones((1, 1, 9)), mx.ones((1, 1, 3)), primitive.spec((1,), ((0, 0),), (1,))
"""


@pytest.fixture(scope="module")
def slow(compiled): return compiled("slow", SLOW)


def test_exit_while_work_is_in_flight(slow):
    "A process may leave at any time: it ends well, once its streams have, as MLX has it."
    code = IN_FLIGHT + "mx.async_eval([call(x + i, w) for i in range(4)])\nprint('leaving')"
    assert output(child(code, slow)) == "leaving\n"


def test_interrupt_while_work_is_in_flight(slow):
    "Ctrl-C is Python's own: it comes when the call ends, and what follows works."
    process = child(IN_FLIGHT + """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
print("ready", flush=True)
try:
    while True: mx.eval(call(x, w))
except KeyboardInterrupt:
    build.use(primitive._glue, primitive.info().files[1])
    print(call(x, w).tolist())
""", slow)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert output(process) == f"{[[[3.0] * 7]]}\n"


def test_signals_go_to_the_main_thread():
    "No thread of the pool takes a signal from Python."
    assert output(child("""
import os, signal, mlx.core as mx
from flashconv.kernels import primitive
assert primitive.available()
mx.set_default_device(mx.cpu)
before = set(os.listdir("/proc/self/task"))
primitive._glue.set_threads(5)
call = primitive.spec((1, 1), ((0, 0), (0, 0)), (1, 1))
mx.eval(call(mx.ones((8, 64, 32, 32)), mx.ones((64, 64, 3, 3))))
helpers = set(os.listdir("/proc/self/task")) - before
masks = [int(line.split()[1], 16) for helper in helpers for line in open(f"/proc/self/task/{helper}/status") if line.startswith("SigBlk")]
print(len(masks) >= 4, all(mask >> signal.SIGINT - 1 & 1 for mask in sorted(masks)[-4:]))
""")) == "True True\n"


def test_a_child_of_fork_can_leave():
    "MLX's own streams don't survive a fork; the glue doesn't add to that."
    assert output(child("""
import os, mlx.core as mx
from flashconv.kernels import primitive
assert primitive.available()
mx.set_default_device(mx.cpu)
call = primitive.spec((1, 1), ((0, 0), (0, 0)), (1, 1))
mx.eval(call(mx.ones((8, 64, 32, 32)), mx.ones((64, 64, 3, 3))))
if os.fork() == 0:
    call(mx.ones((1, 64, 9, 9)), mx.ones((64, 64, 3, 3)))
    os._exit(0)
print(os.wait()[1])
""")) == "0\n"


def test_nothing_leaks():
    "A thousand layers leave no arrays, and no memory, behind."
    def layers(count):
        for i in range(count):
            x, w, b = mx.ones((1, 4, 8, 8 + i % 5)), mx.ones((6, 2, 3, 3)), mx.ones(6)
            mx.eval(mx.grad(lambda *a: s(stride=[1, 1 + i % 2])(*a).sum(), (0, 1, 2))(x, w, b))
    def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    layers(300)
    active, before = mx.get_active_memory(), resident()
    layers(1000)
    assert mx.get_active_memory() == active
    assert resident() - before < 4 * 2**20


def test_another_blas_is_lent_the_threads_too():
    "The kernels' threads go to whichever library blas.use has put in place."
    assert output(child("""
import mlx.core as mx
from flashconv import blas
from flashconv.kernels import primitive
mx.set_default_device(mx.cpu)
assert primitive.available() and primitive.lend_threads in blas._followers
seen = []
blas._followers.append(seen.append)
blas.use("off")
assert seen == [blas._in_use()]
print("lent")
""")).strip() == "lent"


def test_libraries_share_nothing():
    "The linker may merge what two libraries both export, whatever their vectors are."
    exported = subprocess.run(["nm", "-D", "--defined-only", str(build.libraries()[1])], check=True,
                              capture_output=True, text=True).stdout
    assert re.findall(r"\S*flashconv\S*", exported) == ["flashconv_run"]


def test_no_kernel_includes_the_glues_headers():
    "A change of the glue must not compile the kernels anew: their key holds all that they include."
    def included(file):
        names = re.findall(r'#include "(.*)"', file.read_text(encoding="utf-8"))
        return {file}.union(*(included(build.SOURCES / name) for name in names))
    assert included(build.SOURCES / "kernels.cpp") == set(build.kernels().sources)


def test_openblas_works_on_the_pool():
    "Products and convolutions in turns, on several streams, with one set of threads."
    from flashconv import blas
    if "openblas" not in (blas._in_use() or ""): pytest.skip("MLX does not multiply with OpenBLAS here")
    assert primitive.lend_threads(blas._in_use())
    assert output(child("""
import mlx.core as mx, numpy as np, os, threading
from flashconv import blas
from flashconv.kernels import primitive
assert primitive.available()
mx.set_default_device(mx.cpu)
count = primitive._glue.threads()
w, call = mx.random.normal((32, 32, 3, 3)), primitive.spec((1, 1), ((1, 1), (1, 1)), (1, 1))
a = mx.random.normal((600, 600))
expected = np.array(a) @ np.array(a)
def work():
    stream = mx.new_stream(mx.cpu)
    for _ in range(10):
        y, p = call(mx.ones((4, 32, 20, 20)), w, stream=stream), mx.matmul(a, a, stream=stream)
        mx.eval(y, p)
        assert np.allclose(np.array(p), expected, atol=1e-3)
mx.eval(a, w)
workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print("done")
""", OPENBLAS_NUM_THREADS="2")) == "done\n"


# The pool -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, forks", [(["-O2"], 1), (["-O1", "-g", "-fsanitize=thread"], 0)], ids=["plain", "ThreadSanitizer"])
def test_pool(tmp_path, flags, forks):
    "Every job is done once, whoever calls at the same time, whatever the size; no race is seen."
    command = [*build.compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, f"-I{build.SOURCES}",
               ROOT / "tests/pool_check.cpp", "-o", tmp_path / "check", "-pthread"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "check", str(forks)], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr: pytest.skip("ThreadSanitizer can't run on this kernel")
    assert (done.returncode, done.stdout, done.stderr) == (0, "every job was done\n", "")


THREADS = "from flashconv.kernels.pool import threads\nprint(threads())"


def test_threads_follow_the_affinity():
    for allowed in range(1, len(os.sched_getaffinity(0)) + 1):
        chosen = sorted(os.sched_getaffinity(0))[:allowed]
        code = f"import os; os.sched_setaffinity(0, {chosen}); os.environ['FLASHCONV_THREADS'] = ''\n{THREADS}"
        assert int(output(child(code))) <= allowed


@pytest.mark.parametrize("files, expected", [
    ({}, float("inf")),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, float("inf")),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "300000 100000", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    ({"proc/self/cgroup": "0::/not/seen/here\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    ({"proc/self/cgroup": "0::/a:b c\n", "sys/fs/cgroup/a:b c/cpu.max": "50000 100000\n"}, 0.5),
    ({"proc/self/cgroup": "3:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "250000\n", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, 2.5),
    ({"proc/self/cgroup": "3:cpu:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}, float("inf")),
    ({"proc/self/cgroup": "7:memory:/x\n", "sys/fs/cgroup/memory/x/cpu.max": "1 100000\n"}, float("inf")),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "0 0\n"}, float("inf")),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "rubbish\n"}, float("inf")),
    ({"proc/self/cgroup": "rubbish\n"}, float("inf")),
    ({"proc/self/cgroup": b"\xff\xfe"}, float("inf")),
], ids=str)
def test_quota(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert pool.quota(tmp_path) == expected


@pytest.mark.parametrize("quota, expected", [(0.2, 1), (1.9, 1), (10**9, len(os.sched_getaffinity(0)))])
def test_threads_follow_the_quota(monkeypatch, quota, expected):
    monkeypatch.delenv("FLASHCONV_THREADS", raising=False)
    monkeypatch.setattr(pool, "quota", lambda: quota)
    assert pool.threads() == expected


@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "two", " ", "1025", "9" * 30])
def test_wrong_thread_counts(monkeypatch, asked):
    monkeypatch.setenv("FLASHCONV_THREADS", asked)
    with pytest.raises(ValueError, match="FLASHCONV_THREADS"): pool.threads()


def test_threads_as_asked():
    code = "from flashconv import kernels\nprint(kernels.available(), kernels.info().threads)"
    assert output(child(code, FLASHCONV_THREADS=3)) == "True 3\n"


# What is built, and where it is kept ------------------------------------------------------------------
# A stand-in for the compiler gives out the libraries that the real one has made, or fails as it is told.

COMPILER = """#!{python}
import os, shutil, sys, time
out = sys.argv[sys.argv.index("-o") + 1]
kind = "glue" if "glue" in os.path.basename(out) else "kernels"
with open({log!r}, "a") as log: log.write(kind + "\\n")
how = os.environ.get("HOW", "")
if how == "slow": time.sleep(1)
if how == "fail": sys.exit("glue.cpp:1: note: in what follows\\nglue.cpp:7: error: this compiler is in a bad mood\\nmore")
if how == "full": sys.exit("fatal error: when writing output: No space left on device")
shutil.copy({files}[kind], out)
if how == "half":
    with open(out, "r+b") as file: file.truncate(os.path.getsize(out) // 2)
if how == "empty": open(out, "w").close()
if how == "nothing": os.remove(out)
if how == "wrong" and kind == "kernels": shutil.copy(os.environ["WRONG"], out)
"""
USE = """
import sys, mlx.core as mx, flashconv
from flashconv import kernels
mx.set_default_device(mx.cpu)
here = kernels.available()
print(here, "conv" if flashconv.functional.conv1d(mx.ones((1, 1, 3)), mx.ones((1, 1, 3))).item() == 3 else "wrong")
"""


@pytest.fixture
def place(tmp_path):
    "A cache of its own and a compiler that logs its calls: variables for `child`."
    files = dict(zip(("glue", "kernels"), primitive.info().files))
    command, log = tmp_path / "compiler", tmp_path / "log"
    command.write_text(COMPILER.format(python=sys.executable, log=str(log), files=files), encoding="utf-8")
    command.chmod(0o755)
    log.touch()
    return dict(FLASHCONV_CACHE=tmp_path / "cache", CXX=command)


def calls(place): return sorted((place["CXX"].parent / "log").read_text().split())
def kept(place): return sorted(path.name.split("-")[0] for path in place["FLASHCONV_CACHE"].glob("*.so"))


def ends(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_built_once(place):
    "The first process says what it does in one line, the second does nothing."
    code, out, err = ends(child(USE, **place))
    assert (code, out) == (0, "True conv\n") and err.count("\n") == 1 and "about 10 s" in err
    assert calls(place) == kept(place) == ["glue", "kernels"]
    assert (place["FLASHCONV_CACHE"].stat().st_mode & 0o777) == 0o700
    assert output(child(USE, **place)) == "True conv\n"
    assert calls(place) == ["glue", "kernels"]
    assert sorted(path.name for path in place["FLASHCONV_CACHE"].iterdir() if path.suffix != ".so") == ["lock"]


def test_built_by_several_at_once(place):
    processes = [child(USE, HOW="slow", **place) for _ in range(4)]
    results = [ends(process) for process in processes]
    assert [(code, out) for code, out, _ in results] == [(0, "True conv\n")] * 4
    assert sum(bool(err) for _, _, err in results) == 1
    assert calls(place) == kept(place) == ["glue", "kernels"]


@pytest.mark.parametrize("how", ["fail", "full", "half", "empty", "nothing"])
def test_builds_that_fail(place, how):
    "One warning says why; nothing is kept; convolutions work; the next process tries again."
    code, out, err = ends(child(USE, HOW=how, **place))
    assert (code, out) == (0, "False conv\n")
    assert err.count("RuntimeWarning") == 1 and "python -m flashconv build" in err and "FLASHCONV_KERNELS=off" in err
    if how == "fail": assert "error: this compiler is in a bad mood" in err
    if how == "full": assert "No space left" in err
    assert kept(place) == [] and not list(place["FLASHCONV_CACHE"].glob("building-*"))
    assert ends(child(USE, **place))[:2] == (0, "True conv\n")


@pytest.mark.parametrize("name, body", [
    ("crash", f"{RUN} {{ (void)g, (void)threads; return *static_cast<volatile int*>(nullptr) = 1; }}"),
    ("zeros", f"{RUN} {{ (void)threads; for (int i = 0; i < g->output[2]; i++) static_cast<float*>(result)[i] = 0; return 0; }}"),
    ("other", "extern \"C\" int another_name() { return 0; }"),
])
def test_kernels_that_dont_work(place, compiled, name, body):
    "Tried in a process of their own: a crash there is a warning here."
    code, out, err = ends(child(USE, HOW="wrong", WRONG=compiled(name, body), **place))
    assert (code, out) == (0, "False conv\n") and "the new libraries don't work" in err and kept(place) == []


def test_a_killed_build(place):
    "Leaves no library, no lock, and what it leaves is removed later."
    process = child(USE, HOW="slow", **place)
    while not calls(place): time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the compilers too, or they write to what they left
    process.communicate()
    assert kept(place) == []
    left = list(place["FLASHCONV_CACHE"].glob("building-*"))
    assert left and ends(child(USE, **place))[:2] == (0, "True conv\n")
    assert kept(place) == ["glue", "kernels"] and left[0].exists()  # perhaps another process is still at it
    os.utime(left[0], (0, 0))
    for library in place["FLASHCONV_CACHE"].glob("*.so"): library.unlink()
    assert ends(child(USE, **place))[:2] == (0, "True conv\n") and not left[0].exists()


def test_a_lock_that_nobody_gives_back(place, monkeypatch):
    import fcntl
    place["FLASHCONV_CACHE"].mkdir(mode=0o700)
    monkeypatch.setattr(build, "_PATIENCE", 0.2)
    with open(place["FLASHCONV_CACHE"] / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        with build._turn(place["FLASHCONV_CACHE"]): waited = time.monotonic() - started
    assert 0.2 <= waited < 5


def a_link(path):
    (path.parent / "real").mkdir(mode=0o700)
    path.symlink_to("real")


def open_to_others(path):
    path.mkdir()
    path.chmod(0o770)


def someone_elses(path):
    if os.geteuid(): pytest.skip("only root can give folders away")
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


PLACES = {a_link: "is a link", open_to_others: "can be written by others", someone_elses: "belongs to another user",
          lambda path: path.write_text(""): "no folder"}


@pytest.mark.parametrize("make", PLACES)
def test_caches_that_are_not_to_be_trusted(place, make):
    make(place["FLASHCONV_CACHE"])
    code, out, err = ends(child(USE, **place))
    assert (code, out) == (0, "False conv\n") and PLACES[make] in err and "FLASHCONV_CACHE=FOLDER" in err
    assert calls(place) == []


@pytest.mark.parametrize("home", ["/proc", "/dev/null"])
def test_no_home_to_write_to(place, home):
    code, out, err = ends(child(USE, **place | dict(FLASHCONV_CACHE=None, XDG_CACHE_HOME=None, HOME=home)))
    assert (code, out) == (0, "False conv\n") and err.count("RuntimeWarning") == 1 and "FLASHCONV_CACHE=FOLDER" in err


def test_where_it_is_kept(monkeypatch, tmp_path):
    for name in ("FLASHCONV_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert build.cache_folder() == Path("/home/someone/.cache/flashconv")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert build.cache_folder() == Path("/home/someone/.cache/flashconv")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert build.cache_folder() == Path("/caches/flashconv")
    monkeypatch.setenv("FLASHCONV_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path


def test_no_home_at_all():
    "Of a user whom the system does not know."
    with pytest.raises(build.BuildError, match="no home directory.*FLASHCONV_CACHE=FOLDER"):
        build._trusted(Path("~/.cache/flashconv"))


@pytest.mark.parametrize("missing", ["compiler", "nanobind"])
def test_tools_that_are_missing(place, tmp_path, missing):
    "A warning says what to install; what was built before still works."
    (tmp_path / "empty").mkdir()
    without = dict(CXX=None, PATH=tmp_path / "empty") if missing == "compiler" else {}
    code = USE if missing == "compiler" else "import sys\nsys.modules['nanobind'] = None\n" + USE
    status, out, err = ends(child(code, **place | without))
    assert (status, out) == (0, "False conv\n")
    assert ("apt-get install g++" if missing == "compiler" else "pip install nanobind==3.1.0") in err
    ends(child(USE, **place))
    assert output(child(code, **place | without)) == "True conv\n"


def test_a_compiler_that_is_not_there(place):
    assert "CXX=/not/here is not there" in ends(child(USE, **place | dict(CXX="/not/here")))[2]


def test_off(place):
    assert output(child(USE, FLASHCONV_KERNELS="off", **place)) == "False conv\n"
    assert calls(place) == [] and not place["FLASHCONV_CACHE"].exists()


def test_required(place):
    code, _, err = ends(child(USE, FLASHCONV_KERNELS="require", HOW="fail", **place))
    assert code == 1 and "RuntimeError: FLASHCONV_KERNELS=require" in err and "bad mood" in err
    assert ends(child(USE, FLASHCONV_KERNELS="require", **place))[:2] == (0, "True conv\n")


def test_a_wish_that_is_none(place):
    code, _, err = ends(child(USE, FLASHCONV_KERNELS="yes", **place))
    assert code == 1 and "ValueError: FLASHCONV_KERNELS must be" in err and calls(place) == []


def test_import_builds_nothing(place):
    assert output(child("import sys, flashconv\nprint('flashconv_glue' in sys.modules, 'flashconv.kernels.build' in sys.modules)",
                        **place)) == "False False\n"
    assert not place["FLASHCONV_CACHE"].exists()


def test_the_command(place):
    code = "import runpy, sys; sys.argv = ['flashconv', 'build']; runpy.run_module('flashconv', run_name='__main__')"
    status, out, err = ends(child(code, **place))
    assert status == 0 and [line.rpartition(".")[2] for line in out.splitlines()[1:]] == ["so", "so"] and err.count("\n") == 1
    status, out, err = ends(child(code, HOW="fail", **place | dict(FLASHCONV_CACHE=place["CXX"].parent / "another")))
    assert status == 1 and not out and "can't build its kernels" in err and "bad mood" in err


def test_keys(monkeypatch, tmp_path):
    "Whatever a library depends on makes another file of it."
    def files(): return [build._file(library, tmp_path).name for library in (build.glue(), build.kernels())]
    before = glue_file, kernels_file = files()
    assert files() == before
    for target, name, value, changed in (
        (mx, "__version__", "9.9", [True, False]),
        (build, "processor", lambda: "another", [False, True]),
        (build, "machine", lambda: "another", [True, True]),
        (build, "_state", lambda path: "another", [True, True]),
        (build, "_nanobind", lambda: (Path("/"), "9.9"), [True, False]),
        (build.sysconfig, "get_config_var", lambda name: "cpython-99", [True, False]),
        (build, "SOURCES", None, [True, True]),
    ):
        if name == "SOURCES":
            value = tmp_path / "sources"
            value.mkdir()
            for source in build.SOURCES.iterdir(): (value / source.name).write_bytes(source.read_bytes() + b"\n")
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert [a != b for a, b in zip(files(), before)] == changed, name
    assert build._file(build.kernels("x86-64-v2"), tmp_path).name != kernels_file
    assert len({name.split("-")[0] for name in (glue_file, kernels_file)}) == 2


def test_cpp_is_as_the_notebooks_have_it():
    "Every source stands on a page, and is as it stands there."
    done = subprocess.run([sys.executable, ROOT / "tools/export_cpp.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_cpp_that_differs_is_seen(tmp_path):
    "A file that a page has otherwise, one that no page has, and a page whose file is missing."
    import importlib.util
    import nbformat
    tool_spec = importlib.util.spec_from_file_location("export_cpp", ROOT / "tools/export_cpp.py")
    tool = importlib.util.module_from_spec(tool_spec)
    tool_spec.loader.exec_module(tool)
    (tmp_path / "nbs/kernels").mkdir(parents=True)
    (tmp_path / tool.FOLDER).mkdir(parents=True)
    for page, cells in (("0.ipynb", ["Text:\n\n```cpp\n//| export a.h\nint a;\n```", "```cpp\nint shown;\n```"]),
                        ("1.ipynb", ["```cpp\n//| export b.h\nint b;\n```\n\n```cpp\n//| export a.h\nint c;\n```"])):
        cells = [nbformat.v4.new_markdown_cell(cell) for cell in cells]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs/kernels" / page)
    texts = tool.sources(tmp_path)
    head = "// AUTOGENERATED! DO NOT EDIT! File to edit: nbs/kernels/"
    a, b = tool.FOLDER / "a.h", tool.FOLDER / "b.h"
    assert texts == {a: head + "0.ipynb, nbs/kernels/1.ipynb\n\nint a;\n\nint c;\n", b: head + "1.ipynb\n\nint b;\n"}
    (tmp_path / a).write_text(texts[a])
    assert tool.stale(tmp_path) == [b]
    (tmp_path / b).write_text(texts[b])
    assert tool.stale(tmp_path) == []
    (tmp_path / a).write_text(texts[a] + "\n")
    (tmp_path / tool.FOLDER / "c.h").write_text("")
    assert tool.stale(tmp_path) == [a, tool.FOLDER / "c.h"]
    cell = nbformat.v4.new_markdown_cell("```cpp\n//| export steps/d.cpp\nint d;\n```")  # none of the package's
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "nbs/kernels/2.ipynb")
    assert tool.sources(tmp_path)[Path("steps/d.cpp")] == head + "2.ipynb\n\nint d;\n"
    assert Path("steps/d.cpp") in tool.stale(tmp_path)


def test_nanobind_fits_mlx():
    "The table, the requirement in settings.ini and the libraries themselves agree."
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    requirement, = (r for r in map(Requirement, config["DEFAULT"]["cpu_requirements"].split()) if r.name == "nanobind")
    assert all(requirement.specifier.contains(version) for versions in build.NANOBIND.values() for version in versions)
    assert not any(requirement.specifier.contains(version) for version in ("2.15.0", "3.0.0", "3.2.0", "4.0.0"))
    assert mx.__version__ in build.NANOBIND and build._nanobind()[1] in build.NANOBIND[mx.__version__]
    assert build._tag(mx.__file__) == build._tag(primitive.info().files[0]) is not None


def test_a_nanobind_of_another_tag(monkeypatch):
    monkeypatch.setattr(build, "_tag", lambda file: f"tag of {Path(file).name}")
    with pytest.raises(build.BuildError, match="does not fit MLX.*pip install nanobind==3.1.0"):
        build._smoke(*primitive.info().files)


COMPILERS = [name for name in ("g++", "g++-11", "g++-12", "g++-13", "g++-14", "clang++") if build.shutil.which(name)]


@pytest.mark.parametrize("command", COMPILERS)
def test_the_glue_compiles_without_warnings(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    library = build.glue()
    flags = [flag for flag in library.flags + library.places if flag[:2] in ("-s", "-f", "-D", "-i")
             and flag != "-shared"]
    done = subprocess.run([*build.compiler(), *flags, build._HIDDEN, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", library.sources[0]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("channels, outputs, groups", ((1, 1, 1), (5, 1, 1), (5, 16, 1), (4, 8, 4), (24, 24, 24)))
def test_one_place_has_the_bits_that_it_has_in_a_row(channels, outputs, groups, last):
    "Blocks of one sum round as often as others: GCC would take two instructions for a product and its addition."
    run = spec((1,), ((0, 0),), (1,), groups, last)
    x = mx.random.normal((2, channels, 35), key=mx.random.key(0))
    w = mx.random.normal((outputs, channels // groups, 3), key=mx.random.key(1))
    def convolved(x): return mx.moveaxis(run(mx.moveaxis(x, 1, -1), w), -1, 1) if last else run(x, w)
    whole = convolved(x)
    for place in range(33): assert mx.array_equal(convolved(x[..., place : place + 3]), whole[..., place : place + 1])
