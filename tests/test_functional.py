"""The six functions against PyTorch: every argument alone, and every pair of arguments."""
from itertools import combinations, product

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch

import flashconv.functional as F
from flashconv.algorithms.choice import ALGORITHMS, algorithm

NAMES = [f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)]
SHARED = {
    "kernel_size": (1, 2, 3, (3, 1, 2)),
    "stride": (1, 2, 3, (3, 1, 2), (2,)),
    "dilation": (1, 2, 3, (1, 3, 2)),
    "groups": (1, 2, 3),
    "bias": (True, False),
    "batch": (2, None, 0, 1),
    "data_format": ("channels_first", "channels_last"),
    "dtype": (mx.float32, mx.float16, mx.bfloat16, mx.float64, mx.complex64),
}
VALUES = {
    "conv": SHARED | {"padding": (0, 1, 4, (2, 0, 1), "same", "valid")},
    "conv_transpose": SHARED | {"padding": (0, 1, 4, (2, 0, 1)),
                                "output_padding": (0, 1, (0, 2, 1))},
}
BASE = {"kernel_size": (3, 2, 2), "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
        "bias": True, "batch": 2, "data_format": "channels_first", "dtype": mx.float32,
        "output_padding": 0}
SIZES = (8, 7, 7)  # of the input; long enough that most pairs are legal
CALL = ("stride", "padding", "dilation", "groups", "output_padding")


def axes(value, n): return value[:n] if isinstance(value, tuple) else (value,) * n


def is_legal(name, options):
    "Whether PyTorch takes the options at all; those it refuses are for test_errors.py."
    arrays, _, theirs = build(name, options | {"batch": 1, "dtype": mx.float32})
    try: theirs(*map(oracle.to_torch, arrays))
    except RuntimeError: return False
    return True


def cases():
    "Cases `(name, options)` for all values of each argument and of each pair, without repetition."
    for name in NAMES:
        values, seen = VALUES[name[:-2]], set()
        for pair in combinations(values, 2):
            for chosen in product(*(values[argument] for argument in pair)):
                options = BASE | dict(zip(pair, chosen))
                if str(options) in seen or not is_legal(name, options): continue
                seen.add(str(options))
                text = "-".join(f"{k}={str(v).rpartition('.')[2]}" for k, v in zip(pair, chosen))
                yield pytest.param(name, options, id=f"{name}-{text}".replace(" ", ""))


