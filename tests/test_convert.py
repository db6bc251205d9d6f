"""flashconv.convert: the same numbers, the same bits, and refusals that say why.

PyTorch is the judge where it is installed. What `to_mlx` refuses because MLX is wrong is compared
with MLX itself, so that a skipped test says when MLX has been mended.
"""
import copy
import itertools
import pickle
import subprocess
import sys
from functools import partial

import flashconv
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flashconv.convert import from_mlx, from_torch, to_mlx, to_torch
from flashconv.lazy import UninitializedParameter

try: import torch
except ImportError: torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")

DIMS = (1, 2, 3)
FULL = [kind + f"{n}d" for kind in ("Conv", "ConvTranspose") for n in DIMS]
LAZY = ["Lazy" + name for name in FULL]
DTYPES = ("float32", "float16", "bfloat16", "float64", "complex64")
INTS = {"float32": "int32", "float16": "int16", "bfloat16": "int16", "float64": "int64",
        "complex64": "int64"}


def ours_of(name): return getattr(flashconv, name)
def theirs_of(name): return getattr(torch.nn, name)


def bits(value):
    "The bytes of an array or a tensor, and its shape."
    if isinstance(value, mx.array):
        with mx.stream(mx.cpu):
            if value.dtype == mx.bfloat16: value = value.view(mx.int16)
            return value.shape, np.array(value, order="C").tobytes()
    value = value.detach()
    if value.dtype == torch.bfloat16: value = value.view(torch.int16)
    return tuple(value.shape), value.contiguous().numpy().tobytes()


def state_bits(layer): return {name: bits(value) for name, value in layer.state_dict().items()}


