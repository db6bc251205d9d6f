"""Padding that PyTorch's layers lack: pairs, 'causal', 'same_upper' and 'same_lower'.

PyTorch judges by explicit padding: `F.pad`, and a call without padding behind it.
"""
import copy
import pickle
from io import StringIO
from itertools import product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as T
from hypothesis import given, settings, strategies as st

import flashconv as fc
import flashconv.functional as F
from flashconv import arithmetic, draw

NAMES = [f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)]
SIZES, KERNEL = (7, 6, 5), (3, 2, 4)
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate",
         "circular": "circular"}


def flat(pairs): return [amount for pair in reversed(pairs) for amount in pair]


def judge(name, pairs, stride=1, dilation=1, groups=1, output_padding=0, mode="constant"):
    "PyTorch's function with pairs of padding, or of lengths that are cut off."
    def conv(x, w, b=None):
        x = T.pad(x, flat(pairs), mode)
        return getattr(T, name)(x, w, b, stride, 0, dilation, groups)

    def transposed(x, w, b=None):
        y = getattr(T, name)(x, w, None, stride, 0, output_padding, groups, dilation)
        y = T.pad(y, [-cut for cut in flat(pairs)])
        return y if b is None else y + b.reshape(-1, *[1] * len(pairs))
    return transposed if "transpose" in name else conv


def arrays(name, groups=1, dtype=mx.float32, sizes=SIZES, kernel=KERNEL):
    n, rng = int(name[-2]), np.random.default_rng(0)
    shapes = (2, 4, *sizes[:n]), (4, 4 // groups, *kernel[:n]), (4,)
    return [oracle.draw(rng, shape, dtype) for shape in shapes]


def checked(name, pairs, data_format="channels_first", dtype=mx.float32, **kw):
    "Output and all gradients of a function with pairs."
    def ours(x, *rest):
        if data_format == "channels_first": return getattr(F, name)(x, *rest, padding=pairs, **kw)
        y = getattr(F, name)(mx.moveaxis(x, 1, -1), *rest, padding=pairs, data_format=data_format,
                             **kw)
        return mx.moveaxis(y, -1, 1)
    oracle.check(ours, judge(name, pairs, **kw), arrays(name, kw.get("groups", 1), dtype))


OPTIONS = ({}, {"stride": 2}, {"dilation": 2}, {"groups": 2},
           {"stride": 3, "dilation": 2, "groups": 2})
PAIRS = ((2, 0), (1, 0), (0, 3)), ((0, 2), (3, 1), (1, 2))


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("name", NAMES)
def test_functions(name, data_format):
    "Forward and gradients, with and without a stride, dilation and groups."
    for kw, pairs in product(OPTIONS, PAIRS): checked(name, pairs[:int(name[-2])], data_format, **kw)


@pytest.mark.parametrize("name", NAMES)
def test_functions_without_kernels(name, without_kernels):
    "The same by MLX's operations."
    for kw, pairs in product(OPTIONS, PAIRS): checked(name, pairs[:int(name[-2])], **kw)


@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16, mx.float64, mx.complex64), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    checked(name, PAIRS[0][:int(name[-2])], dtype=dtype, stride=2)


@settings(max_examples=60, deadline=None, database=None)
@given(st.data())
def test_any_case(data):
    "Any sizes, pairs, strides, dilations and groups that PyTorch takes."
    name = data.draw(st.sampled_from(NAMES[:2] + NAMES[3:5]))
    n = int(name[-2])
    def each(lo, hi): return tuple(data.draw(st.integers(lo, hi)) for _ in range(n))
    sizes, kernel, pairs = each(1, 9), each(1, 4), tuple(zip(each(0, 4), each(0, 4)))
    kw = dict(stride=each(1, 3), dilation=each(1, 3), groups=data.draw(st.sampled_from((1, 2, 4))))
    given = arrays(name, kw["groups"], sizes=sizes, kernel=kernel)
    def ours(*a): return getattr(F, name)(*a, padding=pairs, **kw)
    theirs = judge(name, pairs, **kw)
    try: assert theirs(*map(oracle.to_torch, given)).numel()
    except (RuntimeError, AssertionError):
        with pytest.raises(RuntimeError): ours(*given)
        return
    oracle.check(ours, theirs, given, f"{name} {sizes} {kernel} {pairs} {kw}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", (1, 2, 3))
