"""The layers against PyTorch's: signatures, attributes, repr, numbers, state, initialisation."""
import copy
import inspect
import pickle
import warnings
from math import sqrt

import mlx.core as mx
import mlx.nn
import numpy as np
import oracle
import pytest
import torch

import flashconv as fc

EAGER = [f"{kind}{n}d" for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)]
LAZY = ["Lazy" + name for name in EAGER]
MODES = ("zeros", "reflect", "replicate", "circular")
SIZES = (8, 7, 9)


def axes(value, n): return value[:n] if isinstance(value, tuple) else value


def build(name, *args, **kw):
    "Our layer and PyTorch's with the same arguments, tuples cut to the number of axes."
    n = int(name[-2])
    args, kw = [axes(v, n) for v in args], {k: axes(v, n) for k, v in kw.items()}
    return getattr(fc, name)(*args, **kw), getattr(torch.nn, name)(*args, **kw)


def share(ours, theirs):
    "Give our layer the parameters of PyTorch's."
    ours.load_state_dict({k: oracle.to_mlx(v) for k, v in theirs.state_dict().items()})


def given(name, channels, batch=(2,), dtype=mx.float32):
    return oracle.draw(np.random.default_rng(0), (*batch, channels, *SIZES[:int(name[-2])]), dtype)


def check(ours, theirs, x, *args, wrap=lambda f: f):
    "Output and gradients of two layers, as functions of input, weight and bias."
    names = [k for k in ("weight", "bias") if getattr(ours, k) is not None]

    def mine(x, *parameters):
        for k, p in zip(names, parameters): setattr(ours, k, p)
        return ours(x, *args)

    def judge(x, *parameters):
        return torch.func.functional_call(theirs, dict(zip(names, parameters)), (x, *args))

    before = dict(ours)
    oracle.check(wrap(mine), judge, [x, *(getattr(ours, k) for k in names)])
    for k in names: setattr(ours, k, before[k])


@pytest.mark.parametrize("name", EAGER + LAZY)
def test_signatures(name):
    "PyTorch's parameters, order, kinds and defaults, then a keyword-only `data_format`."
    def listed(cls):
        parameters = list(inspect.signature(cls).parameters.values())
        return [(p.name, p.kind, p.default) for p in parameters]
    ours, theirs = listed(getattr(fc, name)), listed(getattr(torch.nn, name))
    assert ours[:len(theirs)] == theirs
    assert ours[len(theirs):] == [("data_format", inspect.Parameter.KEYWORD_ONLY, "channels_first")]


@pytest.mark.parametrize("name", EAGER)
def test_call_signatures(name):
    "`output_size` is the only argument beside the input, and only of transposed layers."
    ours = inspect.signature(getattr(fc, name).__call__).parameters
    theirs = inspect.signature(getattr(torch.nn, name).forward).parameters
    assert [(k, p.default) for k, p in ours.items()] == [(k, p.default) for k, p in theirs.items()]


ARGUMENTS = [  # for every layer; None stands for PyTorch's default
    {}, {"kernel_size": (3, 1, 2)}, {"stride": 2}, {"stride": (2, 1, 3)}, {"padding": 1},
    {"padding": (0, 2, 1)}, {"dilation": 2}, {"dilation": (1, 2, 3)}, {"groups": 2},
    {"bias": False},
    {"stride": 2, "padding": 1, "dilation": 3, "groups": 2, "bias": False},
    {"kernel_size": 1, "stride": [1, 1, 1], "padding": (0, 0, 0), "dilation": (1, 1, 1)},
]
STRINGS = [{"padding": p, "padding_mode": m, "kernel_size": k} for p in ("same", "valid", 1)
           for m in MODES for k in (2, (3, 1, 2))]
OUTPUT_PADDING = [{"stride": 3, "output_padding": 1}, {"dilation": 2, "output_padding": (1, 0, 1)}]


def constructions(names):
    for name in names:
        special = OUTPUT_PADDING if "Transpose" in name else STRINGS
        for kw in ARGUMENTS + special:
            kw = {k: v[:int(name[-2])] if isinstance(v, list) else v for k, v in kw.items()}
            yield pytest.param(name, {"kernel_size": 3} | kw, id=f"{name}-{kw}".replace(" ", ""))