def close(ours, theirs, tolerance=2e-5):
    ours, theirs = np.array(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def like_torch(ours, theirs, shape):
    "The two layers give the same for an input of this shape, channels first."
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    place = -ours.num_spatial_dims - 1
    last = ours.data_format == "channels_last"
    y = np.array(ours(mx.array(np.moveaxis(x, place, -1) if last else x)))
    close(np.moveaxis(y, -1, place) if last else y, theirs(torch.from_numpy(x)).detach().numpy())


CONFIGS = {
    "plain": {}, "strided": dict(stride=2, padding=1), "dilated": dict(dilation=2, padding=2),
    "pointwise": dict(kernel_size=1), "square": dict(kernel_size=4),
    "grouped": dict(groups=2, bias=False), "depthwise": dict(groups=4, stride=2),
    "same": dict(padding="same", kernel_size=2, dilation=2), "valid": dict(padding="valid"),
    "output": dict(stride=3, padding=1, output_padding=2, groups=2),
}


def arguments(name, config, **more):
    "What to make a layer with; None where the configuration is not for this kind."
    config = {"kernel_size": 3} | CONFIGS.get(config, {}) | more
    transposed = "Transpose" in name
    if transposed and isinstance(config.get("padding"), str): return None
    if not transposed and "output_padding" in config: return None
    return config


GRID = [(name, config) for name in FULL for config in CONFIGS if arguments(name, config)]


# numbers, both ways

@needs_torch
@pytest.mark.parametrize("name, config", GRID)
def test_same_as_torch(name, config):
    n, given = int(name[-2]), arguments(name, config)
    theirs = theirs_of(name)(4, 4 * given.get("groups", 1), **given)
    for data_format in ("channels_first", "channels_last"):
        ours = from_torch(theirs, data_format=data_format)
        assert type(ours) is ours_of(name) and ours.data_format == data_format
        like_torch(ours, theirs, (2, 4, *(5, 6, 4)[:n]))
        like_torch(ours, theirs, (4, *(5, 6, 4)[:n]))
        back = to_torch(ours)
        assert type(back) is theirs_of(name) and repr(back) == repr(theirs)
        assert state_bits(back) == state_bits(ours) == state_bits(theirs)
        like_torch(ours, back, (2, 4, *(5, 6, 4)[:n]))
    assert repr(from_torch(theirs)) == repr(theirs)


@needs_torch
@pytest.mark.parametrize("n, mode, padding", list(itertools.product(
    DIMS, ("reflect", "replicate", "circular"), (0, 1, "same", "per axis"))))
def test_padding_modes(n, mode, padding):
    if padding == "per axis": padding = (1, 0, 2)[:n]
    theirs = theirs_of(f"Conv{n}d")(2, 4, 2, padding=padding, padding_mode=mode, groups=2)
    ours = from_torch(theirs)
    assert repr(ours) == repr(theirs) == repr(to_torch(ours))
    like_torch(ours, theirs, (1, 2, *(4, 5, 4)[:n]))
    like_torch(ours, to_torch(ours), (1, 2, *(4, 5, 4)[:n]))


@needs_torch
def test_changed_attributes_count():
    theirs = torch.nn.Conv2d(2, 2, 3)
    theirs.padding, theirs.stride, theirs.dilation = (1, 2), 2, [1, 2]
    like_torch(from_torch(theirs), theirs, (1, 2, 6, 6))
    ours = flashconv.Conv2d(2, 2, 3)
    ours.padding, ours.stride, ours.dilation = "same", 1, 2
    like_torch(ours, to_torch(ours), (1, 2, 6, 6))
    x = mx.random.normal((1, 2, 6, 6))
    close(to_mlx(ours)(mx.moveaxis(x, 1, -1)), mx.moveaxis(ours(x), 1, -1))
    tiling = torch.nn.Conv2d(2, 2, 3, padding=1)
    tiling.padding_mode = "circular"
    like_torch(from_torch(tiling), tiling, (1, 2, 5, 5))


@needs_torch
def test_a_pruned_layer_is_taken_by_its_weight():
    theirs = torch.nn.Conv1d(4, 8, 3)
    theirs.weight = torch.nn.Parameter(theirs.weight[:5, :3].detach().clone())
    theirs.bias = torch.nn.Parameter(theirs.bias[:5].detach().clone())
    ours = from_torch(theirs)
    assert (ours.in_channels, ours.out_channels) == (3, 5)
    like_torch(ours, theirs, (1, 3, 6))


# bits and dtypes

def odd_values(dtype, shape):
    "Random bits, which are denormal, infinite, NaN of any payload, or a negative zero at times."
    size = np.dtype(INTS[dtype]).itemsize
    raw = np.random.default_rng(1).integers(0, 256, (*shape, size), dtype=np.uint8)
    return raw.view(INTS[dtype])[..., 0]


@needs_torch
@pytest.mark.parametrize("name, dtype", list(itertools.product(FULL, DTYPES)))
def test_bits(name, dtype):
    given = dict(groups=2, dtype=getattr(torch, dtype))
    theirs = theirs_of(name)(4, 6, 3, **given)
    with torch.no_grad():
        for parameter in theirs.parameters():
            raw = torch.from_numpy(odd_values(dtype, parameter.shape))
            parameter.copy_(raw.view(getattr(torch, dtype))) if dtype != "bfloat16" else (
                parameter.view(torch.int16).copy_(raw))
    before = state_bits(theirs)
    ours = from_torch(theirs)
    assert {a.dtype for a in ours.state_dict().values()} == {getattr(mx, dtype)}
    assert state_bits(ours) == before == state_bits(theirs)
    back = to_torch(ours)
    assert {t.dtype for t in back.state_dict().values()} == {getattr(torch, dtype)}
    assert state_bits(back) == before
    assert all(t.is_contiguous() and t.is_leaf for t in back.parameters())
    assert ours.device == (mx.Device(mx.cpu) if dtype == "float64" else None)


@pytest.mark.parametrize("name, dtype", list(itertools.product(FULL, DTYPES[:3])))
def test_bits_of_mlx(name, dtype):
    ours = ours_of(name)(4, 6, 3, dtype=getattr(mx, dtype))
    for key, value in ours.state_dict().items():
        ours[key] = mx.array(odd_values(dtype, value.shape)).view(getattr(mx, dtype))
    before = state_bits(ours)
    theirs = to_mlx(ours)
    assert type(theirs) is getattr(nn, name) and theirs.weight.dtype == getattr(mx, dtype)
    assert theirs.weight.shape == getattr(nn, name)(4, 6, 3).weight.shape
    assert state_bits(from_mlx(theirs)) == before == state_bits(ours)


@pytest.mark.parametrize("dtype", ("float64", "complex64"))
def test_mlx_weights_of_dtypes_that_mlx_cannot_convolve(dtype):
    theirs = nn.Conv2d(2, 3, 2)
    theirs.weight = mx.ones(theirs.weight.shape, getattr(mx, dtype), stream=mx.cpu)
    theirs.bias = mx.zeros((3,), getattr(mx, dtype), stream=mx.cpu)
    y = from_mlx(theirs)(mx.ones((1, 4, 4, 2), getattr(mx, dtype), stream=mx.cpu))
    assert y.dtype == getattr(mx, dtype) and (np.array(y) == 8).all()


@needs_torch
def test_memory_order_of_the_tensor_does_not_matter():
    theirs = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    theirs.bias = torch.nn.Parameter(torch.randn(8)[::2])
    assert state_bits(from_torch(theirs)) == state_bits(theirs)
    theirs = torch.nn.Conv1d(2, 2, 2, dtype=torch.complex64)
    theirs.weight = torch.nn.Parameter(theirs.weight.detach().conj())
    right = theirs.weight.detach().resolve_conj()
    assert theirs.weight.is_conj() and bits(from_torch(theirs).weight) == bits(right)


@needs_torch
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("channels, dtype", list(itertools.product(((0, 3), (3, 0)), DTYPES)))
def test_no_channels(channels, dtype):
    theirs = torch.nn.Conv2d(*channels, 2, dtype=getattr(torch, dtype))
    ours = from_torch(theirs)
    assert (ours.in_channels, ours.out_channels) == channels
    assert state_bits(to_torch(ours)) == state_bits(ours) == state_bits(theirs)
    with pytest.raises(ValueError, match="MLX ends the process"): to_mlx(ours)


# what comes along, and what is left alone

@needs_torch
@pytest.mark.parametrize("training, weight, bias",
                         list(itertools.product((True, False), repeat=3)))
def test_mode_and_frozen(training, weight, bias):
    theirs = torch.nn.Conv1d(2, 3, 2).train(training)
    theirs.weight.requires_grad_(weight), theirs.bias.requires_grad_(bias)
    trainable = {name for name, on in (("weight", weight), ("bias", bias)) if on}
    ours = from_torch(theirs)
    mlx = to_mlx(ours)
    for layer in (ours, mlx, from_mlx(mlx)):
        assert layer.training is training and set(layer.trainable_parameters()) == trainable
    for layer in (to_torch(ours), theirs):
        assert layer.training is training
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == trainable
    assert set(ours.unfreeze().trainable_parameters()) == {"weight", "bias"}
    assert set(mlx.trainable_parameters()) == trainable


@needs_torch
def test_copies_are_independent_of_torch():
    theirs = torch.nn.Conv2d(2, 3, 2)
    ours = from_torch(theirs)
    before = state_bits(ours)
    with torch.no_grad(): theirs.weight.zero_(), theirs.bias.zero_()
    assert state_bits(ours) == before
    back = to_torch(ours)
    with torch.no_grad(): back.weight.zero_()
    assert state_bits(ours) == before
    back = to_torch(ours)
    ours.weight[0] = 7
    assert state_bits(back) == before


def test_copies_are_independent_of_mlx():
    theirs = nn.Conv2d(2, 3, 2)
    theirs.bias = mx.arange(3.0)
    ours = from_mlx(theirs)
    before, frozen = state_bits(ours), set(ours._no_grad)
    theirs.weight[0] = 7
    theirs.bias[0] = 7
    theirs.freeze()
    assert state_bits(ours) == before and ours._no_grad == frozen
    back = to_mlx(ours)
    back.weight[0] = 7
    back.bias[0] = 7
    assert state_bits(ours) == before


@needs_torch
def test_nothing_random_is_drawn():
    layers, theirs = [ours_of(name)(4, 3, 2) for name in FULL], nn.Conv1d(2, 2, 2)
    layers += [ours_of(name)(4, 3) for name in LAZY]
    torch_state, key = torch.random.get_rng_state(), np.array(mx.random.state[0])
    for layer in layers: from_torch(to_torch(layer))
    from_mlx(theirs)
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert np.array_equal(key, np.array(mx.random.state[0]))


@needs_torch
def test_a_converted_layer_trains():
    ours = from_torch(torch.nn.Conv1d(2, 3, 2))
    ours.freeze(keys="bias")
    _, gradients = nn.value_and_grad(ours, lambda x: ours(x).square().sum())(mx.ones((1, 2, 4)))
    assert list(gradients) == ["weight"]


# lazy layers

@needs_torch
@pytest.mark.parametrize("name, bias", list(itertools.product(LAZY, (True, False))))
def test_lazy(name, bias):
    n = int(name[-2])
    theirs = theirs_of(name)(4, 3, groups=2, bias=bias, dtype=torch.float16).eval()
    ours = from_torch(theirs, data_format="channels_last")
    assert type(ours) is ours_of(name) and not ours.training
    assert repr(from_torch(theirs)) == repr(theirs)
    assert {type(v) for v in ours.state_dict().values()} == {UninitializedParameter}
    back = to_torch(ours)
    assert type(back) is theirs_of(name) and repr(back) == repr(theirs) and not back.training
    assert back.has_uninitialized_params() and theirs.has_uninitialized_params()
    y = ours(mx.ones((1, *(4,) * n, 6), mx.float16))
    assert ours.weight.dtype == mx.float16 and ours.in_channels == 6
    assert (ours.bias is not None) == bias
    x = torch.ones((1, 6, *(4,) * n), dtype=torch.float16)
    assert np.moveaxis(np.array(y), -1, 1).shape == tuple(back(x).shape)
    assert back.weight.dtype == torch.float16 and back.weight.device.type == "cpu"
    with pytest.raises(ValueError, match="flashconv.materialize"): to_mlx(from_torch(theirs))


@needs_torch
@pytest.mark.parametrize("name", LAZY)
def test_loaded_lazy_layers_become_full(name):
    n, full = int(name[-2]), theirs_of(name.removeprefix("Lazy"))(6, 4, 3, groups=2)
    theirs = theirs_of(name)(4, 3, groups=2)
    theirs.load_state_dict(full.state_dict())
    assert type(theirs) is theirs_of(name) and theirs.in_channels == 0
    ours = from_torch(theirs)
    assert type(ours) is ours_of(name.removeprefix("Lazy")) and repr(ours) == repr(full)
    assert state_bits(ours) == state_bits(full)
    like_torch(ours, full, (1, 6, *(4,) * n))
    assert type(theirs) is theirs_of(name)
    theirs(torch.ones((1, 6, *(4,) * n)))
    assert repr(from_torch(theirs)).startswith(name.removeprefix("Lazy"))


@needs_torch
def test_half_loaded_lazy_layers_stay_lazy():
    theirs = torch.nn.LazyConv1d(3, 2)
    theirs.load_state_dict({"bias": torch.arange(3.0)}, strict=False)
    ours = from_torch(theirs)
    assert type(ours) is flashconv.LazyConv1d and ours.bias.tolist() == [0, 1, 2]
    back = to_torch(ours)
    assert back.bias.tolist() == [0, 1, 2] and torch.nn.parameter.is_lazy(back.weight)
    ours(mx.ones((1, 2, 4)))
    assert type(ours) is flashconv.Conv1d and ours.bias.tolist() == [0, 1, 2]


@needs_torch
def test_frozen_lazy_layers_stay_frozen():
    theirs = torch.nn.LazyConv1d(3, 2)
    theirs.weight.requires_grad = False
    ours = from_torch(theirs)
    back = to_torch(ours)
    assert not back.weight.requires_grad and back.bias.requires_grad
    ours(mx.ones((1, 2, 4)))
    assert list(ours.trainable_parameters()) == ["bias"]
    back(torch.ones((1, 2, 4)))
    assert not back.weight.requires_grad


# mlx.nn

@pytest.mark.parametrize("name, config", GRID)
def test_same_as_mlx(name, config):
    n, given = int(name[-2]), arguments(name, config, bias=config != "grouped")
    ours = ours_of(name)(4, 4 * given.get("groups", 1), **given)
    if config == "same" or given.get("groups", 1) > 1 and (n == 3 or ours.transposed):
        if config != "same": pytest.raises(ValueError, to_mlx, ours).match("groups=")
        else: assert to_mlx(ours).padding in (1, (1,) * n)
        return
    if config == "output": given["groups"] = 1
    x = mx.random.normal((2, 4, *(5, 6, 4)[:n]))
    last = mx.moveaxis(x, 1, -1)
    theirs = to_mlx(ours)
    close(theirs(last), mx.moveaxis(ours(x), 1, -1))
    back = from_mlx(theirs)
    assert type(back) is type(ours) and back.data_format == "channels_last"
    assert state_bits(back) == state_bits(ours)
    close(back(last), theirs(last))
    for number in "stride dilation groups output_padding in_channels out_channels".split():
        assert getattr(back, number) == getattr(ours, number)


@pytest.mark.parametrize("make", [
    lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
    lambda: nn.Conv2d(4, 6, (3, 2), [2, 1], (1, 0), dilation=(1, 2), groups=2, bias=False),
    lambda: nn.Conv2d(4, 4, 4), lambda: nn.Conv1d(4, 4, 1),
    lambda: nn.Conv3d(4, 2, (1, 2, 3), stride=(2, 1, 1), padding=1, dilation=(1, 1, 2)),
    lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2),
    lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
    lambda: nn.ConvTranspose3d(4, 4, 4, stride=2, bias=False)])