def test_layers_in_every_mode(n, mode):
    "A layer with pairs in each padding mode, from its constructor, a pickle and a copy."
    pairs = ((2, 0), (1, 3), (0, 1))[:n]
    layer = getattr(fc, f"Conv{n}d")(4, 4, KERNEL[:n], padding=pairs, padding_mode=mode)
    x = arrays(f"conv{n}d")[0]
    theirs = judge(f"conv{n}d", pairs, mode=MODES[mode])
    for made in (layer, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert made.padding == pairs and f"padding={pairs}" in repr(made)
        def ours(x, w, b): return made._conv_forward(x, w, b)
        oracle.check(ours, theirs, [x, made.weight, made.bias])


@pytest.mark.parametrize("name", ("LazyConv2d", "LazyConvTranspose2d"))
def test_lazy_layers(name):
    lazy = getattr(fc, name)(4, 3, stride=2, padding=((2, 0), 1))
    full = getattr(fc, name.removeprefix("Lazy"))(2, 4, 3, stride=2, padding=((2, 0), (1, 1)))
    x = mx.random.normal((1, 2, 6, 6))
    lazy(x)
    full.load_state_dict(lazy.state_dict())
    assert lazy.padding == full.padding and mx.array_equal(lazy(x), full(x)).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ("causal", "same_upper", "same_lower"))