@pytest.mark.parametrize("name, kw", list(constructions(EAGER + LAZY)))
def test_repr_and_attributes(name, kw):
    "The same text to the letter, and the same attributes, tuples for tuples."
    ours, theirs = build(name, *(() if "Lazy" in name else (4,)), 6, **kw)
    assert repr(ours) == repr(theirs)
    for k in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
              "transposed", "output_padding", "groups", "padding_mode", "training"):
        assert getattr(ours, k) == getattr(theirs, k), k
        assert type(getattr(ours, k)) is type(getattr(theirs, k)), k
    if not ours.transposed:
        mine = ours._reversed_padding_repeated_twice
        assert list(mine) == list(theirs._reversed_padding_repeated_twice)
    assert (ours.bias is None) == (theirs.bias is None)


@pytest.mark.parametrize("name", EAGER + LAZY)
@pytest.mark.parametrize("kw", [
    {}, {"stride": (1,)}, {"kernel_size": (3,)}, {"dilation": (1,)}, {"padding": (0,)},
    {"kernel_size": (3,), "stride": (1,), "padding": (0,), "dilation": (1,)},
    {"kernel_size": (3, 3, 3, 3)}, {"dilation": (1, 1, 1, 1)}, {"padding": (0,) * 4},
    {"stride": (2,), "padding": (1,), "dilation": (2,)}, {"dilation": [1]}, {"padding": [0]},
    {"output_padding": (0,)}, {"output_padding": (1,)}, {"output_padding": (0,) * 4}], ids=str)
def test_repr_of_tuples_of_any_length(name, kw):
    "PyTorch leaves out zeros and ones however many there are, given or assigned."
    if "output_padding" in kw and "Transpose" not in name: pytest.skip("no such argument")
    ours, theirs = build(name, *(() if "Lazy" in name else (4,)), 6, **{"kernel_size": 3} | kw)
    assert repr(ours) == repr(theirs)
    for key, value in kw.items():
        for layer in build(name, *(() if "Lazy" in name else (4,)), 6, kernel_size=3):
            setattr(layer, key, value)
            ours, theirs = (layer, theirs) if isinstance(layer, fc._ConvNd) else (ours, layer)
    assert repr(ours) == repr(theirs)


def test_repr_of_the_data_format():
    "What PyTorch does not have is printed only where it is not the default."
    assert repr(fc.Conv1d(1, 1, 1, data_format="channels_last")) == (
        "Conv1d(1, 1, kernel_size=(1,), stride=(1,), data_format=channels_last)")


@pytest.mark.parametrize("name, kw", list(constructions(EAGER)))
def test_numbers(name, kw):
    "With PyTorch's weights, output and gradients are PyTorch's."
    ours, theirs = build(name, 4, 6, **kw)
    share(ours, theirs)
    check(ours, theirs, given(name, 4))


@pytest.mark.parametrize("batch", ((), (0,), (3,)), ids=str)
@pytest.mark.parametrize("name, mode", [(name, mode) for name in EAGER for mode in MODES
                                        if "Transpose" not in name or mode == "zeros"])
def test_channels_last(name, mode, batch):
    "The other data format, in every padding mode, unbatched and with an empty batch as well."
    kw = {"stride": (2, 1, 3), "padding": (1, 0, 2), "groups": 2, "padding_mode": mode}
    _, theirs = build(name, 4, 6, (3, 2, 2), **kw)
    n = int(name[-2])
    ours = getattr(fc, name)(4, 6, (3, 2, 2)[:n], data_format="channels_last",
                             **{k: axes(v, n) for k, v in kw.items()})
    share(ours, theirs)
    axis = len(batch)
    check(ours, theirs, given(name, 4, batch), wrap=lambda f: lambda x, *rest: mx.moveaxis(
        f(mx.moveaxis(x, axis, -1), *rest), -1, axis))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel_size", (2, 4, (4, 1, 2)), ids=str)