def build(name, o):
    "Arrays, and our and PyTorch's function of them, for options; channels first on the outside."
    n, g, rng = int(name[-2]), o["groups"], np.random.default_rng(0)
    kernel, transposed = axes(o["kernel_size"], n), "transpose" in name
    channels, out = 2 * g, 3 * g
    first, second = (channels, out) if transposed else (out, channels)
    batch = () if o["batch"] is None else (o["batch"],)
    arrays = [oracle.draw(rng, (*batch, channels, *SIZES[:n]), o["dtype"]),
              oracle.draw(rng, (first, second // g, *kernel), o["dtype"]),
              oracle.draw(rng, (out,), o["dtype"]) if o["bias"] else None]
    kw = {k: o[k] if isinstance(o[k], (int, str)) else o[k][:n] for k in CALL}
    if not transposed: del kw["output_padding"]
    return arrays, in_format(getattr(F, name), o["data_format"], len(batch), kw), (
        lambda *a: getattr(torch.nn.functional, name)(*a, **kw))


def in_format(f, data_format, channels_axis, kw):
    "`f` on channels-first arrays, whichever format it works in."
    if data_format == "channels_first": return lambda *a: f(*a, **kw)
    def wrapped(x, *rest):
        y = f(mx.moveaxis(x, channels_axis, -1), *rest, data_format=data_format, **kw)
        return mx.moveaxis(y, -1, channels_axis)
    return wrapped


CASES = list(cases())


def test_the_grid_is_not_small():
    "Few combinations are refused, so what the next test proves is not little."
    assert len(CASES) > 1800


@pytest.mark.parametrize("name, options", CASES)
def test_pairs(name, options):
    "Output and all gradients, for one value each of two arguments."
    arrays, ours, theirs = build(name, options)
    oracle.check(ours, theirs, arrays)


JUDGED = {"fft": oracle.assert_within_norm}

@pytest.mark.parametrize("forced", ALGORITHMS)
@pytest.mark.parametrize("name, options", CASES)
def test_each_algorithm(name, options, forced):
    "The same with an algorithm forced, for which another device or shape might be the place."
    arrays, ours, theirs = build(name, options)
    with algorithm(forced):
        try: ours(*arrays)
        except ValueError as error:
            assert f"{forced!r} is not defined for this call; possible: " in str(error)
            return
        oracle.check(ours, theirs, arrays, assertion=JUDGED.get(forced, oracle.assert_within_rounding))


SUBSET = [{}, {"stride": (2, 1, 3), "padding": 1}, {"dilation": 2, "groups": 2},
          {"padding": (2, 0, 1), "data_format": "channels_last", "bias": False},
          {"stride": 3, "groups": 3, "batch": None}, {"kernel_size": 1, "stride": 2, "padding": 1}]


@pytest.mark.parametrize("options", SUBSET, ids=str)
@pytest.mark.parametrize("dtype", oracle.INTEGERS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_integers_are_exact(name, dtype, options):
    "Any integers, wrapping around as the dtype does; int64 is the judge, the only one complete."
    arrays, ours, theirs = build(name, BASE | options | {"dtype": dtype})
    judged = theirs(*(a if a is None else oracle.to_torch(a).to(torch.int64) for a in arrays))
    oracle.assert_equal(ours(*arrays), judged.to(getattr(torch, str(dtype).rpartition(".")[2])))


LONG = [  # thousands of terms in the sum of an output, or of a weight's gradient
    ("conv1d", (1, 3000, 8), (2, 3000, 3), {}),
    ("conv1d", (8, 2, 4000), (4, 2, 1), {}),
    ("conv2d", (4, 4, 32, 32), (4, 4, 30, 30), {"padding": 2}),
    ("conv2d", (4, 8, 32, 32), (8, 2, 3, 3), {"groups": 4, "stride": 2, "padding": 1}),
    ("conv3d", (2, 256, 8, 8, 8), (2, 128, 2, 2, 3), {"groups": 2}),
    ("conv3d", (2, 32, 8, 16, 16), (32, 1, 1, 2, 2), {"groups": 32}),
    ("conv_transpose1d", (1, 3000, 8), (3000, 2, 3), {"stride": 2}),
    ("conv_transpose2d", (8, 8, 16, 16), (8, 8, 3, 3), {"stride": 2, "dilation": 2}),
    ("conv_transpose3d", (2, 512, 4, 4, 4), (512, 2, 2, 1, 2), {"groups": 2}),
]


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("name, shape, weight_shape, kw", LONG, ids=str)
def test_half_precision_is_accumulated_in_float32(
        name, shape, weight_shape, kw, dtype, data_format):
    "Long sums in half precision carry one rounding, in the output and in both gradients."
    rng = np.random.default_rng(0)
    arrays = [oracle.draw(rng, shape, dtype), oracle.draw(rng, weight_shape, dtype)]
    oracle.check(in_format(getattr(F, name), data_format, 1, kw),
                 lambda *a: getattr(torch.nn.functional, name)(*a, **kw), arrays,
                 assertion=oracle.assert_rounded_once)


MANY = {1: (30_011,), 2: (173, 179), 3: (31, 32, 33)}  # places, and a prime number among them


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_half_precision_gradient_of_a_bias(name, dtype, data_format):
    "The sum over all places carries one rounding, too."
    n, rng = int(name[-2]), np.random.default_rng(0)
    w_shape = (1, 3, *(1,) * n) if "transpose" in name else (3, 1, *(1,) * n)
    x, w, b = (mx.zeros(shape, dtype) for shape in ((2, 1, *MANY[n]), w_shape, (3,)))
    f = in_format(getattr(F, name), data_format, 1, {})
    c = oracle.draw(rng, (2, 3, *MANY[n]), dtype)
    gradient = mx.vjp(lambda b: f(x, w, b), [b], [c])[1][0]
    t, places = oracle.to_torch(c), (0, *range(2, n + 2))
    oracle.assert_rounded_once(gradient, t.sum(places), t.abs().sum(places), dtype)


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("name, shape, weight_shape", [
    ("conv1d", (1, 1, 2**20), (2, 1, 1)), ("conv1d", (1, 2**18, 3), (2, 2**18, 3)),
    ("conv2d", (2, 2, 512, 513), (2, 2, 3, 3)), ("conv2d", (64, 1, 64, 64), (1, 1, 60, 60)),
    ("conv3d", (1, 1, 64, 64, 65), (1, 1, 1, 2, 1)), ("conv_transpose1d", (1, 1, 2**20), (1, 2, 1)),
    ("conv_transpose1d", (1, 2**18, 3), (2**18, 2, 3)),
    ("conv_transpose2d", (2, 2, 512, 513), (2, 2, 3, 3)),
    ("conv_transpose3d", (1, 1, 64, 64, 65), (1, 1, 1, 2, 1)),
], ids=str)
def test_long_sums_do_not_drift(name, shape, weight_shape, data_format):
    "Up to a million float32 numbers of one sign, in outputs and in all gradients."
    rng = np.random.default_rng(0)
    out = weight_shape[1] if "transpose" in name else weight_shape[0]
    arrays = [mx.array(rng.uniform(0.5, 1, s).astype(np.float32))
              for s in (shape, weight_shape, (out,))]
    ours = in_format(getattr(F, name), data_format, 1, {})
    oracle.check(ours, getattr(torch.nn.functional, name), arrays, assertion=oracle.assert_no_drift,
                 positive=True)


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_have_pytorchs_order(name):
    "All arguments by position mean what they mean in PyTorch."
    rng, n = np.random.default_rng(0), int(name[-2])
    x, w, b = (oracle.draw(rng, s) for s in ((2, 6, *SIZES[:n]), (6, 3, *(3, 2, 2)[:n]), (6,)))
    rest = (3, 1, 2, 2, 1) if "transpose" in name else (3, 1, 1, 2)
    oracle.check(lambda *a: getattr(F, name)(*a, *rest),
                 lambda *a: getattr(torch.nn.functional, name)(*a, *rest), [x, w, b])


VIEWS = {
    "transposed": lambda a: a.T.reshape(a.T.shape).T,
    "every other": lambda a: mx.repeat(a, 2, -1)[..., ::2],
    "backwards": lambda a: a[..., ::-1],
    "broadcast": lambda a: mx.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", NAMES)
def test_strided_views(name, view):
    "Inputs, weights and biases that are views with strides of their own."
    rng, n = np.random.default_rng(0), int(name[-2])
    arrays = [VIEWS[view](oracle.draw(rng, shape))
              for shape in ((2, 4, *SIZES[:n]), (4, 4, *(3, 2, 2)[:n]), (4,))]
    oracle.check(getattr(F, name), getattr(torch.nn.functional, name), arrays)


@pytest.mark.parametrize("name, shape, weight_shape, kw", [
    ("conv1d", (1, 1, 5), (1, 1, 9), {"padding": "same"}),
    ("conv2d", (1, 2, 2, 3), (2, 2, 8, 5), {"padding": "same", "dilation": 3}),
    ("conv3d", (1, 2, 1, 1, 1), (2, 2, 4, 3, 2), {"padding": "same"}),
    ("conv1d", (1, 1, 4), (1, 1, 2), {"stride": 2**40}),
    ("conv2d", (1, 1, 4, 4), (1, 1, 1, 1), {"dilation": 2**40}),
    ("conv1d", (1, 2, 1), (3, 2, 1), {}),
    ("conv_transpose1d", (1, 1, 4), (1, 1, 1), {"stride": 2, "padding": 1}),
    ("conv_transpose1d", (1, 5, 2), (5, 3, 3), {"stride": 2, "output_padding": 1}),
    ("conv_transpose2d", (1, 2, 1, 1), (2, 3, 4, 4), {"stride": 2**20}),
    ("conv_transpose2d", (1, 2, 3, 3), (2, 3, 1, 1), {"dilation": 4, "output_padding": 3}),
    ("conv_transpose3d", (1, 2, 3, 3, 3), (2, 3, 2, 2, 2),
     {"padding": 2, "stride": 3, "output_padding": 2}),
    ("conv2d", (1, 0, 4, 4), (3, 0, 2, 2), {}),
    ("conv1d", (1, 2, 320), (2, 2, 300), {}),
    ("conv1d", (1, 2, 700), (2, 2, 300), {"padding": 150, "stride": 2}),
    ("conv2d", (1, 2, 30, 40), (2, 2, 17, 19), {"padding": "same"}),
    ("conv_transpose1d", (1, 2, 20), (2, 2, 300), {"stride": 7}),
    ("conv_transpose2d", (1, 2, 3, 4), (2, 2, 17, 19), {"stride": 3, "padding": 5}),
    ("conv2d", (1, 24, 6, 6), (48, 1, 3, 3), {"groups": 24}),
    ("conv3d", (1, 24, 6, 6, 4), (24, 1, 3, 2, 1), {"groups": 24}),
    ("conv3d", (2, 4, 9, 9, 9), (4, 2, 5, 5, 5), {"groups": 2, "stride": 2}),
    ("conv_transpose3d", (1, 4, 3, 4, 3), (4, 2, 5, 5, 5), {"groups": 2, "stride": 2}),
], ids=str)
def test_corners(name, shape, weight_shape, kw):
    "Kernels beyond the input, long kernels, giant steps, a single place, many groups."
    rng = np.random.default_rng(0)
    arrays = [oracle.draw(rng, shape), oracle.draw(rng, weight_shape), None]
    oracle.check(lambda *a: getattr(F, name)(*a, **kw),
                 lambda *a: getattr(torch.nn.functional, name)(*a, **kw), arrays)
