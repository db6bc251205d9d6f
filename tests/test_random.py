"""Random combinations of everything, drawn by hypothesis and judged by PyTorch.

Both libraries take a call, with equal numbers, or both refuse it. The known exceptions are named
where they are made. `FLASHCONV_EXAMPLES=20 pytest tests/test_random.py` tries twenty times as many.
"""
import os

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings
from hypothesis import strategies as st

import flashconv.functional as F

FACTOR = float(os.environ.get("FLASHCONV_EXAMPLES", 1))
FLOATS = (mx.float32, mx.float16, mx.bfloat16, mx.float64, mx.complex64)


def examples(number): return settings(max_examples=max(1, int(number * FACTOR)))


@st.composite
def calls(draw, transposed, n):
    "Shapes, dtype, bias, layout and keywords of one call; most of them legal."
    def each(low, high): return tuple(draw(st.integers(low, high)) for _ in range(n))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    channels, out = (groups * draw(st.integers(1, 3)) for _ in range(2))
    if not transposed and draw(st.integers(0, 30)) == 0: channels = 0
    kernel, stride, dilation = each(1, 4), each(1, 3), each(1, 3)
    padding = draw(st.sampled_from((each(0, 4),) * 3 + (() if transposed else ("same", "valid"))))
    if padding == "same" and draw(st.integers(0, 4)): stride = (1,) * n
    kw = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:  # now and then one too many
        beyond = draw(st.integers(0, 9)) == 0
        kw["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1 + beyond))
                                     for s, d in zip(stride, dilation))
    if draw(st.booleans()):  # one number for all axes
        kw = {k: v[0] if isinstance(v, tuple) else v for k, v in kw.items()}
    first, second = (channels, out) if transposed else (out, channels)
    return {
        "batch": draw(st.sampled_from((None, 0, 1, 2, 3))), "channels": channels,
        "sizes": tuple(i + k for i, k in zip(each(0, 7), kernel)),
        "weight_shape": (first, second // groups, *kernel),
        "bias_shape": (out,) if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from((mx.float32,) * 4 + FLOATS[1:])),
        "last": draw(st.booleans()), "seed": draw(st.integers(0, 2**20)), "kw": kw,
    }


def outcome(f, *args):
    "What `f` returns, or the RuntimeError that it raises."
    try: return f(*args)
    except RuntimeError as error: return error


@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("kind", ("conv", "conv_transpose"))
def test_functions(kind, n):
    "One of the six functions: the same refusals, outputs and gradients."
    name = f"{kind}{n}d"

    @examples(160)
    @given(calls(kind == "conv_transpose", n))
    def run(c):
        rng = np.random.default_rng(c["seed"])
        batch = () if c["batch"] is None else (c["batch"],)
        arrays = [None if shape is None else oracle.draw(rng, shape, c["dtype"]) for shape in
                  ((*batch, c["channels"], *c["sizes"]), c["weight_shape"], c["bias_shape"])]

        def ours(x, *rest):
            f = getattr(F, name)
            if not c["last"]: return f(x, *rest, **c["kw"])
            x = mx.moveaxis(x, len(batch), -1)
            y = f(x, *rest, data_format="channels_last", **c["kw"])
            return mx.moveaxis(y, -1, len(batch))

        def theirs(*tensors): return getattr(torch.nn.functional, name)(*tensors, **c["kw"])

        # PyTorch skips some checks for an empty batch, so a batch of one says what is legal.
        x, *rest = map(oracle.to_torch, arrays)
        if c["batch"] == 0: x = torch.zeros(1, *x.shape[1:], dtype=x.dtype)
        if isinstance(outcome(theirs, x, *rest), RuntimeError):
            with oracle.where(c["dtype"]): assert isinstance(outcome(ours, *arrays), RuntimeError)
        else: oracle.check(ours, theirs, arrays)

    run()


@st.composite
def paddings(draw):
    "Shape, dtype, layout and arguments of one call of `pad`."
    axes = draw(st.sampled_from((1, 2, 3)))
    shape = tuple(draw(st.integers(1, 6)) for _ in range(axes + draw(st.sampled_from((1, 2)))))
    amounts = tuple(draw(st.integers(-2, 5)) for _ in range(2 * axes))
    mode = draw(st.sampled_from(("constant", "reflect", "replicate", "circular")))
    value = draw(st.sampled_from((None, 0, 1.5, -2))) if mode == "constant" else None
    return (shape, amounts, mode, value, draw(st.sampled_from(FLOATS + (mx.int32,))),
            draw(st.booleans()), draw(st.integers(0, 2**20)))


@examples(300)
@given(paddings())
def test_pad(case):
    "Random shapes and amounts in four modes: the same refusals, copies and gradients."
    shape, amounts, mode, value, dtype, last, seed = case
    x = oracle.draw(np.random.default_rng(seed), shape, dtype)
    channels = len(shape) - len(amounts) // 2 - 1

    def ours(x):
        if not last: return F.pad(x, amounts, mode, value)
        y = F.pad(mx.moveaxis(x, channels, -1), amounts, mode, value, data_format="channels_last")
        return mx.moveaxis(y, -1, channels)

    def theirs(t): return torch.nn.functional.pad(t, amounts, mode, value)

    judged = outcome(theirs, oracle.to_torch(x))
    with oracle.where(dtype): result = outcome(ours, x)
    pairs = zip(amounts[::2], amounts[1::2], reversed(shape))
    if mode == "circular" and any(max(a, b) > size + min(a, 0) + min(b, 0) for a, b, size in pairs):
        # PyTorch returns uninitialised memory for some of these.
        assert isinstance(result, RuntimeError)
    elif isinstance(judged, RuntimeError):
        # PyTorch's 1d kernels refuse a result without elements, its 2d and 3d ones give it.
        assert isinstance(result, RuntimeError) or result.size == 0 and len(amounts) == 2
    elif dtype == mx.int32: oracle.assert_equal(result, judged)
    else: oracle.check(ours, theirs, [x])