@pytest.mark.parametrize("dilation", (1, 2, (3, 1, 2)), ids=str)
@pytest.mark.parametrize("n", (1, 2, 3))
def test_same_with_even_kernels(n, mode, kernel_size, dilation):
    "The remainder of an odd total goes to the right, in every mode."
    ours, theirs = build(f"Conv{n}d", 2, 3, kernel_size, padding="same", dilation=dilation,
                         padding_mode=mode)
    share(ours, theirs)
    x = oracle.draw(np.random.default_rng(0), (2, 2, 11, 10, 12)[:n + 2])
    check(ours, theirs, x)
    assert ours(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("batch", ((), (2,)), ids=str)
@pytest.mark.parametrize("beyond", (0, 1, 2, (2, 0, 1)), ids=str)
@pytest.mark.parametrize("n", (1, 2, 3))
def test_output_size(n, beyond, batch, data_format):
    "`output_size` at the call, with or without leading sizes, takes the place of `output_padding`."
    name = f"ConvTranspose{n}d"
    _, theirs = build(name, 4, 6, 3, 3, 1, 1, 2)
    ours = getattr(fc, name)(4, 6, 3, 3, 1, 1, 2, data_format=data_format)
    share(ours, theirs)
    extra = (beyond,) * n if isinstance(beyond, int) else beyond[:n]
    size = [3 * (i - 1) - 2 + 3 + e for i, e in zip(SIZES, extra)]
    def wrap(f):
        if data_format == "channels_first": return f
        return lambda x, *r: mx.moveaxis(f(mx.moveaxis(x, len(batch), -1), *r), -1, len(batch))
    for given_size in (size, tuple(size), [*batch, 99, *size]):
        check(ours, theirs, given(name, 4, batch), given_size, wrap=wrap)


def test_same_padding_with_a_dilation_of_length_1():
    "It serves both axes; PyTorch pads one of them, and gives 5 x 1."
    layer = fc.Conv2d(1, 1, 3, padding="same", dilation=(2,), padding_mode="circular")
    assert layer(mx.ones((1, 1, 5, 5))).shape == (1, 1, 5, 5)
    layer.dilation = (2, 2, 2)
    with pytest.raises(RuntimeError, match="expected dilation to be a single integer value"):
        layer(mx.ones((1, 1, 5, 5)))


def test_padding_of_length_1_with_a_mode():
    "It pads the last axis of an unbatched picture, as in PyTorch; three amounts are refused."
    ours, theirs = (nn.Conv2d(2, 3, 3, padding=(1,), padding_mode="reflect")
                    for nn in (fc, torch.nn))
    ours.load_state_dict({k: mx.array(v.detach().numpy()) for k, v in theirs.state_dict().items()})
    x = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    y = theirs(torch.tensor(x)).detach().numpy()
    assert y.shape == (3, 3, 5) and np.allclose(np.array(ours(mx.array(x))), y, atol=1e-5)
    ours.padding = (1, 1, 1)
    with pytest.raises(RuntimeError, match="padding must be 2 ints, but got"): ours(mx.array(x))


@pytest.mark.parametrize("key", ("stride", "padding", "dilation"))
def test_output_size_beside_tuples_of_other_lengths(key):
    "A tuple of length 1 serves both axes; one of length 3 is refused in the call's words."
    x = mx.ones((1, 1, 4, 4))
    size = (4, 4) if key == "padding" else (6, 6)
    assert fc.ConvTranspose2d(1, 1, 3, **{key: (1,)})(x, size).shape == (1, 1, *size)
    with pytest.raises(RuntimeError, match=f"expected {key} to be a single integer value or a"):
        fc.ConvTranspose2d(1, 1, 3, **{key: (1, 1, 1)})(x, size)


@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16, mx.float64, mx.complex64), ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_dtypes(name, dtype):
    "Parameters, outputs and gradients in the dtype asked for."
    theirs_dtype = getattr(torch, str(dtype).rpartition(".")[2])
    kw = {"stride": (2, 1, 1)[:int(name[-2])], "padding": 1, "groups": 2}
    device = mx.cpu if dtype == mx.float64 else None
    ours = getattr(fc, name)(4, 6, 3, dtype=dtype, device=device, **kw)
    theirs = getattr(torch.nn, name)(4, 6, 3, dtype=theirs_dtype, **kw)
    with oracle.where(dtype):
        share(ours, theirs)
        assert ours.weight.dtype == ours.bias.dtype == dtype
    check(ours, theirs, given(name, 4, dtype=dtype))