def test_from_mlx_by_its_own_arguments(make):
    theirs = make().eval()
    ours = from_mlx(theirs)
    x = mx.random.normal((2, *(6,) * ours.num_spatial_dims, 4))
    close(ours(x), theirs(x))
    back = to_mlx(ours)
    assert not back.training and ("bias" in back) == ("bias" in theirs)
    assert bits(back.weight) == bits(theirs.weight)
    close(back(x), theirs(x))


def test_from_mlx_takes_later_changes():
    theirs = nn.Conv1d(2, 2, 3)
    theirs.padding, theirs.stride = 2, 2
    x = mx.random.normal((1, 7, 2))
    close(from_mlx(theirs)(x), theirs(x))
    del theirs.bias
    close(from_mlx(theirs)(x), theirs(x))


def pieces(f, x, w, cotangent=None):
    "f's output, or its two gradients; an error's type in place of what fails."
    def attempt(g):
        try:
            y = g()
            mx.eval(y)
            return y
        except (ValueError, RuntimeError) as error: return type(error)
    if cotangent is None: return attempt(lambda: f(x, w))
    return [attempt(lambda: mx.vjp(lambda a: [f(a, w)], [x], [cotangent])[1][0]),
            attempt(lambda: mx.vjp(lambda a: [f(x, a)], [w], [cotangent])[1][0])]


