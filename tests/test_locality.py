"""A number touches the sums that it is in, and nothing else: whatever runs by default, on a CPU.

Hypothesis draws layers and arrays. PyTorch in float64, which sums directly, says what is right and,
given arrays of zeros and ones, how many products of an output hold a number. `IMPLEMENTATIONS`
lists what is held to it; anything else that may run by default belongs there.

One freedom is left. An infinite weight times the zeros of the padding is NaN in some kernels of
PyTorch, and left out by others, and so is an infinite cotangent. Either will do, where a
convolution pads or a transposed one crops. Between strides, and around what a gradient or a
transposed layer spreads out, no zero is ever multiplied, up to as many taps as an implementation
is listed with: beyond, an infinite weight may spoil the borders.
"""
from contextlib import ExitStack, contextmanager, nullcontext
from math import inf
from typing import NamedTuple
from unittest.mock import patch

import flashconv.functional as F
import mlx.core as mx
import numpy as np
import pytest
from flashconv import kernels
from flashconv.algorithms import choice, matmul, native, overlap, taps, tiles, weights
from flashconv.algorithms.record import as_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

oracle = pytest.importorskip("oracle")
torch = oracle.torch


@contextmanager
def without_kernels():
    "What is chosen on a GPU, and on a CPU without a compiler."
    were_on = kernels.available()
    kernels.use(False)
    try: yield
    finally:
        if were_on: kernels.use(True)


@contextmanager
def as_for_large_arrays():
    "What is chosen where the work of a step is all that counts, in parts of some kilobytes."
    with without_kernels(), ExitStack() as stack:
        stack.enter_context(patch.object(tiles, "WHOLE", 2**16))
        for module in (tiles, weights, overlap):
            stack.enter_context(patch.object(module, "tile_bytes", lambda g: 2**13))
        for module in (matmul, native, taps):
            stack.enter_context(patch.object(module, "A_STEP", 0))
        choice._rule.cache_clear()
        try: yield
        finally: choice._rule.cache_clear()


IMPLEMENTATIONS = {"kernels": (nullcontext, inf),
                   "without kernels": (without_kernels, inf),
                   "as for large arrays": (as_for_large_arrays, inf),
                   "Metal's rule": (lambda: as_on("metal"), 0),
                   "CUDA's rule": (lambda: as_on("cuda"), 0)}


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def most_taps(request):
    "What is held to PyTorch, and up to which kernels its borders are."
    context, taps = IMPLEMENTATIONS[request.param]
    if request.param == "kernels" and not kernels.available(): pytest.skip(str(kernels.info()))
    with mx.stream(mx.cpu), context(): yield taps


# Layers ----------------------------------------------------------------------------------------

class Layer(NamedTuple):
    "A convolution of any kind, and the input that it is given."
    transposed: bool
    last: bool  # channels last
    dtype: mx.Dtype
    batch: int
    channels: tuple  # per group, of input and output
    groups: int
    size: tuple
    kernel: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    extra: tuple  # output_padding

    @property
    def shapes(self):
        "Of input and weight, as PyTorch has them."
        inner, outer = self.channels
        first, second = (inner, outer) if self.transposed else (outer, inner)
        return ((self.batch, inner * self.groups, *self.size),
                (first * self.groups, second, *self.kernel))

    @property
    def out(self):
        "The output's size, per axis."
        return tuple(full + extra - 2 * p if self.transposed else (full - 1) // s + 1
                     for full, s, p, extra in zip(self.full, self.stride, self.padding, self.extra))

    @property
    def full(self):
        "The places per axis for a kernel inside the padded input, or those that stamps reach."
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        return tuple((i - 1) * s + span if self.transposed else i + 2 * p - span + 1
                     for i, s, span, p in zip(self.size, self.stride, spans, self.padding))

    @property
    def y_shape(self): return (self.batch, self.channels[1] * self.groups, *self.out)

    @property
    def terms(self):
        "The most products in a sum, of the output or a gradient."
        per_image = np.prod(self.kernel) * max(self.channels)
        return max(per_image, self.batch * max(np.prod(self.size), np.prod(self.out)))


