"""A number touches the sums that it is in, and nothing else: whatever runs by default, on a CPU.

Hypothesis draws layers and arrays. PyTorch in float64, which sums directly, says what is right and,
given arrays of zeros and ones, how many products of an output hold a number. `IMPLEMENTATIONS`
lists what is held to it; anything else that may run by default belongs there.

One freedom is left. An infinite weight times the zeros of the padding is NaN in some kernels of
PyTorch, and left out by others, and so is an infinite cotangent. Either will do, where a convolution pads
(or a transposed one crops). Between strides, and around a cotangent, no zero is ever multiplied.
"""
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import flashconv.functional as F
import mlx.core as mx
import numpy as np
import pytest
from flashconv.algorithms import choice, mec, overlap, places, tiles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

oracle = pytest.importorskip("oracle")
torch = oracle.torch


@contextmanager
def as_for_large_arrays():
    "What is chosen where the work of a step is all that counts, in parts of a kilobyte."
    with ExitStack() as stack:
        for module in (tiles, places, mec): stack.enter_context(patch.object(module, "WHOLE", 4096))
        for module in (tiles, places, overlap):
            stack.enter_context(patch.object(module, "tile_bytes", lambda g: 1024))
        for name in ("_FEW_PRODUCTS", "_STEPS"): stack.enter_context(patch.object(choice, name, 0))
        choice._rule.cache_clear()
        try: yield
        finally: choice._rule.cache_clear()


IMPLEMENTATIONS = {"as chosen": nullcontext, "as for large arrays": as_for_large_arrays}


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def implementation(request):
    "What is held to PyTorch."
    with mx.stream(mx.cpu), IMPLEMENTATIONS[request.param](): yield


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
    channels = draw(st.sampled_from(((1, 1), (1, 2), (3, 1), (2, 3), (6, 5))))
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


# Who sees what ---------------------------------------------------------------------------------

def seen(layer, marked):
    "How many products with a marked number of x, w or c there are in each sum."
    (x, w, c), ones = (a.astype(float) for a in marked), [np.ones(a.shape) for a in marked]
    by_w, by_x, by_c = (judged(layer, *arrays) for arrays in (
        (x, ones[1], c), (ones[0], w, c), (x, w, ones[2])))
    return by_w[0] + by_x[0], by_w[1] + by_c[1], by_x[2] + by_c[2]


def met_in_padding(layer, marked):
    "How many there are besides whose other factor is a zero of the padding."
    n, wide = len(layer.size), layer._replace(padding=(0,) * len(layer.size))
    zero = [np.zeros(a.shape) for a in marked]
    (x, w, c) = (a.astype(float) for a in marked)
    if layer.transposed:
        room = np.zeros((*layer.y_shape[:2], *wide.out))
        at = (..., *(slice(p, p + o) for p, o in zip(layer.padding, layer.out)))
        room = np.pad(room, [(0, 0)] * 2 + [(0, max(p + o - size, 0)) for p, o, size in zip(
            layer.padding, layer.out, wide.out)])
        outside = 1 - _put(room, at, np.ones(c.shape))
        outside = outside[(..., *map(slice, wide.out))]
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
THOROUGH = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[
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
@given(layers(), numbers)
def test_whole_numbers_are_exact(layer, rng):
    "And rounded once to 16 bits; so zeros give zero."
    arrays = whole(layer, rng)
    for name, mine, right in zip(NAMES, ours(layer, *arrays), judged(layer, *arrays)):
        assert np.array_equal(mine, rounded(right, layer)), name


@THOROUGH
@given(layers(), numbers)
def test_what_is_not_finite_stays_where_it_is_seen(layer, rng):
    "There it gives what IEEE says; all else is what it was without."
    clean = whole(layer, rng)
    marked = mark(rng, clean)
    arrays = [np.where(m, rng.choice((np.nan, np.inf, -np.inf), m.shape), a)
              for m, a in zip(marked, clean)]
    with np.errstate(invalid="ignore"): by_ieee = judged(layer, *arrays)
    without = judged(layer, *(np.where(m, 0, a) for m, a in zip(marked, clean)))
    for name, mine, right, finite, hits, padded in zip(
            NAMES, ours(layer, *arrays), by_ieee, without, seen(layer, marked),
            met_in_padding(layer, marked)):
        known = padded == 0
        expected = rounded(np.where(hits > 0, right, finite), layer)
        assert np.array_equal(mine[known], expected[known], equal_nan=True), name
        free = ~known & (hits == 0)
        assert (np.isnan(mine[free]) | (mine[free] == rounded(finite, layer)[free])).all(), name
        assert not np.isfinite(mine[~known & (hits > 0)]).any(), name


@THOROUGH
@given(layers(), numbers)
def test_the_past_does_not_know_the_future(layer, rng):
    "What doesn't see a number that changes keeps every bit."
    arrays = [rng.standard_normal(shape) for shape in (*layer.shapes, layer.y_shape)]
    marked = mark(rng, arrays)
    other = [np.where(m, 1e4 * a, a) for m, a in zip(marked, arrays)]
    for name, before, after, hits in zip(
            NAMES, ours(layer, *arrays), ours(layer, *other), seen(layer, marked)):
        assert np.array_equal(before[hits == 0].view(np.int32), after[hits == 0].view(np.int32)), name


@THOROUGH
@given(layers(), numbers, st.booleans())
def test_each_sum_rounds_by_its_own_terms(layer, rng, positive):
    "Of numbers that span ten decades, up to where they overflow; what has no negative term isn't."
    top = 30 if layer.dtype != mx.float16 else 3
    scale = 10.0 ** top / layer.terms
    arrays = []
    for shape in (*layer.shapes, layer.y_shape):
        a = rng.standard_normal(shape) * 10 ** rng.uniform(-10 if top > 3 else -3, 0, shape)
        arrays.append(rounded((np.abs(a) if positive else a) * scale**0.5 / 4, layer).astype(float))
    bounds = judged(layer, *map(np.abs, arrays))
    for name, mine, right, bound in zip(NAMES, ours(layer, *arrays), judged(layer, *arrays), bounds):
        tiny = oracle.TINY.get(layer.dtype, 1e-37)
        once = (0 if layer.dtype == mx.float32 else oracle.EPS[layer.dtype]) * np.abs(right)
        assert (np.abs(mine - right) <= once + 64 * 2.0**-23 * bound + tiny).all(), name
        assert not positive or mine.min() >= 0, name