# State ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("name", EAGER)
def test_state_goes_both_ways(name, bias, tmp_path):
    "PyTorch's state loads here and ours loads there, by dictionary and by safetensors file."
    safetensors = pytest.importorskip("safetensors.torch")
    args, kw = (4, 6, (3, 1, 2)), {"groups": 2, "bias": bias}
    ours, theirs = build(name, *args, **kw)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, tuple(v.shape)) for k, v in theirs.state_dict().items()]

    safetensors.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    file = str(tmp_path / "theirs.safetensors")
    by_method, by_mlx, by_hand = (build(name, *args, **kw)[0] for _ in range(3))
    assert str(by_method.load_state_dict(mx.load(file))) == "<All keys matched successfully>"
    by_mlx.load_weights(file)
    share(by_hand, theirs)
    for layer in (by_method, by_mlx, by_hand):
        for k, v in theirs.state_dict().items(): oracle.assert_equal(layer[k], v)

    ours.save_weights(str(tmp_path / "ours.safetensors"))
    mx.save_safetensors(str(tmp_path / "dict.safetensors"), ours.state_dict())
    for file in ("ours", "dict"):
        theirs.load_state_dict(safetensors.load_file(tmp_path / f"{file}.safetensors"))
        for k, v in theirs.state_dict().items(): oracle.assert_equal(ours[k], v)


def test_state_dict_prefix():
    "The prefix stands before each name, as PyTorch's keyword puts it there."
    ours, theirs = build("Conv2d", 4, 6, 3)
    assert list(ours.state_dict(prefix="a.b.")) == list(theirs.state_dict(prefix="a.b."))


def states(layer, zeros):
    "Broken states for a Conv2d(4, 6, 3), by name."
    good = layer.state_dict()
    return {
        "missing": {"weight": good["weight"]},
        "unexpected": {**good, "x": zeros(1)},
        "wrong shape": {**good, "weight": zeros(6, 4, 3, 2)},
        "everything at once": {"weight": zeros(6, 4), "y": zeros(2)},
        "not an array": {**good, "weight": 1},
        "a list": {**good, "bias": [0.0] * 6},
    }