def agrees(ours, x):
    "Whether mx.conv_transpose* gives what our channels-last layer gives, gradients included."
    n = ours.num_spatial_dims
    mlx = getattr(mx, f"conv_transpose{n}d")
    numbers = [getattr(ours, name) if n > 1 else getattr(ours, name)[0]
               for name in ("stride", "padding", "dilation", "output_padding")]
    def theirs(a, w): return mlx(a, mx.moveaxis(w, 0, -1), *numbers)
    def right(a, w):
        conv = getattr(flashconv.functional, f"conv_transpose{n}d")
        return conv(a, w, None, ours.stride, ours.padding, ours.output_padding, 1, ours.dilation,
                    data_format="channels_last")
    def same(a, b):
        if not isinstance(a, mx.array) or a.shape != b.shape: return False
        return mx.allclose(a, b, 1e-4, 1e-4).item()
    y = right(x, ours.weight)
    if not same(pieces(theirs, x, ours.weight), y): return False
    c = mx.random.normal(y.shape)
    return all(map(same, pieces(theirs, x, ours.weight, c), pieces(right, x, ours.weight, c)))


TRANSPOSED = [(k, s, p, d, o) for k, s, d in itertools.product((1, 2, 3), (1, 2, 3), (1, 2))
              for p in range(d * (k - 1) + 2) for o in range(max(s, d))]


