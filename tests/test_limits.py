"""Large inputs and what they may cost, sizes beyond 32 bits, values that are not numbers, leaks.

What needs more than a few seconds or two gigabytes is marked `large`: `make limits` runs it.
"""
import gc
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import flashconv as fc
import flashconv.functional as F
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flashconv.algorithms import choice, derivatives
from flashconv.geometry import conv_geometry

pytestmark = pytest.mark.usefixtures("without_kernels")  # MLX doesn't count what those hold

MIB = 2**20


@pytest.fixture(autouse=True)
def on_cpu():
    "What is chosen on a CPU, and what it takes there."
    with mx.stream(mx.cpu): yield


def beyond(call, *arrays):
    "The result of a call, and the bytes it took at most beside its arrays and the result."
    mx.eval(arrays)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = call(*arrays)
    mx.eval(result)
    size = sum(a.nbytes for a in (result if isinstance(result, (tuple, list)) else [result]))
    return result, mx.get_peak_memory() - before - size


def resident():
    "Bytes of the process in memory; None where the system does not say."
    status = Path("/proc/self/status")
    if not status.exists(): return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines()
                if line.startswith("VmRSS"))


def ones(*shape, dtype=mx.float32): return mx.broadcast_to(mx.array(1, dtype), shape)


# Beyond 32 bits ------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, weight, kw", (
    ((1, 1, 2**17, 2**15), (1, 1, 3, 3), {"stride": 4096}),
    ((1, 2, 2**31 - 1), (1, 2, 3), {"stride": 2**20, "dilation": 2**29}),
    ((2**16, 1, 2**17), (1, 1, 3), {"stride": 2**17 - 3}),
    ((2**8, 2**8, 2**17), (2**8, 1, 3), {"stride": 2**17 - 3, "groups": 2**8}),
    ((1, 2**20, 64, 64), (1, 2**20, 1, 1), {"stride": 32}),
    ((1, 2**16, 2**15, 3), (1, 3, 3, 3), {"stride": 4096, "data_format": "channels_last"})),
    ids=str)
def test_inputs_of_more_than_32_bits(shape, weight, kw):
    "Up to 2**33 values, of which there is one in memory: each output counts the taps."
    y = getattr(F, f"conv{len(shape) - 2}d")(ones(*shape), ones(*weight), **kw)
    assert mx.all(y == np.prod(weight[1:])), y


@pytest.mark.parametrize("call, size", (
    (lambda: F.conv1d(ones(1, 1, 2**31 - 1), ones(1, 1, 3), padding=2**30), 2**32 - 1),
    (lambda: F.conv_transpose1d(ones(1, 1, 2**20), ones(1, 1, 3), stride=2**12), 2**32 + 3),
    (lambda: F.pad(ones(1, 1, 2**31 - 10), (5, 9), mode="circular"), 2**31 + 4),
    (lambda: fc.Conv2d(2**31, 2**16, 3), 2**31)))
def test_axes_of_more_than_31_bits(call, size):
    "An error that names the size, before anything is computed."
    with pytest.raises(RuntimeError, match="beyond what MLX can index") as caught: call()
    assert str(size) in str(caught.value)


def test_numbers_of_more_than_32_bits():
    "Strides and dilations that reach past the input don't matter."
    x, w = mx.arange(5.0).reshape(1, 1, 5), mx.ones((1, 1, 3))
    assert F.conv1d(x, w, stride=2**40).tolist() == [[[3]]]
    assert F.conv1d(x, w[..., :1], dilation=2**40).tolist() == x.tolist()
    assert F.conv_transpose1d(x[..., 1:2], w, stride=2**40).tolist() == [[[1, 1, 1]]]


@pytest.mark.large
@pytest.mark.parametrize("kernel", ((1, 1), (3, 1)))
def test_outputs_of_more_than_31_bits(kernel):
    "2 GB of int8."
    x, w = ones(1, 1, 2**16 + 2, 2**15, dtype=mx.int8), ones(1, 1, *kernel, dtype=mx.int8)
    y = F.conv2d(x, w)
    assert y.size >= 2**31 and mx.all(y == kernel[0])


# Values --------------------------------------------------------------------------------------

