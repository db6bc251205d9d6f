"""`functional.pad` against PyTorch: modes, axes, crops, values, dtypes, gradients, layouts."""
from itertools import product

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch

from flashconv.functional import pad
from flashconv.padding import flip

MODES = ("constant", "reflect", "replicate", "circular")
AMOUNTS = {
    "one side": (2, 0, 0, 1, 3, 0),
    "different everywhere": (1, 2, 3, 0, 2, 1),
    "as much as there is": (4, 3, 2, 4, 1, 3),
    "cropped": (-1, -2, 0, -1, -3, 0),
    "cropped here, padded there": (-2, 1, 2, -1, -1, 3),
    "nothing": (0, 0, 0, 0, 0, 0),
}
SIZES = (6, 5, 7)
DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.float64, mx.complex64, *oracle.INTEGERS)


def theirs(*args): return lambda t: torch.nn.functional.pad(t, *args)


def given(spatial, batched, dtype=mx.float32):
    shape = ((2,) if batched else ()) + (3, *SIZES[:spatial])
    return oracle.draw(np.random.default_rng(0), shape, dtype)


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("batched", (True, False))
@pytest.mark.parametrize("spatial", (1, 2, 3))
@pytest.mark.parametrize("amounts", AMOUNTS)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, amounts, spatial, batched, data_format):
    "Every element is a copy from the right place, and its gradient goes back there."
    amounts, x = AMOUNTS[amounts][:2 * spatial], given(spatial, batched)

    def ours(x):
        if data_format == "channels_first": return pad(x, amounts, mode)
        y = pad(mx.moveaxis(x, batched, -1), amounts, mode, data_format=data_format)
        return mx.moveaxis(y, -1, batched)

    oracle.assert_equal(ours(x), theirs(amounts, mode)(torch.from_numpy(np.array(x))))
    oracle.check(ours, theirs(amounts, mode), [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode, dtype):
    "Values and dtype survive, from int8 to complex64."
    x = given(2, True, dtype)
    with oracle.where(dtype): y = pad(x, (1, 2, 3, -1), mode)
    judged = theirs((1, 2, 3, -1), mode)(oracle.to_torch(x))
    assert y.dtype == dtype
    assert oracle.to_torch(y).equal(judged)


@pytest.mark.parametrize("dtype, value", [
    *((mx.float32, value) for value in (None, 0, 1, -2.5, True, float("inf"), float("nan"))),
    *((mx.int32, value) for value in (None, 0, 1, -2.5, True))], ids=str)
def test_value(dtype, value):
    "The constant, cast to the dtype as PyTorch casts it."
    x = given(2, True, dtype)
    judged = theirs((1, 2, 3, -1), "constant", value)(torch.from_numpy(np.array(x)))
    oracle.assert_equal(pad(x, (1, 2, 3, -1), "constant", value), judged)
    oracle.assert_equal(pad(x, (1, 2, 3, -1), value=value), judged)


@pytest.mark.parametrize("amounts", [(), (1, 2), (1, 2, 3, 4), (0, 1) * 3, (2, -1) * 4, [3, 1]],
                         ids=str)
def test_a_constant_goes_around_any_axes(amounts):
    "Constants know no batch and channels: as many axes as there are amounts, from the last on."
    x = given(2, True)
    oracle.assert_equal(pad(x, amounts), theirs(amounts)(torch.from_numpy(np.array(x))))
    oracle.assert_equal(pad(x, amounts, value=7.0),
                        theirs(amounts, "constant", 7.0)(torch.from_numpy(np.array(x))))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(mode):
    "Padded in shape, with a gradient of the input's shape."
    x = mx.zeros((0, 3, 6, 5))
    oracle.check(lambda x: pad(x, (1, 2, 3, -1), mode), theirs((1, 2, 3, -1), mode), [x])


def outcome(f, *args):
    try: return f(*args)
    except RuntimeError: return RuntimeError


@pytest.mark.parametrize("size", (1, 2, 3, 4))
@pytest.mark.parametrize("mode", MODES)
def test_every_pair_of_amounts(mode, size):
    "All amounts from -6 to 6 on both sides of one axis, each refused or right."
    x = mx.arange(3.0 * size).reshape(1, 3, 1, size)
    t = torch.from_numpy(np.array(x))
    for before, after in product(range(-6, 7), repeat=2):
        amounts = (before, after, 0, 0)
        mine, judged = outcome(pad, x, amounts, mode), outcome(theirs(amounts, mode), t)
        wraps_cropped = mode == "circular" and min(before, after) < 0 < max(before, after)
        if wraps_cropped and max(before, after) > size + min(before, after):
            judged = RuntimeError  # PyTorch's own result is uninitialised memory
        refused = mine is RuntimeError, judged is RuntimeError
        assert refused[0] == refused[1], f"{amounts}: we and PyTorch refuse it: {refused}"
        if not refused[0]: oracle.assert_equal(mine, judged, str(amounts))


def test_a_wrap_beyond_what_a_crop_leaves_is_refused():
    "Where PyTorch returns uninitialised memory, this is an error."
    with pytest.raises(RuntimeError, match="wrapping around more than once"):
        pad(mx.zeros((1, 1, 2)), (-2, 2), "circular")


@pytest.mark.parametrize("shape, axes", (((1,), (0,)), ((2, 1, 3), (1,)), ((2, 1, 3), (0, 1, 2))))
def test_flip(shape, axes):
    "With its gradient, which MLX before 0.32.4 loses for an axis of one."
    x, c = mx.random.normal(shape), mx.random.normal(shape)
    assert np.array_equal(flip(x, axes), np.flip(x, axes))
    gradient = mx.grad(lambda x: (flip(x, axes) * c).sum())(x)
    assert np.array_equal(gradient, np.flip(c, axes))


@pytest.mark.parametrize("mode", MODES)
def test_what_fits_is_not_too_large(mode):
    "2^54 values that nobody computes may be padded; an axis of 2^31 may not be had."
    x = mx.broadcast_to(mx.zeros(1), (2**26, 2**26, 4))
    assert pad(x, (1, 1), mode).shape == (2**26, 2**26, 6)
    long = mx.broadcast_to(mx.zeros(1), (1, 1, 2**31 - 3))
    assert pad(long, (1, 1), mode).shape == (1, 1, 2**31 - 1)
    with pytest.raises(RuntimeError, match="beyond what MLX can index"): pad(long, (1, 2), mode)