def check_refusals(layers):
    "to_mlx refuses a layer exactly where MLX differs from ours."
    mended = []
    for layer in layers:
        n, seen = layer.num_spatial_dims, []
        for size in (1, 2, 5):
            try: layer(mx.ones((1, *(size,) * n, layer.in_channels)))
            except RuntimeError: continue  # nothing would be left of the output
            x = mx.random.normal((2, *(size,) * n, layer.in_channels))
            seen.append(agrees(layer, x))
        try:
            to_mlx(layer)
            assert all(seen), f"MLX differs from {layer}, and to_mlx does not refuse it"
        except ValueError as error:
            assert "MLX" in str(error)
            if seen and all(seen): mended.append(repr(layer))
    if not mended: return
    found = f"MLX {mx.__version__} is right for {len(mended)} refused layers: {mended[:3]}"
    (pytest.fail if mx.__version__ == "0.32.4" else pytest.skip)(found)


@pytest.mark.parametrize("part", range(4))
def test_to_mlx_refuses_what_mlx_gets_wrong(part):
    layer = partial(flashconv.ConvTranspose1d, 2, 3, data_format="channels_last")
    check_refusals(layer(k, s, p, o, dilation=d) for k, s, p, d, o in TRANSPOSED[part::4])


def test_to_mlx_refuses_what_mlx_gets_wrong_in_two_dimensions():
    rng = np.random.default_rng(0)
    picked = [[TRANSPOSED[i] for i in rng.integers(len(TRANSPOSED), size=2)] for _ in range(60)]
    layer = partial(flashconv.ConvTranspose2d, 1, 2, data_format="channels_last")
    cases = (map(tuple, zip(*pair)) for pair in picked)
    check_refusals(layer(k, s, p, o, dilation=d) for k, s, p, d, o in cases)


