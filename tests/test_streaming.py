"""Chunked equals whole: over layers, random cuts, formats and dtypes; what is refused."""
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from hypothesis import given, settings, strategies as st

import flashconv as fc
from flashconv import kernels, streaming

DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.float64, mx.complex64)


def pieces(step, x, state, lengths, last=False):
    "The outputs of chunks of these lengths, joined; the states on the way."
    outputs, states, start = [], [state], 0
    axis = -2 if last else -1
    for length in lengths:
        at = slice(start, start + length)
        y, state = step(x[..., at, :] if last else x[..., at], state)
        outputs.append(y)
        states.append(state)
        start += length
    assert start == x.shape[axis]
    return mx.concatenate(outputs, axis), states


def same(y, whole):
    "To the last bit in kernels. MLX's operations may add in another order for each length."
    if kernels.available(): return mx.array_equal(y, whole).item()
    return y.shape == whole.shape and mx.allclose(y, whole, rtol=1e-5, atol=1e-5).item()


def cuts(rng, length):
    "A random way to cut, empty chunks among it."
    at = sorted(rng.integers(0, length + 1, rng.integers(0, 6)).tolist())
    return np.diff([0, *at, length]).tolist()


def made(transposed, k, s, d, g, padding="causal", **kw):
    cls = fc.ConvTranspose1d if transposed else fc.Conv1d
    return cls(4, 8, k, s, padding, dilation=d, groups=g, **kw)


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("transposed", (False, True))
def test_every_layer(transposed, last):
    "Whatever the kernel, stride, dilation and groups."
    rng, kw = np.random.default_rng(0), {"data_format": "channels_last" if last else "channels_first"}
    for k, s, d, g in product((1, 2, 3, 7), (1, 2, 3, 5), (1, 3), (1, 2, 4)):
        layer = made(transposed, k, s, d, g, **kw)
        x = mx.random.normal((2, 23, 4) if last else (2, 4, 23))
        lengths = cuts(rng, 23)
        y, states = pieces(layer.step, x, layer.initial_state(2), lengths, last)
        whole = layer(x)
        assert same(y, whole), f"{layer} {lengths}"
        sizes = [state.shape[-2 if last else -1] for state in states]
        reach = d * (k - 1)
        assert max(sizes) <= (reach // s if transposed else max(reach, s - 1))


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("channels, outputs, groups", ((8, 8, 8), (8, 1, 1), (256, 64, 1)))
def test_layers_with_loops_of_their_own(channels, outputs, groups, transposed):
    "Depthwise, a single output, many channels: short chunks may be rounded otherwise."
    cls = fc.ConvTranspose1d if transposed else fc.Conv1d
    layer = cls(channels, outputs, 6, 2, "causal", groups=groups)
    x = mx.random.normal((1, channels, 60))
    y, _ = pieces(layer.step, x, layer.initial_state(), (1, 7, 32, 20))
    bound = 64 * 2**-23 * mx.abs(x).max() * mx.abs(layer.weight).sum() / outputs
    assert y.shape == layer(x).shape and (mx.abs(y - layer(x)).max() <= bound).item()


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 3), st.integers(0, 25), st.booleans(),
       st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_pairs_and_any_cut(k, s, d, before, transposed, lengths):
    "Zeros before the input, fewer or more than the kernel reaches."
    span = d * (k - 1) + 1
    if transposed and span < s: return
    layer = made(transposed, k, s, d, 2, ((0, span - s),) if transposed else ((before, 0),))
    x = mx.random.normal((1, 4, sum(lengths)))
    y, _ = pieces(layer.step, x, layer.initial_state(), lengths)
    if not sum(lengths): return
    if not transposed and sum(lengths) + before < span:
        assert y.shape == (1, 8, 0)
        return
    assert same(y, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
def test_dtypes(transposed, dtype):
    "Within rounding, also by MLX's operations."
    with oracle.where(dtype):
        layer = made(transposed, 5, 2, 2, 2, dtype=dtype)
        x = oracle.draw(np.random.default_rng(0), (2, 4, 20), dtype)
        y, _ = pieces(layer.step, x, layer.initial_state(2), (3, 8, 1, 8))
        assert y.dtype == dtype and y.shape == layer(x).shape
        error = mx.abs(y - layer(x)).astype(mx.float32).max().item()
    assert error <= 16 * oracle.EPS[dtype]


@pytest.mark.parametrize("transposed", (False, True))
def test_without_kernels(transposed, without_kernels):
    layer, x = made(transposed, 5, 2, 2, 2), mx.random.normal((2, 4, 20))
    y, _ = pieces(layer.step, x, layer.initial_state(2), (3, 8, 1, 8))
    assert mx.allclose(y, layer(x), atol=1e-5).item()


@pytest.mark.parametrize("transposed", (False, True))
def test_compiled_unbatched_and_normed(transposed):
    "Under mx.compile, without a batch, with weight norm, and with gradients through the state."
    layer, x = fc.weight_norm(made(transposed, 5, 2, 1, 1)), mx.random.normal((4, 20))
    y, _ = pieces(mx.compile(layer.step), x, layer.initial_state(None), (3, 8, 1, 8))
    assert mx.allclose(y, layer(x), atol=1e-5).item()
    def chunked(x): return mx.square(pieces(layer.step, x, layer.initial_state(None), (3, 17))[0]).sum()
    def whole(x): return mx.square(layer(x)).sum()
    assert mx.allclose(mx.grad(chunked)(x), mx.grad(whole)(x), atol=1e-4).item()


class Residual(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        self.layers = [fc.Conv1d(8, 4, 3, padding="causal", dilation=dilation), fc.Conv1d(4, 8, 1)]

    def __call__(self, x): return x + self.layers[1](nn.relu(self.layers[0](nn.relu(x))))


def codec():
    return nn.Sequential(
        fc.Conv1d(1, 8, 7, padding="causal"), Residual(2), nn.ReLU(), fc.Conv1d(8, 8, 6, 3, ((3, 0),)),
        nn.ReLU(), fc.ConvTranspose1d(8, 8, 6, 3, "causal"), Residual(1), fc.Conv1d(8, 2, 3, padding="causal"))


def test_models():
    "One state for all layers, random cuts, compiled too; no state is changed by a step."
    model, rng, x = codec(), np.random.default_rng(1), mx.random.normal((2, 1, 60))
    whole = model(x)
    def step(chunk, state): return streaming.step(model, chunk, state)
    for _ in range(5):
        y, states = pieces(step, x, streaming.initial_state(model, 2), cuts(rng, 60))
        assert same(y, whole)
        first, again = states[0], streaming.initial_state(model, 2)
        assert all(mx.array_equal(first[path], again[path]).item() for path in first)
    y, _ = pieces(mx.compile(step), x, streaming.initial_state(model, 2), [15] * 4)
    assert mx.allclose(y, whole, atol=1e-5).item()
    assert mx.array_equal(model(x), whole).item()  # calls outside of a step are as before


def test_memory_is_fixed():
    model, state = codec(), streaming.initial_state(codec())
    sizes = set()
    for _ in range(20):
        y, state = streaming.step(model, mx.zeros((1, 1, 6)), state)
        sizes.add(sum(array.size for array in state.values()))
    assert len(sizes) == 1


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fc.Conv1d(1, 1, 3, padding="causal")

    def __call__(self, x): return self.layer(self.layer(x))


class Doubled(fc.Conv1d):
    def _conv_forward(self, x, w, b): return super()._conv_forward(x, 2 * w, b)


LAYER = fc.Conv1d(2, 4, 5, 2, "causal")
REFUSED = {
    "a later input": (lambda: fc.Conv1d(2, 2, 3, padding="same").initial_state(1), ValueError, "1 later"),
    "another end": (lambda: fc.ConvTranspose1d(2, 2, 4, 2).initial_state(1), ValueError, "whole strides"),
    "a mode": (lambda: fc.Conv1d(2, 2, 3, padding="causal", padding_mode="reflect").initial_state(1),
               ValueError, "make it zeros"),
    "a lazy layer": (lambda: fc.LazyConv1d(2, 3, padding="causal").initial_state(1), ValueError, "materialize"),
    "a layer of one's own": (lambda: Doubled(2, 2, 3, padding="causal").initial_state(1), ValueError,
                             "replaces _conv_forward"),
    "a batch": (lambda: LAYER.initial_state(-1), ValueError, "batch must not be negative"),
    "no number": (lambda: LAYER.initial_state("1"), TypeError, "batch"),
    "another layer's": (lambda: LAYER.step(mx.zeros((1, 2, 8)), fc.Conv1d(2, 4, 9, padding="causal")
                        .initial_state(1)), ValueError, "3 to 4 samples"),
    "another batch": (lambda: LAYER.step(mx.zeros((2, 2, 8)), LAYER.initial_state(1)), ValueError, "state"),
    "another dtype": (lambda: LAYER.step(mx.zeros((1, 2, 8)), LAYER.initial_state(1).astype(mx.float16)),
                      RuntimeError, "the state differs"),
    "a chunk's dtype": (lambda: LAYER.step(mx.zeros((1, 2, 8), mx.float16), LAYER.initial_state(1)),
                        RuntimeError, "the input differs"),
    "a rank": (lambda: LAYER.step(mx.zeros((1, 1, 2, 8)), LAYER.initial_state(1)), RuntimeError, "Expected 2D"),
    "channels": (lambda: LAYER.step(mx.zeros((1, 3, 8)), LAYER.initial_state(1)), RuntimeError, "2 channels"),
    "no array": (lambda: LAYER.step(mx.zeros((1, 2, 8)), None), TypeError, "state"),
    "no chunk": (lambda: LAYER.step([1.0], LAYER.initial_state(1)), TypeError, "input"),
    "2d": (lambda: streaming.initial_state(nn.Sequential(fc.Conv2d(1, 1, 1))), ValueError, "layers.0"),
    "mlx.nn's": (lambda: streaming.initial_state(nn.Sequential(nn.Conv1d(1, 1, 1))), ValueError, "upgrade"),
    "a norm over time": (lambda: streaming.initial_state(nn.Sequential(nn.GroupNorm(1, 2))), ValueError,
                         "more than one sample"),
    "no model": (lambda: streaming.initial_state(3), TypeError, "mlx.nn.Module"),
    "no state": (lambda: streaming.step(codec(), mx.zeros((1, 1, 8)), {}), ValueError, "a state for the layers"),
    "twice": (lambda: streaming.step(Twice(), mx.zeros((1, 1, 8)), streaming.initial_state(Twice())),
              RuntimeError, "called twice"),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message): call()
    assert LAYER(mx.zeros((1, 2, 8))).shape == (1, 4, 4)  # nothing of a step is left behind