LAYERS = (
    ("conv1d", (2, 4, 40), (6, 4, 3), {"padding": 1}),
    ("conv1d", (2, 4, 40), (6, 4, 3), {"padding": 1, "stride": 2, "dilation": 2}),
    ("conv2d", (2, 4, 16, 16), (6, 4, 3, 3), {"padding": 1}),
    ("conv2d", (1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    ("conv2d", (2, 4, 16, 16), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    ("conv2d", (2, 4, 16, 16), (6, 4, 1, 1), {}),
    ("conv2d", (2, 4, 5, 5), (6, 4, 5, 5), {}),
    ("conv3d", (1, 2, 6, 6, 6), (3, 2, 3, 3, 3), {"padding": 1}),
    ("conv_transpose1d", (2, 4, 20), (4, 6, 3), {"stride": 2}),
    ("conv_transpose2d", (2, 4, 9, 9), (4, 6, 4, 4), {"stride": 2, "padding": 1}),
    ("conv_transpose2d", (2, 4, 9, 9), (4, 6, 3, 3), {"padding": 1}),
    ("conv_transpose2d", (2, 4, 9, 9), (4, 6, 3, 3), {"stride": 3, "dilation": 2}))


def kinds(y):
    "0 for a number, 1 and 2 for the infinities, 3 for what is not a number."
    y = np.array(y)
    return np.select([np.isnan(y), y == np.inf, y == -np.inf], [3, 1, 2], 0)


@pytest.mark.parametrize("values", ([np.nan], [np.inf], [np.inf, -np.inf]), ids=str)
@pytest.mark.parametrize("name, shape, weight, kw", LAYERS)
def test_inf_and_nan_of_the_input(torch, name, shape, weight, kw, values):
    "They spread to where they do in PyTorch, and as what they do there, by every algorithm but FFT."
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=size).astype(np.float32) for size in (shape, weight))
    for value, part in zip(values, (2, 3)): x[tuple(n // part for n in shape)] = value
    right = getattr(torch.nn.functional, name)(torch.tensor(x), torch.tensor(w), **kw)
    f, ran = getattr(F, name), 0
    assert (kinds(f(mx.array(x), mx.array(w), **kw)) == kinds(right)).all(), "the choice"
    for forced in set(choice.ALGORITHMS) - {"fft"}:
        with fc.algorithm(forced):
            try: y = f(mx.array(x), mx.array(w), **kw)
            except ValueError: continue
        assert (kinds(y) == kinds(right)).all(), forced
        ran += 1
    assert ran >= 3


@pytest.mark.parametrize("name, shape, weight, kw", LAYERS)
def test_inf_of_the_weight(torch, name, shape, weight, kw):
    """NaN where an infinite tap meets padding, as for an input that was padded before.

    PyTorch's depthwise and transposed kernels leave padding out; what isn't finite there isn't here.
    """
    rng, f, judge = np.random.default_rng(0), getattr(F, name), torch.nn.functional
    x, w = (rng.normal(size=size).astype(np.float32) for size in (shape, weight))
    w[(0, 0, *(n // 2 for n in weight[2:]))] = np.inf
    right = getattr(judge, name)(torch.tensor(x), torch.tensor(w), **kw)
    padded = None
    if "transpose" not in name:
        p = kw.get("padding", 0)
        zeros = judge.pad(torch.tensor(x), (p, p) * (x.ndim - 2))
        padded = getattr(judge, name)(zeros, torch.tensor(w), **{**kw, "padding": 0})
    for forced in (None, *choice.ALGORITHMS):
        with fc.algorithm(forced) if forced else nullcontext():
            try: y = f(mx.array(x), mx.array(w), **kw)
            except ValueError: continue
        assert not (np.isfinite(np.array(y)) & ~np.isfinite(right.numpy())).any(), forced
        if padded is not None and forced != "fft": assert (kinds(y) == kinds(padded)).all(), forced


def test_nan_under_a_long_kernel():
    "By default what sees it is lost, as in PyTorch; FFT, where it is allowed, loses a block."
    x, w = np.ones((1, 1, 1000), np.float32), mx.ones((1, 1, 64))
    x[..., 500] = np.nan
    lost = np.isnan(F.conv1d(mx.array(x), w)).nonzero()[2]
    assert lost.tolist() == list(range(437, 501))
    with fc.algorithm("fft"): more = np.isnan(F.conv1d(mx.array(x), w)).nonzero()[2]
    assert set(lost) < set(more.tolist()) and len(more) < 4 * 64


@pytest.mark.parametrize("forced", ("native", "matmul", "taps"))
@pytest.mark.parametrize("x, w", ((1e-40, 1.0), (1e-20, 1e-20)))
def test_denormals(torch, forced, x, w):
    "Kept or flushed to zero as PyTorch does in this process."
    right = torch.nn.functional.conv1d(torch.full((1, 1, 8), x), torch.full((1, 1, 3), w))
    with fc.algorithm(forced): y = F.conv1d(mx.full((1, 1, 8), x), mx.full((1, 1, 3), w))
    assert np.allclose(np.array(y) / 1e-40, right.numpy() / 1e-40, rtol=1e-4)


# Many calls ----------------------------------------------------------------------------------

def test_a_thousand_calls_leak_nothing():
    "Forward and gradients, eager and compiled, a layer and its transpose."
    layer, back = fc.Conv2d(3, 8, 3, padding=1), fc.ConvTranspose2d(8, 3, 4, stride=2)
    x, fast = mx.random.normal((2, 3, 16, 16)), mx.compile(lambda x: layer(x))
    step = nn.value_and_grad(layer, lambda x: back(layer(x)).sum())

    def run(times):
        for _ in range(times): mx.eval(step(x), fast(x))
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory(), resident()

    run(200)
    (active, size), (active_after, size_after) = run(1), run(1000)
    assert active_after <= active
    if size: assert size_after - size < 16 * MIB


def test_what_is_kept_for_shapes_is_bounded():
    "Ten thousand shapes leave no more behind than the caches hold."
    kept = (conv_geometry, choice._rule, derivatives._with_rules,
            derivatives._with_rules_for_weights)
    layer = fc.Conv1d(1, 1, 3)
    for n in range(5000): layer(mx.zeros((1, 1, 3 + n)))
    for cache in kept:
        info = cache.cache_info()
        assert info.currsize <= info.maxsize == 4096, cache
        cache.cache_clear()


@pytest.mark.large
def test_ten_thousand_shapes():
    "Once the caches are full, no object and no array is added."
    layer = fc.Conv2d(3, 8, 3)
    step, counts = nn.value_and_grad(layer, lambda x: layer(x).sum()), []
    for n in range(12_000):
        mx.eval(step(mx.zeros((1, 3, 5 + n // 120, 5 + n % 120))))
        if n % 3000 == 2999:
            gc.collect()
            counts.append((len(gc.get_objects()), mx.get_active_memory()))
    assert counts[-1][0] < counts[-2][0] + 1000 and counts[-1][1] <= counts[0][1], counts


def test_a_thousand_layers_in_a_row():
    "Forward and gradients in one graph."
    model = nn.Sequential(*[fc.Conv1d(2, 2, 3, padding=1, bias=False) for _ in range(1000)])
    for layer in model.layers: layer.weight = mx.eye(2)[..., None] * mx.array([0.0, 1.0, 0.0])
    x = mx.random.normal((1, 2, 8))
    value, gradients = nn.value_and_grad(model, lambda x: model(x).sum())(x)
    assert mx.allclose(value, x.sum(), atol=1e-5)
    first = gradients["layers"][0]["weight"]
    assert mx.allclose(first[:, :, 1], mx.broadcast_to(x.sum((0, 2)), (2, 2)), atol=1e-4)


# Memory --------------------------------------------------------------------------------------

LONG = 100_000_000

def expected(x, w, at, stride=1, dilation=1, padding=0, groups=1, **kw):
    "One output place of a convolution over one axis, for all channels."
    k = w.shape[2]
    places = at * stride - padding + dilation * np.arange(k)
    seen = np.where((0 <= places) & (places < x.shape[2]), x[0][:, places % x.shape[2]], 0)
    return np.einsum("gck,gock->go", seen.reshape(groups, -1, k).astype(float),
                     w.reshape(groups, -1, *w.shape[1:])).ravel()


@pytest.mark.large
@pytest.mark.parametrize("shape, weight, kw", (
    ((1, 1, LONG), (1, 1, 3), {}),
    ((1, 1, LONG), (1, 1, 31), {"padding": 15}),
    ((1, 1, LONG), (1, 1, 1000), {}),
    ((1, 1, LONG), (1, 1, 16), {"stride": 16}),
    ((1, 1, LONG), (8, 1, 64), {"stride": 64}),
    ((1, 1, LONG), (1, 1, 400), {"stride": 160}),
    ((1, 1, LONG), (1, 1, 3), {"dilation": 10**6}),
    ((1, 4, LONG // 4), (4, 1, 5), {"groups": 4}),
    ((1, 4, LONG // 4), (4, 4, 5), {})), ids=str)
def test_a_hundred_million_samples(shape, weight, kw):
    """Right at both ends and between; besides input and output 128 MiB, and the output's parts.

    FFT is allowed: a thousand taps would take a minute.
    """
    x, w = mx.random.uniform(-1, 1, shape), mx.random.uniform(-1, 1, weight)
    with fc.allow_fft(): y, workspace = beyond(lambda x, w: F.conv1d(x, w, **kw), x, w)
    assert workspace <= y.nbytes + 128 * MIB
    x, w, last = np.array(x), np.array(w), y.shape[2] - 1
    for at in (0, 1, last // 3, last // 2 + 1, last):
        assert np.allclose(y[0, :, at], expected(x, w, at, **kw), atol=1e-4), at


@pytest.mark.large
@pytest.mark.parametrize("size, kernel, stride", ((LONG // 4, 8, 4), (LONG // 400, 800, 400)))
def test_a_hundred_million_samples_from_a_transposed_layer(size, kernel, stride):
    "Two stamps on each of them; besides input and output 64 MiB."
    x, w = mx.random.uniform(-1, 1, (1, 1, size)), mx.random.uniform(-1, 1, (1, 1, kernel))
    y, workspace = beyond(lambda x, w: F.conv_transpose1d(x, w, stride=stride), x, w)
    assert y.shape[2] == size * stride + kernel - stride and workspace <= 64 * MIB
    a, b = w[0, 0, :stride], w[0, 0, stride:]
    for at in (1, size // 2, size - 1):
        run = y[0, 0, at * stride : (at + 1) * stride]
        assert mx.allclose(run, x[0, 0, at] * a + x[0, 0, at - 1] * b, atol=1e-5), at


@pytest.mark.large
@pytest.mark.parametrize("name, shape, weight, kw, room", (
    ("conv2d", (1, 3, 4096, 4096), (1, 3, 3, 3), {}, 32),
    ("conv2d", (1, 3, 4096, 4096), (3, 1, 3, 3), {"groups": 3}, 96),
    ("conv2d", (1, 3, 4096, 4096), (16, 3, 7, 7), {"stride": 2, "padding": 3}, 64),
    ("conv2d", (1, 3, 4096, 4096), (16, 3, 16, 16), {"stride": 16}, 32),
    ("conv2d", (1, 1, 4096, 4096), (1, 1, 31, 31), {}, 48),
    ("conv2d", (1, 1, 4096, 4096), (1, 1, 3, 3), {"dilation": 100}, 96),
    ("conv2d", (1, 1, 4096, 4096), (1, 1, 4096, 4096), {}, 1),
    ("conv2d", (1, 1, 2048, 2048), (1, 1, 2048, 2048), {"padding": "same"}, 192),
    ("conv2d", (1, 4096, 4096, 3), (8, 3, 3, 3), {"data_format": "channels_last"}, 32),
    ("conv_transpose2d", (1, 8, 2048, 2048), (8, 1, 4, 4), {"stride": 2}, 32),
    ("conv_transpose2d", (1, 8, 1024, 1024), (8, 8, 2, 2), {"stride": 2}, 16),
    ("conv1d", (1, 1, 10**7), (1, 1, 10**7), {}, 1),
    ("conv1d", (1, 1, 10**6), (1, 1, 10**6), {"padding": "same"}, 32)))
def test_memory_for_large_pictures(name, shape, weight, kw, room):
    "Besides the arrays and the parts of the output, as many MiB as are listed; FFT is allowed."
    x, w = mx.random.uniform(-1, 1, shape), mx.random.uniform(-1, 1, weight)
    with fc.allow_fft(): y, workspace = beyond(lambda x, w: getattr(F, name)(x, w, **kw), x, w)
    assert workspace <= y.nbytes + room * MIB


LARGER = [pytest.param(*row, marks=pytest.mark.large) for row in (
    ("conv2d", (1, 64, 512, 512), (64, 64, 3, 3), {"padding": 1}),
    ("conv2d", (1, 512, 512, 64), (64, 64, 3, 3), {"padding": 1, "data_format": "channels_last"}),
    ("conv2d", (1, 3, 2048, 2048), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    ("conv2d", (1, 64, 1024, 1024), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    ("conv2d", (1, 8, 1024, 1024), (8, 8, 3, 3), {"padding": 2, "dilation": 2}),
    ("conv2d", (1, 1, 4096, 4096), (1, 1, 31, 31), {}),
    ("conv2d", (8, 16, 112, 112), (16, 16, 21, 21), {"padding": 10}),
    ("conv1d", (1, 1, 10**7), (1, 1, 1000), {}),
    ("conv3d", (1, 16, 32, 112, 112), (32, 16, 3, 3, 3), {"padding": 1}),
    ("conv_transpose2d", (1, 64, 1024, 1024), (64, 32, 4, 4), {"stride": 2, "padding": 1}),
    ("conv_transpose3d", (1, 64, 16, 64, 64), (64, 32, 4, 4, 4), {"stride": 2, "padding": 1}))]

@pytest.mark.parametrize("name, shape, weight, kw", (
    ("conv2d", (1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    ("conv2d", (8, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    ("conv2d", (8, 3, 224, 224), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
    ("conv2d", (8, 256, 56, 56), (64, 256, 1, 1), {}),
    ("conv2d", (8, 56, 56, 256), (64, 256, 1, 1), {"data_format": "channels_last"}),
    ("conv2d", (8, 128, 56, 56), (128, 4, 3, 3), {"padding": 1, "groups": 32}),
    ("conv1d", (8, 64, 16000), (64, 64, 3), {"padding": 4, "dilation": 4}),
    ("conv1d", (8, 64, 4096), (64, 1, 512), {"groups": 64}),
    ("conv_transpose2d", (1, 64, 256, 256), (64, 32, 4, 4), {"stride": 2, "padding": 1}),
    ("conv_transpose2d", (8, 512, 16, 16), (512, 256, 4, 4), {"stride": 2, "padding": 1}),
    *LARGER), ids=str)
def test_the_workspace_that_explain_states(name, shape, weight, kw):
    "Measured, forward and for both gradients: at most half as much again as it states."
    f, x, w = partial(getattr(F, name), **kw), mx.random.normal(shape), mx.random.normal(weight)
    stated = {run.part: run.workspace for run in fc.explain(partial(f, weight=w), shape)}
    y = f(x, w)
    c = mx.random.normal(y.shape)
    mx.eval(y)
    del y
    taken = {
        "forward": beyond(f, x, w)[1],
        "input gradient": beyond(lambda x, c: mx.vjp(lambda x: f(x, w), [x], [c])[1][0], x, c)[1],
        "weight gradient": beyond(lambda w, c: mx.vjp(lambda w: f(x, w), [w], [c])[1][0], w, c)[1]}
    for part, size in taken.items(): assert size <= 1.5 * stated[part] + MIB, part


@pytest.mark.parametrize("size", (10**6, pytest.param(10**7, marks=pytest.mark.large)))
def test_a_kernel_as_long_as_the_input(size):
    "One output, with gradients that are the other array."
    x, w = (mx.random.uniform(-1, 1, (1, 1, size)) for _ in range(2))
    y, (dx, dw) = mx.value_and_grad(lambda x, w: F.conv1d(x, w).sum(), (0, 1))(x, w)
    assert mx.allclose(y, (x * w).sum(), rtol=1e-3, atol=0.1)
    assert mx.allclose(dx, w, atol=1e-4) and mx.allclose(dw, x, atol=1e-4)


@pytest.mark.large
@pytest.mark.parametrize("shape, weight, kw", (
    ((1, 1, 4096, 4096), (1, 1, 7, 7), {"padding": 3}),
    ((4, 8, 1024, 1024), (8, 8, 3, 3), {"padding": 1}),
    ((1, 8, 1024, 1024), (8, 8, 3, 3), {"padding": 2, "dilation": 2}),
    ((1, 16, 1024, 1024), (16, 1, 5, 5), {"padding": 2, "groups": 16}),
    ((1, 2048, 2048, 8), (8, 8, 3, 3), {"padding": 1, "data_format": "channels_last"})))
def test_weight_gradients_of_large_pictures(shape, weight, kw):
    "The gradient of each tap is a sum over the picture, in parts; channels last, of copies."
    last = "data_format" in kw
    x, w = mx.random.uniform(-1, 1, shape), mx.random.uniform(-1, 1, weight)
    y = F.conv2d(x, w, **kw)
    c = mx.random.uniform(-1, 1, y.shape)
    mx.eval(y)
    del y
    dw, workspace = beyond(lambda x, c: mx.vjp(lambda w: F.conv2d(x, w, **kw), [w], [c])[1][0], x, c)
    assert workspace <= 64 * MIB + last * (x.nbytes + c.nbytes)
    x, c = (np.array(a).astype(float) for a in (x, c))
    if last: x, c = np.moveaxis(x, -1, 1), np.moveaxis(c, -1, 1)
    p, d, size = kw["padding"], kw.get("dilation", 1), x.shape[2]
    x = np.pad(x[:, :1], ((0, 0), (0, 0), (p, p), (p, p)))
    for i, j in ((0, 0), (1, 2), (weight[2] - 1, 0)):
        seen = x[:, 0, i * d : i * d + size, j * d : j * d + size]
        assert np.allclose(dw[0, 0, i, j].item(), (seen * c[:, 0]).sum(), rtol=1e-3, atol=0.5)