def test_what_mlx_lacks():
    def refusal(layer):
        with pytest.raises(ValueError, match="mlx.nn has no equal of") as caught: to_mlx(layer)
        return str(caught.value)
    Conv1d, Conv2d, Conv3d = flashconv.Conv1d, flashconv.Conv2d, flashconv.Conv3d
    assert "groups=2" in refusal(Conv3d(2, 2, 1, groups=2))
    for n in DIMS: assert "groups=2" in refusal(ours_of(f"ConvTranspose{n}d")(2, 2, 1, groups=2))
    for mode in ("reflect", "replicate", "circular"):
        padded = Conv2d(2, 2, 3, padding=(0, 1), padding_mode=mode)
        assert f"padding_mode='{mode}'" in refusal(padded)
        assert type(to_mlx(Conv2d(2, 2, 3, padding_mode=mode))) is nn.Conv2d
    assert "((0, 1),)" in refusal(Conv1d(2, 2, 2, padding="same"))
    assert "float64" in refusal(Conv1d(2, 2, 2, dtype=mx.float64, device=mx.cpu))
    assert "complex64" in refusal(Conv1d(2, 2, 2, dtype=mx.complex64))
    assert "padding=(-1,)" in refusal(Conv1d(2, 2, 2, padding=-1))
    assert "output_padding=1" in refusal(flashconv.ConvTranspose1d(2, 2, 2, output_padding=1))
    everything = refusal(Conv3d(2, 2, (1, 2, 3), padding="same", padding_mode="reflect", groups=2,
                                dtype=mx.complex64))
    assert all(what in everything for what in ("groups=2", "reflect", "(0, 1)", "complex64"))
    everything = refusal(flashconv.ConvTranspose2d(2, 2, (1, 3), 2, (1, 0), (0, 1), groups=2))
    assert "groups=2" in everything and "output_padding=1 above" in everything
    assert "with padding=1 above" in everything


@pytest.mark.parametrize("shapes", ("(1, 4, 0), (3, 2, 0)", "(1, 4, 2), (0, 2, 2)"))
def test_mlx_ends_the_process_for_a_weight_without_elements(shapes):
    code = ("import mlx.core as mx; shapes = [%s]; y = mx.conv1d(*map(mx.zeros, shapes)); "
            "print(y.tolist(), 'lived')" % shapes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "lived" in done.stdout: pytest.skip(f"MLX {mx.__version__} survives {shapes}")


@needs_torch
def test_mlx_convolves_float64_as_float32():
    ours = flashconv.Conv1d(64, 4, 5, bias=False, dtype=mx.float64, device=mx.cpu)
    x = np.random.default_rng(0).standard_normal((1, 64, 9))
    right = to_torch(ours)(torch.from_numpy(x)).detach().numpy()
    with mx.stream(mx.cpu):
        x = mx.array(x, dtype=mx.float64)
        close(ours(x), right, 1e-13)
        mlx = np.array(mx.conv1d(x.swapaxes(1, 2), ours.weight.swapaxes(1, 2))).swapaxes(1, 2)
    if np.abs(mlx - right).max() < 1e-12: pytest.skip(f"MLX {mx.__version__} has float64 now")


# refusals

@needs_torch
def test_unknown_types():
    for wrong in (None, 3, "Conv1d", torch.nn.Conv1d, torch.nn.Linear(1, 1), nn.Conv1d(1, 1, 1),
                  flashconv.Conv1d(1, 1, 1), torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1))):
        with pytest.raises(TypeError, match="layer of torch.nn: Conv1d, .*but got"):
            from_torch(wrong)
    for wrong in (None, nn.Linear(1, 1), torch.nn.Conv1d(1, 1, 1), flashconv.Conv1d(1, 1, 1)):
        with pytest.raises(TypeError, match="layer of mlx.nn: Conv1d, .*but got"): from_mlx(wrong)
    for convert in (to_torch, to_mlx):
        for wrong in (None, nn.Conv1d(1, 1, 1), torch.nn.Conv1d(1, 1, 1), nn.Linear(1, 1)):
            with pytest.raises(TypeError, match="layer of flashconv: Conv1d, .*but got"):
                convert(wrong)
    with pytest.raises(ValueError, match="data_format"):
        from_torch(torch.nn.Conv1d(1, 1, 1), data_format="NCHW")


@needs_torch
def test_subclasses():
    class Plain(torch.nn.Conv2d):
        def __init__(self, channels): super().__init__(channels, channels, 3, padding=1)
        def fuse(self): return self

    class Forward(Plain):
        def forward(self, x): return super().forward(x).relu()

    class Hidden(Forward):
        pass

    class Inner(Plain):
        def _conv_forward(self, *args): return super()._conv_forward(*args)

    theirs = Plain(2)
    assert type(from_torch(theirs)) is flashconv.Conv2d
    like_torch(from_torch(theirs), theirs, (1, 2, 4, 4))
    with pytest.raises(ValueError, match="Forward is not a plain Conv2d: it replaces forward"):
        from_torch(Forward(2))
    with pytest.raises(ValueError, match="it replaces forward"): from_torch(Hidden(2))
    with pytest.raises(ValueError, match="it replaces _conv_forward"): from_torch(Inner(2))
    theirs.forward = lambda x: x
    with pytest.raises(ValueError, match="it replaces forward"): from_torch(theirs)