def test_names(padding, mode):
    "Each name against its formula, over sizes, kernels, strides and dilations."
    for size, k, s, d in product((5, 8, 9), (1, 2, 4), (1, 2, 3), (1, 2)):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        pair = {"causal": (d * (k - 1), 0), "same_upper": (total // 2, total - total // 2),
                "same_lower": (total - total // 2, total // 2)}[padding]
        if mode != "zeros" and max(pair) >= size: continue
        layer = fc.Conv1d(4, 4, k, s, padding, d, padding_mode=mode)
        x, w, b = arrays("conv1d", sizes=(size,), kernel=(k,))
        theirs = judge("conv1d", (pair,), s, d, mode=MODES[mode])
        oracle.check(layer._conv_forward, theirs, [x, w, b], f"{size} {k} {s} {d}")
        assert layer(x).shape[-1] == -(-size // s)
        assert arithmetic.output_size(size, k, s, padding, d) == -(-size // s)


@pytest.mark.parametrize("padding", ("same_upper", "same_lower"))
@pytest.mark.parametrize("n", (2, 3))
def test_strided_same_in_more_axes(n, padding):
    "Other amounts along each axis, both formats."
    layer = getattr(fc, f"Conv{n}d")(4, 4, KERNEL[:n], (2, 3, 2)[:n], padding)
    x = arrays(f"conv{n}d")[0]
    pairs = arithmetic.same_upper_padding(SIZES[:n], KERNEL[:n], (2, 3, 2)[:n])
    if padding == "same_lower": pairs = tuple(pair[::-1] for pair in pairs)
    theirs = judge(f"conv{n}d", pairs, (2, 3, 2)[:n])
    oracle.check(layer._conv_forward, theirs, [x, layer.weight, layer.bias])
    last = getattr(fc, f"Conv{n}d")(4, 4, KERNEL[:n], (2, 3, 2)[:n], padding,
                                    data_format="channels_last")
    last.load_state_dict(layer.state_dict())
    y = mx.moveaxis(last(mx.moveaxis(x, 1, -1)), -1, 1)
    assert y.shape == layer(x).shape and mx.allclose(y, layer(x), atol=1e-5).item()


@pytest.mark.parametrize("output_padding", (0, 1))
def test_causal_transposed(output_padding):
    "L * s outputs (and `output_padding` more), whether the kernel is longer than the stride or not."
    for size, k, s, d in product((1, 2, 6), (1, 3, 5), (2, 3, 7), (1, 2)):
        cut = d * (k - 1) + 1 - s
        kw = dict(stride=s, dilation=d, output_padding=output_padding)
        def ours(*a): return F.conv_transpose1d(*a, padding="causal", **kw)
        given = arrays("conv_transpose1d", sizes=(size,), kernel=(k,))
        oracle.check(ours, judge("conv_transpose1d", ((0, cut),), **kw), given, f"{size} {k} {s} {d}")
        assert ours(*given).shape[-1] == size * s + output_padding
    layer = fc.ConvTranspose1d(4, 4, 5, 3, "causal")
    x = mx.zeros((1, 4, 6))
    assert layer(x, output_size=(19,)).shape[-1] == 19
    with pytest.raises(ValueError, match=r"valid sizes range from \[18\] to \[20\]"):
        layer(x, output_size=(21,))


@pytest.mark.parametrize("without", (False, True))
def test_no_output_sees_the_future(without, request):
    "One later sample changed, and exactly nothing changes before it."
    if without: request.getfixturevalue("without_kernels")
    for k, s, d, g in product((2, 5), (1, 3), (1, 3), (1, 4)):
        down = fc.Conv1d(4, 4, k, s, "causal", d, g)
        up = fc.ConvTranspose1d(4, 4, k, s, "causal", 0, g, True, d)
        x = mx.random.normal((2, 4, 40))
        for at in (0, 13, 39):
            other = x.at[..., at].add(mx.array(float("nan")))
            seen = mx.isnan(down(other))[0, 0].tolist()
            assert not any(seen[:-(-at // s)]), f"{down} at {at}"
            assert not any(mx.isnan(up(other))[0, 0, :at * s].tolist()), f"{up} at {at}"
            assert mx.array_equal(down(x)[..., :-(-at // s)], down(other)[..., :-(-at // s)]).item()


@pytest.mark.parametrize("n", (1, 2, 3))
def test_adjoint(n):
    "<Cx, y> = <x, C'y> with the same pairs on both sides."
    pairs, kw = ((3, 0), (0, 1), (2, 1))[:n], dict(stride=2, dilation=2, groups=2)
    x, w, _ = arrays(f"conv{n}d", 2, sizes=(12, 11, 13))
    forward = getattr(F, f"conv{n}d")(x, w, padding=pairs, **kw)
    y = mx.random.normal(forward.shape)
    back = arithmetic.transposed_output_size(y.shape[2:], KERNEL[:n], 2, pairs, 0, 2)
    more = tuple(i - o for i, o in zip(x.shape[2:], back))
    backward = getattr(F, f"conv_transpose{n}d")(y, w, padding=pairs, output_padding=more, **kw)
    assert backward.shape == x.shape
    assert np.isclose((forward * y).sum().item(), (x * backward).sum().item(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    "Second derivatives, vmap, compile, unbatched and empty input, plain operations."
    n = int(name[-2])
    pairs = PAIRS[1][:n]
    x, w, b = arrays(name)
    f = getattr(F, name)
    def penalty(x): return mx.square(mx.grad(lambda x: mx.square(f(x, w, b, padding=pairs)).sum())(x)).sum()
    def theirs(x, w, b):
        y = judge(name, pairs)(x, w, b).square().sum()
        return torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
    tx, tw, tb = map(oracle.to_torch, (x, w, b))
    tx.requires_grad_()
    theirs(tx, tw, tb).backward()
    assert np.allclose(np.array(mx.grad(penalty)(x)), tx.grad.numpy(), rtol=1e-3, atol=1e-2)
    y = f(x, w, b, padding=pairs)
    assert mx.allclose(mx.vmap(lambda x: f(x, w, b, padding=pairs))(x[:, None])[:, 0], y, atol=1e-4).item()
    assert mx.array_equal(mx.compile(lambda x: f(x, w, b, padding=pairs))(x), y).item()
    assert mx.allclose(f(x[0], w, b, padding=pairs), y[0], atol=1e-5).item()
    assert f(x[:0], w, b, padding=pairs).shape == (0, *y.shape[1:])
    shapeless = mx.compile(lambda x: f(x, w, b, padding=pairs), shapeless=True)
    if fc.kernels.info().kernels:
        for longer in (x, mx.concatenate([x, x], 2)):
            assert mx.allclose(shapeless(longer), f(longer, w, b, padding=pairs), atol=1e-4).item()
    with fc.plain_operations(): assert mx.allclose(f(x, w, b, padding=pairs), y, atol=1e-4).item()


def test_integers():
    x, w = (mx.random.randint(-9, 9, shape) for shape in ((1, 2, 8), (2, 2, 3)))
    theirs = T.conv1d(T.pad(oracle.to_torch(x), (2, 0)), oracle.to_torch(w), stride=2)
    oracle.assert_equal(F.conv1d(x, w, stride=2, padding=((2, 0),)), theirs)
    oracle.assert_equal(F.conv1d(x, w, stride=2, padding="causal"), theirs)


@pytest.mark.parametrize("padding", (((2, 0),), "causal", "same_upper", "same_lower"))
def test_no_copy(padding):
    "Pairs and names are one operation of the graph, as zeros are: nothing is padded before it."
    if not fc.kernels.available(): pytest.skip("MLX's operations copy")
    x, w = mx.zeros((1, 2, 8)), mx.zeros((2, 2, 3))
    def operations(padding):
        mx.export_to_dot(text := StringIO(), F.conv1d(x, w, stride=2, padding=padding))
        return text.getvalue().count("label")
    assert operations(padding) == operations(1)


def test_fields_and_pictures():
    "Receptive fields, output sizes and pictures know pairs and names."
    causal, pairs = fc.Conv1d(1, 1, 3, padding="causal", dilation=2), fc.Conv1d(1, 1, 3, 2, ((2, 0),))
    assert arithmetic.receptive_field(causal, pairs) == (7, 2, -6)
    assert draw.receptive_field([causal, pairs]).numbers["start"] == -6
    assert draw.receptive_field([(3, 1, (2, 0))]).numbers["start"] == -2
    shown = draw.window(fc.Conv2d(1, 1, 3, padding=((2, 0), (0, 1))), (4, 4)).numbers
    assert shown["padded"].shape == (6, 5) and shown["output"].shape == (4, 3)
    up = draw.window(3, 4, stride=5, padding="causal", transposed=True).numbers
    assert up["output"].shape == (20,)
    named = SimpleNamespace(kernel_size=3, stride=2, padding="same_lower")
    with pytest.raises(ValueError, match="depends on the input's size"):
        arithmetic.receptive_field(named)


REFUSED = {
    "negative pair": (lambda: fc.Conv1d(2, 2, 3, padding=((-1, 0),)), ValueError,
                      "negative padding is not supported"),
    "negative pair of a function": (lambda: F.conv1d(mx.ones((1, 2, 8)), mx.ones((2, 2, 3)),
                                                     padding=((0, -1),)), RuntimeError, "negative"),
    "pair of three": (lambda: fc.Conv1d(2, 2, 3, padding=((1, 0, 0),)), TypeError, "1 of \\(before"),
    "pairs for other axes": (lambda: fc.Conv3d(2, 2, 3, padding=((1, 0), 1)), TypeError, "must be 3"),
    "floats": (lambda: fc.Conv1d(2, 2, 3, padding=((1.0, 0),)), TypeError, "pairs of ints, not float"),
    "two ints in 1d": (lambda: fc.Conv1d(2, 2, 3, padding=(2, 0))(mx.ones((1, 2, 8))), RuntimeError,
                       r"are a pair, as in padding=\(\(2, 0\),\)"),
    "causal in 2d": (lambda: fc.LazyConv2d(2, 3, padding="causal"), ValueError, "pass pairs"),
    "causal transposed in 3d": (lambda: fc.ConvTranspose3d(2, 2, 3, padding="causal"), ValueError,
                                "pass pairs"),
    "a function, causal in 2d": (lambda: F.conv2d(mx.ones((1, 2, 8, 8)), mx.ones((2, 2, 3, 3)),
                                                  padding="causal"), RuntimeError, "pass pairs"),
    "same_upper, transposed": (lambda: fc.ConvTranspose1d(2, 2, 3, padding="same_upper"), TypeError,
                               "only 'causal' is for transposed"),
    "same with a stride": (lambda: fc.Conv1d(2, 2, 3, 2, padding="same"), ValueError, "'same_upper'"),
    "a function, same with a stride": (lambda: F.conv1d(mx.ones((1, 2, 8)), mx.ones((2, 2, 3)),
                                       stride=2, padding="same"), RuntimeError, "'same_upper'"),
    "another name": (lambda: fc.Conv1d(2, 2, 3, padding="SAME"), ValueError, "'causal'"),
    "reflected too far": (lambda: fc.Conv1d(2, 2, 3, padding=((8, 0),), padding_mode="reflect")(
                          mx.ones((1, 2, 8))), RuntimeError, "Padding size should be less than"),
    "to PyTorch": (lambda: fc.to_torch(fc.Conv1d(2, 2, 3, padding="causal")), ValueError, "F?.*pad"),
    "to mlx.nn": (lambda: fc.to_mlx(fc.Conv1d(2, 2, 3, padding=((2, 0),))), ValueError,
                  "as much before as after"),
    "to mlx.nn, transposed": (lambda: fc.to_mlx(fc.ConvTranspose1d(2, 2, 3, padding="causal")),
                              ValueError, "cuts as much before as after"),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message): call()


def test_plain_operations_refuse_what_depends_on_sizes():
    layer = fc.Conv1d(2, 2, 3, 2, "same_upper")
    with fc.plain_operations(), pytest.raises(NotImplementedError, match="depends on the input's"):
        layer(mx.ones((1, 2, 8)))
    layer.padding_mode = "replicate"
    with fc.plain_operations(), pytest.raises(NotImplementedError, match="depends on the input's"):
        layer(mx.ones((1, 2, 8)))


def test_equal_pairs_are_an_amount():
    "`to_mlx` takes pairs that are no more than one number."
    layer = fc.Conv1d(2, 2, 3, padding=((1, 1),), data_format="channels_last")
    x = mx.random.normal((1, 8, 2))
    assert mx.allclose(fc.to_mlx(layer)(x), layer(x), atol=1e-5).item()


@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
@pytest.mark.parametrize("n", (1, 2, 3))
def test_same_without_a_batch_channels_last(n, mode):
    "The first axis is a spatial one there."
    theirs = getattr(torch.nn, f"Conv{n}d")(2, 3, (2, 3, 2)[:n], padding="same", padding_mode=mode)
    ours = getattr(fc, f"Conv{n}d")(2, 3, (2, 3, 2)[:n], padding="same", padding_mode=mode, data_format="channels_last")
    ours.load_state_dict({name: mx.array(p.detach().numpy()) for name, p in theirs.named_parameters()})
    x = torch.randn(2, *(6, 5, 4)[:n])
    y = ours(mx.array(x.movedim(0, -1).contiguous().numpy()))
    np.testing.assert_allclose(np.array(y), theirs(x).detach().movedim(0, -1).numpy(), rtol=1e-4, atol=1e-5)