BROKEN = {
    "missing": ["Missing key(s) in state_dict: \"bias\"."],
    "unexpected": ["Unexpected key(s) in state_dict: \"x\"."],
    "wrong shape": ["size mismatch for weight: copying a param with shape"],
    "everything at once": ["Missing key(s)", "Unexpected key(s)", "size mismatch for weight"],
    "not an array": ['While copying the parameter named "weight", expected',
                     "received <class 'int'>"],
    "a list": ['While copying the parameter named "bias", expected', "received <class 'list'>"],
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_state_that_does_not_fit(what):
    "PyTorch's error lists everything that is wrong; the layer stays as it was."
    ours, theirs = build("Conv2d", 4, 6, 3)
    before = dict(ours)
    for layer, zeros in ((theirs, torch.zeros), (ours, lambda *s: mx.zeros(s))):
        with pytest.raises(RuntimeError) as info: layer.load_state_dict(states(layer, zeros)[what])
        message = str(info.value)
        assert message.startswith("Error(s) in loading state_dict for Conv2d:\n\t")
        for text in BROKEN[what]: assert text in message
    assert dict(ours).keys() == before.keys()
    assert all(ours[k] is before[k] for k in ("weight", "bias"))


@pytest.mark.parametrize("state", (None, [1], "weights", 3), ids=repr)
def test_a_state_that_is_none(state):
    "A TypeError with PyTorch's words."
    for layer in build("Conv2d", 4, 6, 3):
        with pytest.raises(TypeError, match="Expected state_dict to be dict-like, got <class"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("what", ("missing", "unexpected"))
def test_loading_that_is_not_strict(what):
    "Reports the same keys as PyTorch, and takes what there is."
    ours, theirs = build("Conv2d", 4, 6, 3)
    mine = ours.load_state_dict(states(ours, lambda *s: mx.zeros(s))[what], strict=False)
    judged = theirs.load_state_dict(states(theirs, torch.zeros)[what], strict=False)
    assert mine.missing_keys == judged.missing_keys
    assert mine.unexpected_keys == judged.unexpected_keys
    ours.load_state_dict({"weight": mx.ones((6, 4, 3, 3))}, strict=False)
    assert mx.all(ours.weight == 1)


def test_loading_keeps_or_assigns_the_dtype():
    "Values take the layer's dtype, unless `assign` keeps their own."
    layer = fc.Conv1d(1, 2, 3)
    state = {k: v.astype(mx.float16) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert layer.weight.dtype == layer.bias.dtype == mx.float32
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype == layer.bias.dtype == mx.float16


def test_a_complex_state_does_not_fit_a_real_layer():
    "The imaginary part is not dropped without a word."
    layer = fc.Conv1d(1, 2, 3)
    state = {k: v.astype(mx.complex64) for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="dtype mismatch for weight"):
        layer.load_state_dict(state)


# Initialisation ------------------------------------------------------------------------------

def assert_same_distribution(a, b):
    "Kolmogorov and Smirnov: two samples, one distribution, at a level of one in a thousand."
    a, b = np.sort(np.array(a).ravel()), np.sort(np.array(b).ravel())
    everything = np.concatenate([a, b])
    steps = (np.searchsorted(s, everything, side="right") / len(s) for s in (a, b))
    distance = np.abs(np.subtract(*steps)).max()
    assert distance < 1.95 * sqrt((len(a) + len(b)) / (len(a) * len(b)))


INITIAL = [("Conv1d", (8, 400, 5), {}), ("Conv2d", (32, 400, 3), {"groups": 4}),
           ("Conv3d", (6, 400, (3, 1, 2)), {}), ("ConvTranspose1d", (400, 8, 5), {}),
           ("ConvTranspose2d", (40, 400, 3), {"groups": 4}),
           ("ConvTranspose3d", (200, 6, (3, 1, 2)), {"groups": 2})]


@pytest.mark.parametrize("name, args, kw", INITIAL, ids=str)
def test_initial_distribution(name, args, kw):
    "U(-b, b) with b from the weight's second axis and the kernel, for weight and bias."
    ours, theirs = zip(*(build(name, *args, **kw) for _ in range(30)))
    shape = ours[0].weight.shape
    bound = 1 / sqrt(shape[1] * np.prod(shape[2:]))
    for k in ("weight", "bias"):
        mine = np.concatenate([np.array(layer[k]).ravel() for layer in ours])
        judged = np.concatenate([getattr(layer, k).detach().numpy().ravel() for layer in theirs])
        assert_same_distribution(mine, judged)
        assert_same_distribution(mine, np.random.default_rng(0).uniform(-bound, bound, 100_000))
        assert abs(mine).max() <= bound * (1 + 1e-6)
        assert len(np.unique(mine)) > 0.9 * mine.size


@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16, mx.float64), ids=str)
def test_initial_distribution_of_other_dtypes(dtype):
    "The same distribution in half and double precision."
    layer = fc.Conv2d(16, 256, 3, dtype=dtype, device=mx.cpu if dtype == mx.float64 else None)
    with mx.stream(mx.cpu):
        weight = np.array(layer.weight.astype(mx.float32))
        bias = np.array(layer.bias.astype(mx.float32))
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert abs(bias).max() <= 1 / 12 * (1 + oracle.EPS[dtype])
    assert 0.99 / 12 < abs(weight).max() <= 1 / 12 * (1 + oracle.EPS[dtype])
    assert abs(weight.std() - 1 / 12 / sqrt(3)) < 0.01 / 12


def test_initial_distribution_of_complex_layers():
    "Real and imaginary part are drawn alike, and apart from each other, as in PyTorch."
    weight = np.array(fc.Conv2d(16, 256, 3, dtype=mx.complex64).weight).ravel()
    judged = torch.nn.Conv2d(16, 256, 3, dtype=torch.complex64).weight.detach().numpy().ravel()
    assert_same_distribution(weight.real, judged.real)
    assert_same_distribution(weight.imag, judged.imag)
    assert abs(np.corrcoef(weight.real, weight.imag)[0, 1]) < 0.02


@pytest.mark.parametrize("name, args", [("Conv2d", (0, 4, 3)), ("Conv1d", (4, 4, 0)),
                                        ("ConvTranspose2d", (4, 0, 3)), ("Conv3d", (0, 0, 1))],
                         ids=str)
def test_a_fan_of_zero_is_silent(name, args):
    "No warning, no division by zero, finite parameters of PyTorch's shapes."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = getattr(fc, name)(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(torch.nn, name)(*args)
    assert layer.weight.shape == tuple(theirs.weight.shape) and layer.weight.size == 0
    assert layer.bias.shape == tuple(theirs.bias.shape) and mx.all(layer.bias == 0)


@pytest.mark.parametrize("name", EAGER)
def test_reset_parameters(name):
    "New values from the same bound, in the same shape and dtype; repeatable by MLX's seed."
    layer = getattr(fc, name)(64, 32, 3, dtype=mx.float16)
    weight, bias = layer.weight, layer.bias
    mx.random.seed(7)
    layer.reset_parameters()
    again, bound = layer.weight, 1 / sqrt(weight.shape[1] * np.prod(weight.shape[2:]))
    assert (again.shape, again.dtype) == (weight.shape, mx.float16)
    assert layer.bias.shape == bias.shape and layer.bias.dtype == mx.float16
    assert not mx.array_equal(again, weight) and not mx.array_equal(layer.bias, bias)
    assert 0.95 * bound < mx.abs(again).max() <= bound * 1.001
    mx.random.seed(7)
    layer.reset_parameters()
    assert mx.array_equal(layer.weight, again)


def test_no_bias_stays_none():
    "`bias=False` and None leave the attribute None, also after a reset."
    for bias in (False, None, 0):
        layer = fc.Conv2d(2, 2, 1, bias=bias)
        layer.reset_parameters()
        assert layer.bias is None and list(layer.state_dict()) == ["weight"]


# Behaviour -----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ("zeros", "circular"))
@pytest.mark.parametrize("n", (1, 2, 3))
def test_overridden_conv_forward(n, mode):
    "Weight standardisation, written as PyTorch's users write it, gives PyTorch's numbers."
    name = f"Conv{n}d"

    class Ours(getattr(fc, name)):
        def __call__(self, x):
            w = self.weight
            over = tuple(range(1, w.ndim))
            variance = w.var(over, keepdims=True)
            w = (w - w.mean(over, keepdims=True)) / mx.sqrt(variance + 1e-5)
            return self._conv_forward(x, w, self.bias)

    class Theirs(getattr(torch.nn, name)):
        def forward(self, x):
            w = self.weight
            over = tuple(range(1, w.ndim))
            variance = w.var(over, keepdim=True, correction=0)
            w = (w - w.mean(over, keepdim=True)) / torch.sqrt(variance + 1e-5)
            return self._conv_forward(x, w, self.bias)

    ours, theirs = (cls(4, 6, 3, padding=1, padding_mode=mode) for cls in (Ours, Theirs))
    share(ours, theirs)
    x = given(name, 4)
    y, judged = ours(x), theirs.double()(oracle.to_torch(x)).detach()
    oracle.assert_within_rounding(y, judged, torch.full_like(judged, 60.0), mx.float32)


@pytest.mark.parametrize("n", (1, 2, 3))
def test_an_overridden_conv_forward_is_called(n):
    "The layer's call goes through `_conv_forward(input, weight, bias)`."
    class Negative(getattr(fc, f"Conv{n}d")):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, -weight, None)

    layer = Negative(2, 3, 1)
    x = given(f"Conv{n}d", 2)
    plain = getattr(fc, f"Conv{n}d")(2, 3, 1)
    plain.weight, plain.bias = -layer.weight, mx.zeros(3)
    assert mx.array_equal(layer(x), plain(x))


CHANGES = [{"stride": (2, 1, 3)}, {"stride": 2}, {"padding": (2, 0, 1)}, {"padding": 1},
           {"dilation": (2, 1, 1)}, {"groups": 2}]
CHANGES_OF = {
    "Conv": CHANGES + [{"padding": "same"}, {"padding_mode": "reflect"},
                       {"padding_mode": "circular", "padding": "same"}],
    "ConvTranspose": CHANGES + [{"output_padding": (1, 0, 1)}],
}


@pytest.mark.parametrize("name, change", [(k, c) for k in EAGER for c in CHANGES_OF[k[:-2]]],
                         ids=str)
def test_attributes_are_read_at_the_call(name, change):
    "A layer whose attribute was changed equals one that was built with the new value."
    n = int(name[-2])
    base = {"padding": 2, "dilation": 2} | ({"stride": 2} if "Transpose" in name else {})
    _, theirs = build(name, 4, 4, 3, **base | change)
    ours = getattr(fc, name)(4, 4, 3, **base)
    for k, v in change.items(): setattr(ours, k, axes(v, n))
    ours.weight = oracle.to_mlx(theirs.weight)
    ours.bias = oracle.to_mlx(theirs.bias)
    check(ours, theirs, given(name, 4))


@pytest.mark.parametrize("name", EAGER)
def test_a_bias_can_be_removed_and_added(name):
    "Setting `bias` to None or an array takes effect at the next call."
    layer = getattr(fc, name)(2, 4, 3)
    x, bias = given(name, 2), layer.bias
    full = layer(x)
    layer.bias = None
    bare = layer(x)
    assert mx.allclose(bare + bias.reshape(-1, *(1,) * int(name[-2])), full, atol=1e-6)
    assert "bias=False" in repr(layer) and list(layer.state_dict()) == ["weight"]
    layer.bias = bias
    assert mx.array_equal(layer(x), full)


COPIES = {"pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("kw", [{}, {"dtype": mx.bfloat16}, {"dtype": mx.complex64, "bias": False},
                                {"device": mx.cpu}, {"data_format": "channels_last", "groups": 2}],
                         ids=str)