@pytest.mark.parametrize("convert, base", [
    (to_mlx, flashconv.Conv2d), (from_mlx, nn.Conv2d),
    pytest.param(to_torch, flashconv.Conv2d, marks=needs_torch)])
def test_subclasses_of_ours_and_mlx(convert, base):
    class Plain(base):
        def __init__(self): super().__init__(2, 2, 3)

    class Called(Plain):
        def __call__(self, x): return super().__call__(x) + 1

    assert type(convert(Plain())).__name__ == "Conv2d"
    with pytest.raises(ValueError, match="Called is not a plain Conv2d: it replaces __call__"):
        convert(Called())
    if base is nn.Conv2d: return

    class Standardized(Plain):
        def _conv_forward(self, x, weight, bias): return super()._conv_forward(x, weight - 1, bias)

    with pytest.raises(ValueError, match="it replaces _conv_forward"): convert(Standardized())
    changed = Plain()
    changed._conv_forward = lambda input, weight, bias: input
    with pytest.raises(ValueError, match="it replaces _conv_forward"): convert(changed)


def additions(layer, torch):
    "Adds one of each kind to a layer of PyTorch's."
    layer.scale = torch.nn.Parameter(torch.ones(1))
    layer.fixed = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    layer.register_buffer("mask", torch.tensor([True, False]))
    layer.register_buffer("window", torch.arange(3), persistent=False)
    layer.register_parameter("shift", None)
    layer.i, layer.f, layer._note, layer.table = 4, [-1, (6,)], "text", {"a": [torch.ones(2)]}
    return layer


@needs_torch
@pytest.mark.parametrize("name", FULL + LAZY)
def test_additions_there_and_back(name):
    "What was added is there, in the state exactly where PyTorch has it, and comes back as it was."
    theirs = additions(theirs_of(name)(*(2,) * (not name.startswith("Lazy")), 2, 1), torch)
    state = theirs.state_dict()
    ours = from_torch(theirs)
    assert list(ours.state_dict()) == list(state) == ["weight", "bias", "scale", "fixed", "mask"]
    assert (ours.i, ours.f, ours._note, ours.shift) == (4, [-1, (6,)], "text", None)
    assert ours.f is not theirs.f and ours.window.tolist() == [0, 1, 2]
    assert ours.table["a"][0].tolist() == [1, 1]
    back = to_torch(ours)
    assert list(back.state_dict()) == list(state) and set(dict(back.named_buffers())) == {"mask", "window"}
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()}
    assert back._non_persistent_buffers_set == {"window"} and back.mask.dtype == torch.bool
    assert (back.i, back.f, back._note, back.shift) == (4, [-1, (6,)], "text", None)
    assert torch.equal(back.table["a"][0], torch.ones(2))
    ours(mx.ones((1, 2, *(4,) * int(name[-2]))))
    assert sorted(ours.trainable_parameters()) == ["bias", "scale", "weight"]
    assert sorted(ours.unfreeze().trainable_parameters()) == ["bias", "fixed", "scale", "weight"]
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert state_bits(copied) == state_bits(ours) and copied.i == 4
        assert sorted(copied.unfreeze().trainable_parameters()) == ["bias", "fixed", "scale", "weight"]


@needs_torch
def test_additions_in_the_way():
    "All of them in one error."
    theirs = torch.nn.Conv1d(1, 1, 1)
    theirs.norm, theirs.keys, theirs.twin = torch.nn.Tanh(), 3, theirs.weight
    theirs.ref, theirs.inside, theirs.device = [theirs.weight], [torch.nn.Tanh()], "cuda"
    theirs.register_buffer("_hidden", torch.ones(1))
    with pytest.raises(ValueError) as error: from_torch(theirs)
    for part in ("its norm is a layer", "its keys has a name", "its twin is also weight",
                 "its ref can't come along: it holds weight", "its inside can't come along",
                 "its device is something else", "its _hidden begins"):
        assert part in str(error.value), part
    ours = flashconv.Conv1d(1, 1, 1)
    ours.norm, ours.several, ours.forward = nn.BatchNorm(1), [mx.ones(1)], 3
    with pytest.raises(ValueError) as error: to_torch(ours)
    for part in ("its norm holds layers", "its several is a list of arrays", "its forward is something"):
        assert part in str(error.value), part