LIMITS = {1: (70, 40), 2: (14, 9), 3: (7, 4)}  # sizes and kernels by number of axes

@st.composite
def layers(draw):
    "Any that has outputs and less than some hundred thousand products."
    n = draw(st.integers(1, 3))
    def each(low, high): return draw(st.tuples(*[st.integers(low, high)] * n))
    size, kernel = (each(1, limit) for limit in LIMITS[n])
    transposed, groups = draw(st.booleans()), draw(st.sampled_from((1, 1, 2, 5)))
    channels = draw(st.sampled_from(((1, 1), (1, 2), (3, 1), (2, 3), (12, 16))))
    stride, dilation, padding = each(1, 4), each(1, 3), each(0, 4)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    layer = Layer(transposed, draw(st.booleans()),
                  draw(st.sampled_from((mx.float32, mx.float16, mx.bfloat16))),
                  draw(st.integers(1, 3)), channels, groups, size, kernel, stride, padding,
                  dilation, extra if transposed else (0,) * n)
    if min(layer.out) < 1:  # as little padding as it takes to have an output
        shorter = tuple((k - 1) // 2 if not transposed else 0 for k in layer.kernel)
        fewer = tuple(min(k, s + 2 * p) for k, s, p in zip(kernel, size, shorter))
        layer = layer._replace(padding=shorter, kernel=fewer, dilation=(1,) * n,
                               extra=tuple(min(e, s - 1) for e, s in zip(layer.extra, stride)))
    return layer


def ours(layer, x, w, c):
    "The output and both gradients for a cotangent, of arrays and as arrays in PyTorch's layout."
    name = f"conv{'_transpose' * layer.transposed}{len(layer.size)}d"
    kw = {"output_padding": layer.extra} if layer.transposed else {}
    kw |= {"data_format": "channels_last"} if layer.last else {}
    of, to = (1, -1) if layer.last else (1, 1)

    def run(x, w):
        y = getattr(F, name)(mx.moveaxis(x, of, to), w, stride=layer.stride, padding=layer.padding,
                             dilation=layer.dilation, groups=layer.groups, **kw)
        return [mx.moveaxis(y, to, of)]

    (y,), (dx, dw) = mx.vjp(run, [to_mlx(x, layer), to_mlx(w, layer)], [to_mlx(c, layer)])
    return [np.array(a.astype(mx.float32)) for a in (y, dx, dw)]


def to_mlx(a, layer): return mx.array(a.astype(np.float32)).astype(layer.dtype)


def rounded(a, layer):
    "As a number of the layer's dtype, whose value NumPy can hold."
    with np.errstate(over="ignore"): return np.array(to_mlx(a, layer).astype(mx.float32))


def judged(layer, x, w, c):
    "The same as `ours`, by PyTorch in float64."
    x, w, c = (torch.from_numpy(a.astype(np.float64)) for a in (x, w, c))
    x.requires_grad_(), w.requires_grad_()
    kw = {"output_padding": layer.extra} if layer.transposed else {}
    f = getattr(torch.nn.functional, f"conv{'_transpose' * layer.transposed}{len(layer.size)}d")
    y = f(x, w, stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
          groups=layer.groups, **kw)
    return [a.detach().numpy() for a in (y, *torch.autograd.grad(y, (x, w), c))]


def common(channels, size, kernel, groups=1, stride=1, padding=0, transposed=False):
    "One layer in both layouts, large enough for what small ones don't take."
    n = len(size)
    return [Layer(transposed, last, mx.float32, 1, channels, groups, size, kernel, (stride,) * n,
                  (padding,) * n, (1,) * n, (0,) * n) for last in (False, True)]


COMMON = [
    *common((32, 32), (24, 24), (3, 3), padding=1), *common((32, 48), (30, 30), (1, 1)),
    *common((1, 1), (24, 24), (3, 3), groups=32, padding=1), *common((8, 8), (3, 33, 9), (3, 3, 3)),
    *common((1, 1), (900,), (101,), padding=50), *common((1, 1), (40, 40), (13, 13), padding=6),
    *common((1, 1), (600,), (300,), groups=2), *common((1, 3), (1200,), (257,), stride=4),
    *common((2, 2), (50,), (300,), stride=3, transposed=True),
    *common((8, 4), (9, 9), (4, 4), stride=2, padding=1, transposed=True)]


def any_layer(): return st.one_of(layers(), layers(), st.sampled_from(COMMON))


# Who sees what ---------------------------------------------------------------------------------

def seen(layer, marked):
    "How many products with a marked number of x, w or c there are in each sum."
    (x, w, c), ones = (a.astype(float) for a in marked), [np.ones(a.shape) for a in marked]
    by_w, by_x, by_c = (judged(layer, *arrays) for arrays in (
        (x, ones[1], c), (ones[0], w, c), (x, w, ones[2])))
    return by_w[0] + by_x[0], by_w[1] + by_c[1], by_x[2] + by_c[2]


def met_in_padding(layer, marked, most_taps):
    "How many there may be besides, whose other factor is a zero of the padding."
    y, dx, dw = met_in_its_padding(layer, marked)
    if np.prod(layer.kernel) <= most_taps: return y, dx, dw
    beyond = met_beyond(layer, marked[1].astype(float))
    return (beyond, dx, dw) if layer.transposed else (y, beyond, dw)


def met_beyond(layer, w):
    "With a marked weight, around the input of a transposed layer, or the output of another."
    margins = [-(-(d * (k - 1) + 1) // s)
               for d, k, s in zip(layer.dilation, layer.kernel, layer.stride)]
    wide = layer._replace(padding=tuple(
        p + s * m for p, s, m in zip(layer.padding, layer.stride, margins)))
    if layer.transposed:
        wide = wide._replace(size=tuple(i + 2 * m for i, m in zip(layer.size, margins)))
        shape, inside = wide.shapes[0], layer.size
    else: shape, inside = wide.y_shape, layer.out
    around = _put(np.ones(shape), (..., *(slice(m, m + n) for m, n in zip(margins, inside))), 0)
    arrays = (around, w, np.ones(layer.y_shape)) if layer.transposed else (
        np.ones(layer.shapes[0]), w, around)
    return judged(wide, *arrays)[0 if layer.transposed else 1]


def met_in_its_padding(layer, marked):
    "Those in what a convolution pads, or a transposed one crops."
    wide = layer._replace(padding=(0,) * len(layer.size))
    x, w, c = (a.astype(float) for a in marked)
    if layer.transposed:
        at = (..., *(slice(p, p + o) for p, o in zip(layer.padding, layer.out)))
        reach = [max(p + o, n) for p, o, n in zip(layer.padding, layer.out, wide.out)]
        outside = _put(np.ones((*layer.y_shape[:2], *reach)), at, 0)[(..., *map(slice, wide.out))]
        _, dx, dw = judged(wide, x, w, outside)
        return np.zeros(layer.y_shape), dx, dw
    amounts = [(0, 0)] * 2 + [(p, p) for p in layer.padding]
    outside = 1 - np.pad(np.ones(x.shape), amounts)
    wide = wide._replace(size=outside.shape[2:])
    y, _, dw = judged(wide, outside, w, c)
    return y, np.zeros(x.shape), dw


def _put(a, at, values):
    a = a.copy()
    a[at] = values
    return a


# What holds -------------------------------------------------------------------------------------

NAMES = "output", "input gradient", "weight gradient"
THOROUGH = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
numbers = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def whole(layer, rng):
    "Whole numbers, some of them 0, whose sums are exact in float32."
    return [rng.integers(-4, 5, shape).astype(float) for shape in (*layer.shapes, layer.y_shape)]


def mark(rng, arrays, most=2):
    "Up to so many places in some of the arrays, at least one."
    marked = [np.zeros(a.shape, bool) for a in arrays]
    for i in rng.choice(3, rng.integers(1, 4), replace=False):
        for _ in range(rng.integers(1, most + 1)):
            marked[i][tuple(rng.integers(n) for n in marked[i].shape)] = True
    return marked


@THOROUGH
@given(any_layer(), numbers)
def test_whole_numbers_are_exact(layer, rng):
    "And rounded once to 16 bits; so zeros give zero."
    arrays = whole(layer, rng)
    for name, mine, right in zip(NAMES, ours(layer, *arrays), judged(layer, *arrays)):
        assert np.array_equal(mine, rounded(right, layer)), name


@THOROUGH
@given(any_layer(), numbers)
def test_what_is_not_finite_stays_where_it_is_seen(most_taps, layer, rng):
    "There it gives what IEEE says; all else is what it was without."
    clean = whole(layer, rng)
    marked = mark(rng, clean)
    arrays = [np.where(m, rng.choice((np.nan, np.inf, -np.inf), m.shape), a)
              for m, a in zip(marked, clean)]
    with np.errstate(invalid="ignore"): by_ieee = judged(layer, *arrays)
    without = judged(layer, *(np.where(m, 0, a) for m, a in zip(marked, clean)))
    for name, mine, right, finite, hits, padded in zip(
            NAMES, ours(layer, *arrays), by_ieee, without, seen(layer, marked),
            met_in_padding(layer, marked, most_taps)):
        known = padded == 0
        expected = rounded(np.where(hits > 0, right, finite), layer)
        assert np.array_equal(mine[known], expected[known], equal_nan=True), name
        free = ~known & (hits == 0)
        assert (np.isnan(mine[free]) | (mine[free] == rounded(finite, layer)[free])).all(), name
        assert not np.isfinite(mine[~known & (hits > 0)]).any(), name


@THOROUGH
@given(any_layer(), numbers)
def test_the_past_does_not_know_the_future(layer, rng):
    "What doesn't see a number that changes keeps every bit."
    arrays = [rng.standard_normal(shape) for shape in (*layer.shapes, layer.y_shape)]
    marked = mark(rng, arrays)
    other = [np.where(m, 1e4 * a, a) for m, a in zip(marked, arrays)]
    for name, before, after, hits in zip(
            NAMES, ours(layer, *arrays), ours(layer, *other), seen(layer, marked)):
        before, after = (a[hits == 0].view(np.int32) for a in (before, after))
        assert np.array_equal(before, after), name


@THOROUGH
@given(any_layer(), numbers, st.booleans())
def test_each_sum_rounds_by_its_own_terms(layer, rng, positive):
    "Of numbers that span ten decades, up to where they overflow; what has no negative term isn't."
    top = 30 if layer.dtype != mx.float16 else 3
    scale = 10.0 ** top / layer.terms
    arrays = []
    for shape in (*layer.shapes, layer.y_shape):
        a = rng.standard_normal(shape) * 10 ** rng.uniform(-10 if top > 3 else -3, 0, shape)
        arrays.append(rounded((np.abs(a) if positive else a) * scale**0.5 / 4, layer).astype(float))
    exact, bounds = judged(layer, *arrays), judged(layer, *map(np.abs, arrays))
    for name, mine, right, bound in zip(NAMES, ours(layer, *arrays), exact, bounds):
        tiny = oracle.TINY.get(layer.dtype, 1e-37)
        once = (0 if layer.dtype == mx.float32 else oracle.EPS[layer.dtype]) * np.abs(right)
        assert (np.abs(mine - right) <= once + 64 * 2.0**-23 * bound + tiny).all(), name
        assert not positive or mine.min() >= 0, name