@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("name", EAGER)
def test_copies(name, copier, kw):
    "A copy computes the same, prints the same, and goes its own way afterwards."
    layer = getattr(fc, name)(4, 6, 3, 2, 1, **kw)
    layer.eval()
    twin = COPIES[copier](layer)
    x = given(name, 4, dtype=kw.get("dtype", mx.float32))
    if "data_format" in kw: x = mx.moveaxis(x, 1, -1)
    before = layer(x)
    assert type(twin) is type(layer) and repr(twin) == repr(layer) and not twin.training
    assert twin.device == layer.device
    assert mx.array_equal(twin(x), before)
    twin.weight = twin.weight + 1
    twin.stride = 1
    assert mx.array_equal(layer(x), before)
    twin.weight = layer.weight
    assert twin(x).shape != before.shape


def test_a_copy_keeps_what_is_frozen():
    "Frozen parameters stay frozen in a copy, and thaw apart from the original's."
    layer = fc.Conv1d(2, 3, 1)
    layer.freeze(keys="bias")
    for copier in COPIES.values():
        twin = copier(layer)
        assert list(twin.trainable_parameters()) == ["weight"]
        twin.unfreeze()
        assert list(layer.trainable_parameters()) == ["weight"]


@pytest.mark.parametrize("device", (mx.cpu, mx.Device(mx.cpu), mx.Device(mx.cpu, 0)), ids=repr)
def test_device(device):
    "A device type or a device, kept as an `mx.Device`; the layer works there, float64 included."
    layer = fc.Conv2d(2, 3, 3, device=device, dtype=mx.float64)
    assert layer.device == mx.Device(mx.cpu, 0) and isinstance(layer.device, mx.Device)
    with mx.stream(mx.cpu): x = mx.ones((1, 2, 4, 4)).astype(mx.float64)
    assert layer(x).dtype == mx.float64
    assert fc.Conv2d(2, 3, 3).device is None