@needs_torch
def test_redrawing_leaves_additions():
    "reset_parameters draws weight and bias."
    ours = from_torch(additions(torch.nn.Conv1d(1, 1, 1), torch))
    before = state_bits(ours)
    ours.reset_parameters()
    after = state_bits(ours)
    assert [name for name in before if before[name] != after[name]] == ["weight", "bias"]


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_reparametrized_layers():
    from torch.nn import utils
    from torch.nn.utils import parametrizations, parametrize, prune

    def conv(): return torch.nn.Conv2d(2, 3, 2)
    for make, undo in ((utils.spectral_norm, utils.remove_spectral_norm),
                       (lambda layer: prune.random_unstructured(layer, "weight", 0.5),
                        lambda layer: prune.remove(layer, "weight"))):
        layer = make(conv())
        with pytest.raises(ValueError, match="it has the hook .*; call remove_weight_norm"):
            from_torch(layer)
        undo(layer)
        like_torch(from_torch(layer), layer, (1, 2, 4, 4))
    layer = parametrizations.orthogonal(conv())
    way = r"its weight is parametrized by other .*remove_parametrizations\(layer, 'weight'\)"
    with pytest.raises(ValueError, match=way): from_torch(layer)
    plain = parametrize.remove_parametrizations(layer, "weight")
    like_torch(from_torch(plain), layer, (1, 2, 4, 4))


@needs_torch
@pytest.mark.parametrize("kind", ("forward", "forward_pre", "full_backward", "full_backward_pre"))
@pytest.mark.parametrize("name", ("Conv1d", "LazyConv1d"))
def test_hooks(name, kind):
    layer = theirs_of(name)(*([2] if name == "Conv1d" else []), 3, 2)
    handle = getattr(layer, f"register_{kind}_hook")(lambda *args: None)
    with pytest.raises(ValueError, match="it has the hook .*function"): from_torch(layer)
    handle.remove()
    from_torch(layer)


@needs_torch
def test_tensors_that_a_plain_layer_could_not_hold():
    def refused(layer, what):
        with pytest.raises(ValueError, match=f"dense tensor of float32, .*but got a {what}"):
            from_torch(layer)
    Conv1d, Parameter = torch.nn.Conv1d, torch.nn.Parameter
    refused(Conv1d(1, 1, 1, device="meta"), "Tensor of torch.float32 on meta")
    refused(Conv1d(1, 1, 1, dtype=torch.complex128), "Tensor of torch.complex128 on cpu")
    lazy = torch.nn.LazyConv1d(1, 1, dtype=torch.complex128)
    refused(lazy, "UninitializedParameter of torch.complex128")
    layer = Conv1d(1, 1, 1)
    layer.weight = Parameter(torch.ones(1, 1, 1, dtype=torch.int32), requires_grad=False)
    refused(layer, "Tensor of torch.int32")
    layer.weight = Parameter(torch.ones(1, 1, 1).to_sparse())
    refused(layer, "Tensor of torch.float32 on cpu")

    class Special(torch.Tensor): pass
    layer.weight = Parameter(torch.ones(1, 1, 1).as_subclass(Special))
    refused(layer, "Special of torch.float32")


@needs_torch
def test_padding_that_torch_does_not_notice():
    layer = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    layer.padding = (2, 1)
    noted = r"pads by \[1, 1, 1, 1\], noted at construction, where padding=\(2, 1\)"
    with pytest.raises(ValueError, match=noted): from_torch(layer)
    layer = torch.nn.Conv1d(1, 1, 3, padding="same", padding_mode="circular")
    layer.dilation = (2,)
    with pytest.raises(ValueError, match=r"pads by \[1, 1\]"): from_torch(layer)


# imports

def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_is_not_imported_and_its_absence_is_explained():
    run("""
import sys
import flashconv.convert as convert
import mlx.nn as nn
convert.to_mlx(convert.from_mlx(nn.Conv1d(1, 1, 1)))
try: convert.from_torch(nn.Conv1d(1, 1, 1))
except TypeError as error: assert "expected a layer of torch.nn" in str(error)
else: raise AssertionError
assert not {"torch", "matplotlib"} & set(sys.modules), "imported"
sys.modules["torch"] = None
try: convert.to_torch(convert.from_mlx(nn.Conv1d(1, 1, 1)))
except ImportError as error: assert "pip install flashconv[torch]" in str(error)
else: raise AssertionError
""")