@pytest.mark.parametrize("name", ("Conv2d", "ConvTranspose2d"))
def test_the_device_is_where_the_layer_works(name, monkeypatch):
    "Construction, reset and call enter the stream of the layer's device, and of no other."
    entered, stream = [], mx.stream

    def spy(where):
        entered.append(where)
        return stream(where)

    monkeypatch.setattr(mx, "stream", spy)
    layer = getattr(fc, name)(2, 3, 3, device=mx.cpu)
    for step in (lambda: None, layer.reset_parameters, lambda: layer(mx.zeros((1, 2, 4, 4)))):
        step()
        assert entered and set(map(str, entered)) == {str(mx.Device(mx.cpu))}
        entered.clear()


def test_a_device_that_is_not_there():
    "No GPU is an error, never a silent CPU."
    if mx.is_available(mx.gpu): pytest.skip("this machine has a GPU")
    with pytest.raises((RuntimeError, ValueError)): fc.Conv2d(2, 3, 3, device=mx.gpu)


@pytest.mark.parametrize("name", EAGER)
def test_base_classes(name):
    "One family, as `isinstance` sees it in PyTorch, and MLX modules."
    cls = getattr(fc, name)
    assert issubclass(cls, fc._ConvNd) and issubclass(cls, mlx.nn.Module)
    assert issubclass(cls, fc._ConvTransposeNd) == issubclass(
        getattr(torch.nn, name), torch.nn.modules.conv._ConvTransposeNd)
    lazy = getattr(fc, "Lazy" + name)
    assert issubclass(lazy, cls) and lazy.cls_to_become is cls
