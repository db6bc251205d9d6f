"""Initialisers against torch.nn.init: distributions, exact results, arguments and errors."""
import inspect
import math
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import flashconv as fc
from flashconv import init

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")

NAMES = ("uniform", "normal", "trunc_normal", "constant", "zeros", "ones", "dirac",
         "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal")
SHAPES = [(64, 32), (48, 16, 5), (64, 32, 3, 3), (16, 8, 3, 2, 2), (96, 1, 5, 5)]


def theirs(name, shape, *args, **kw):
    "What PyTorch draws, as NumPy."
    return getattr(torch.nn.init, f"{name}_")(torch.empty(shape), *args, **kw).numpy()


def distance(a, b):
    "Kolmogorov and Smirnov's, between two samples, in units of its spread for equal ones."
    a, b = np.sort(a.ravel()), np.sort(b.ravel())
    both = np.concatenate([a, b])
    above = np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)
    return np.abs(above).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


RARE = 1.95  # one pair of samples in a thousand is further apart


DRAWS = [  # name, arguments
    ("uniform", {}), ("uniform", {"a": -3, "b": 0.5}),
    ("normal", {}), ("normal", {"mean": 2, "std": 3}),
    ("trunc_normal", {}), ("trunc_normal", {"std": 0.02}), ("trunc_normal", {"std": 3}),
    ("trunc_normal", {"mean": 1, "std": 0.5, "a": 0.9, "b": 1.3}),
    ("trunc_normal", {"mean": 0, "std": 1, "a": 1.5, "b": 4}), ("trunc_normal", {"a": 6, "b": 7}),
    ("xavier_uniform", {}), ("xavier_uniform", {"gain": 2.5}), ("xavier_normal", {}),
    ("xavier_normal", {"gain": 5 / 3}), ("kaiming_uniform", {}),
    ("kaiming_uniform", {"a": math.sqrt(5)}), ("kaiming_normal", {}),
    *((f"kaiming_{kind}", {"mode": mode, "nonlinearity": nonlinearity})
      for kind in ("uniform", "normal") for mode in ("fan_in", "fan_out")
      for nonlinearity in ("relu", "tanh", "linear", "selu")), ("orthogonal", {})]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, kw", DRAWS, ids=str)
@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_distribution(name, kw, shape):
    "PyTorch's and ours are as close as two samples of one distribution, spread and bounds too."
    many = 12  # of each, so that small shapes tell something
    keys = mx.random.split(mx.random.key(7), many)
    ours = np.stack([np.array(getattr(init, name)(mx.zeros(shape), generator=key, **kw))
                     for key in keys])
    judge = np.stack([theirs(name, shape, **kw) for _ in range(many)])
    assert ours.shape[1:] == shape and distance(ours, judge) < RARE
    assert abs(ours.std() / judge.std() - 1) < 0.05
    if "uniform" in name: assert abs(np.abs(ours).max() / np.abs(judge).max() - 1) < 0.02
    if "trunc" in name: assert kw.get("a", -2) <= ours.min() <= ours.max() <= kw.get("b", 2)


def test_the_distance_can_tell():
    "A spread that is 10 percent off is found, in the smallest of the samples above."
    n = 12 * min(map(math.prod, SHAPES))
    a = np.random.default_rng(0).normal(size=n)
    assert distance(a, np.random.default_rng(1).normal(size=n)) < RARE
    assert distance(a, 1.1 * np.random.default_rng(1).normal(size=n)) > RARE


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.bfloat16, mx.complex64), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtype(name, dtype):
    "The array's, with the spread that belongs to the distribution; complex as PyTorch has it."
    args = (3,) if name == "constant" else ()
    x = mx.zeros((32, 16, 3)).astype(dtype)
    if dtype == mx.complex64 and name in ("trunc_normal", "orthogonal"):
        with pytest.raises(NotImplementedError, match="complex64"): getattr(init, name)(x)
        with pytest.raises(NotImplementedError):
            getattr(torch.nn.init, f"{name}_")(torch.empty(4, 4, dtype=torch.complex64))
        return
    ours = getattr(init, name)(x, *args)
    assert ours.dtype == dtype and ours.shape == x.shape
    kind = torch.complex64 if dtype == mx.complex64 else torch.float32
    judge = getattr(torch.nn.init, f"{name}_")(torch.empty(32, 16, 3, dtype=kind), *args).numpy()
    ours = np.array(ours.astype(dtype if dtype == mx.complex64 else mx.float32))
    for of in (np.real, np.imag):
        assert abs(of(ours).std() - of(judge).std()) < 0.05 * judge.std() + 1e-9


@pytest.mark.parametrize("name", ("uniform", "normal", "trunc_normal", "kaiming_normal",
                                  "orthogonal"))
@pytest.mark.parametrize("dtype", (mx.int32, mx.uint8, mx.bool_), ids=str)
def test_integers_are_not_drawn(name, dtype):
    "A NotImplementedError, in PyTorch as well."
    with pytest.raises(NotImplementedError): getattr(init, name)(mx.zeros((4, 4), dtype))
    kind = getattr(torch, str(dtype).rpartition(".")[2].rstrip("_"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        getattr(torch.nn.init, f"{name}_")(torch.empty(4, 4, dtype=kind))


@pytest.mark.parametrize("shape, groups", [
    ((4, 4, 3), 1), ((4, 6, 3), 1), ((6, 4, 3), 1), ((6, 3, 3, 4), 2), ((8, 3, 2, 2), 4),
    ((4, 8, 1, 3, 2), 2), ((0, 4, 3), 1), ((4, 0, 3), 1)], ids=str)
def test_dirac(shape, groups):
    "PyTorch's to the bit, integers included."
    judge = theirs("dirac", shape, groups).tolist()
    assert init.dirac(mx.ones(shape), groups).tolist() == judge
    assert init.dirac(mx.ones(shape, mx.int32), groups).tolist() == judge


@pytest.mark.parametrize("shape", ((8, 4), (4, 8), (8, 2, 2, 2), (3, 5, 3), (1, 4), (6, 6)),
                         ids=str)
@pytest.mark.parametrize("gain", (1, math.sqrt(2)))
def test_orthogonal(shape, gain):
    "Rows or columns at right angles, of length `gain`."
    matrix = np.array(init.orthogonal(mx.zeros(shape), gain), np.float64).reshape(shape[0], -1)
    if len(matrix) > matrix.shape[1]: matrix = matrix.T
    assert np.abs(matrix @ matrix.T - gain**2 * np.eye(len(matrix))).max() < 1e-5


def test_orthogonal_prefers_no_direction():
    "The trace of random rotations has the moments 0 and 1 (Diaconis), which a bare QR misses."
    traces = [mx.diag(init.orthogonal(mx.zeros((6, 6)), generator=key)).sum().item()
              for key in mx.random.split(mx.random.key(3), 1500)]
    assert abs(np.mean(traces)) < 0.1 and abs(np.var(traces) - 1) < 0.15


@pytest.mark.parametrize("nonlinearity", (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "sigmoid", "tanh", "relu", "leaky_relu", "selu"))
@pytest.mark.parametrize("param", (None, 0, 0.2, math.sqrt(5)))
def test_gain(nonlinearity, param):
    "PyTorch's numbers."
    judge = torch.nn.init.calculate_gain(nonlinearity, param)
    assert init.calculate_gain(nonlinearity, param) == pytest.approx(judge, rel=1e-12)


@pytest.mark.parametrize("name", (*NAMES, *(f"{name}_" for name in NAMES), "calculate_gain"))
def test_signatures(name):
    "PyTorch's names, order and defaults of arguments."
    def listed(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
    judge = getattr(torch.nn.init, name if name == "calculate_gain" else name.rstrip("_") + "_")
    assert listed(getattr(init, name)) == listed(judge)


# Layers --------------------------------------------------------------------------------------

LAYERS = [f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("groups", (1, 4))
@pytest.mark.parametrize("mode", ("fan_in", "fan_out"))
def test_layers_of_flashconv(name, groups, mode):
    "The spread of PyTorch's layer, groups and transposed layers included; the weight is set."
    ours, judge = (getattr(library, name)(32, 64, 3, groups=groups) for library in (fc, torch.nn))
    before, bias = ours.weight, ours.bias
    value = init.kaiming_normal(ours, mode=mode, nonlinearity="relu")
    torch.nn.init.kaiming_normal_(judge.weight, mode=mode, nonlinearity="relu")
    assert value is ours.weight is not before and ours.bias is bias
    assert ours.weight.shape == tuple(judge.weight.shape)
    assert abs(ours.weight.std().item() / judge.weight.std().item() - 1) < 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_mlx(name):
    "Channels last, by the class: fans and places are those of PyTorch's layer."
    ours, judge = getattr(nn, name)(24, 48, 3), getattr(torch.nn, name)(24, 48, 3)
    shape, n = ours.weight.shape, int(name[-2])
    for mode in ("fan_in", "fan_out"):
        init.kaiming_uniform(ours, mode=mode)
        torch.nn.init.kaiming_uniform_(judge.weight, mode=mode)
        assert ours.weight.shape == shape
        assert abs(mx.abs(ours.weight).max().item() / judge.weight.abs().max().item() - 1) < 0.02
    init.dirac(ours)
    torch.nn.init.dirac_(judge.weight)
    to = (0, *range(2, n + 2), 1) if "Transpose" not in name else (1, *range(2, n + 2), 0)
    assert ours.weight.tolist() == judge.weight.detach().permute(*to).tolist()


def test_a_linear_layer():
    "`(out, in)` in both libraries."
    ours, judge = nn.Linear(300, 20), torch.nn.Linear(300, 20)
    init.xavier_normal(ours)
    torch.nn.init.xavier_normal_(judge.weight)
    assert abs(ours.weight.std().item() / judge.weight.std().item() - 1) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_values_and_underscores_write(name):
    "One leaves the array alone; the other changes it for whoever holds it."
    args = (3,) if name == "constant" else ()
    layer = fc.Conv1d(4, 4, 3)
    weight, before = layer.weight, np.array(layer.weight)
    value = getattr(init, name)(weight, *args)
    assert value is not weight and np.array_equal(np.array(layer.weight), before)
    kept = np.array(value)
    assert getattr(init, f"{name}_")(weight, *args) is weight is layer.weight
    assert not np.array_equal(np.array(layer.weight), before)
    assert np.array_equal(np.array(value), kept)


def test_code_of_pytorch_runs():
    "A ResNet's initialisation, word for word."
    def initialise(library, model, modules):
        for m in modules:
            if isinstance(m, library.Conv2d):
                library.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None: library.init.constant_(m.bias, 0)
        return model
    ours = nn.Sequential(fc.Conv2d(3, 64, 7), nn.ReLU(), fc.Conv2d(64, 128, 3, groups=4))
    judge = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7), torch.nn.ReLU(),
                                torch.nn.Conv2d(64, 128, 3, groups=4))
    initialise(fc, ours, ours.modules())
    initialise(torch.nn, judge, judge.modules())
    for i in (0, 2):
        spread = ours.layers[i].weight.std().item()
        assert abs(spread / judge[i].weight.std().item() - 1) < 0.05
        assert not ours.layers[i].bias.any()


def test_generator():
    "One key, one result; without it MLX's seed decides."
    x, key = mx.zeros((5, 4, 3)), mx.random.key(1)
    for name in ("uniform", "normal", "trunc_normal", "kaiming_normal", "orthogonal"):
        f = getattr(init, name)
        assert mx.array_equal(f(x, generator=key), f(x, generator=key))
        mx.random.seed(4)
        first = f(x)
        assert not mx.array_equal(first, f(x))
        mx.random.seed(4)
        assert mx.array_equal(first, f(x))


def test_the_device_of_the_layer():
    "It works there, whichever the default is."
    layer = fc.Conv1d(4, 4, 3, device=mx.cpu)
    assert init.kaiming_normal(layer).shape == (4, 4, 3)


# Errors --------------------------------------------------------------------------------------

MISTAKES = [
    (ValueError, "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions",
     (3,), lambda I, x: I.kaiming_normal_(x)),
    (ValueError, "Fan in and fan out can not be computed", (3,), lambda I, x: I.xavier_uniform_(x)),
    (ValueError, "Mode x not supported, please use one of ['fan_in', 'fan_out']", (3, 4),
     lambda I, x: I.kaiming_uniform_(x, mode="x")),
    (ValueError, "Unsupported nonlinearity x", (3, 4),
     lambda I, x: I.kaiming_uniform_(x, nonlinearity="x")),
    (ValueError, "negative_slope a not a valid number", (3,),
     lambda I, x: I.calculate_gain("leaky_relu", "a")),
    (ValueError, "negative_slope True not a valid number", (3, 3),
     lambda I, x: I.kaiming_normal_(x, True)),
    (ValueError, "Only tensors with 3, 4, or 5 dimensions are supported", (3, 4),
     lambda I, x: I.dirac_(x)),
    (ValueError, "dim 0 must be divisible by groups", (4, 4, 3), lambda I, x: I.dirac_(x, 3)),
    (TypeError, "", (4, 4, 3), lambda I, x: I.dirac_(x, 2.0)),
    (ValueError, "Only tensors with 2 or more dimensions are supported", (3,),
     lambda I, x: I.orthogonal_(x)),
    (RuntimeError, "uniform_ expects to return a [from, to) range, but found from=2 > to=1", (3,),
     lambda I, x: I.uniform_(x, 2, 1)),
    (RuntimeError, "normal expects std >= 0.0, but found std -1", (3,),
     lambda I, x: I.normal_(x, 0, -1)),
    (RuntimeError, "is out of bounds for float", (3, 3),
     lambda I, x: I.xavier_uniform_(x, float("inf"))),
    (RuntimeError, "is out of bounds for float", (3,),
     lambda I, x: I.uniform_(x, 0, float("nan"))),
    (RuntimeError, "value cannot be converted to type", (3,), lambda I, x: I.constant_(x, 1j)),
    (TypeError, "", (3, 3), lambda I, x: I.xavier_uniform_(x, "a")),
    (TypeError, "", (3, 3), lambda I, x: I.constant_(x, "a")),
]


@pytest.mark.parametrize("error, words, shape, mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_errors(error, words, shape, mistake):
    "PyTorch's type and words; the array stays as it was."
    with pytest.raises(error) as judge: mistake(torch.nn.init, torch.empty(shape))
    x = mx.full(shape, 7.0)
    with pytest.raises(error) as ours: mistake(init, x)
    assert words in str(judge.value) and words in str(ours.value)
    assert x.tolist() == mx.full(shape, 7.0).tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", (
    None, 3, [[1.0]], np.ones((4, 4, 3)), torch.ones(4, 4, 3), nn.ReLU(),
    nn.Sequential(nn.Linear(2, 2))), ids=lambda v: type(v).__name__)
def test_what_is_neither_array_nor_layer(name, given):
    "A TypeError that names the argument and the type."
    args = (3,) if name == "constant" else ()
    for form in (name, f"{name}_"):
        with pytest.raises(TypeError, match=rf"{name}\(\): argument 'tensor' .* not "
                                            rf"{type(given).__name__}"):
            getattr(init, form)(given, *args)


@pytest.mark.parametrize("name", NAMES)
def test_lazy_layers(name):
    "There is nothing to initialise before the first call; the error says so, the layer stays lazy."
    args = (3,) if name == "constant" else ()
    layer = fc.LazyConv1d(4, 3)
    for given in (layer, layer.weight):
        with pytest.raises(RuntimeError, match="uninitialized parameter"):
            getattr(init, name)(given, *args)
    assert type(layer) is fc.LazyConv1d and layer.has_uninitialized_params()


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_trunc_normal_refuses():
    "What PyTorch answers with an accident or with numbers that mean nothing."
    nan = float("nan")
    for kw in ({"std": 0}, {"std": -1}, {"a": 2, "b": 1}):
        with pytest.raises(RuntimeError, match="trunc_normal expects"):
            init.trunc_normal(mx.zeros(3), **kw)
    for kw in ({"std": nan}, {"a": nan}, {"mean": math.inf}, {"a": 5, "b": math.inf}):
        with pytest.raises(RuntimeError, match="is out of bounds for float"):
            init.trunc_normal(mx.zeros(3), **kw)
    assert mx.isfinite(init.trunc_normal(mx.zeros(3), a=-math.inf, b=math.inf)).all()


@pytest.mark.parametrize("dtype, val", ((mx.int8, 300), (mx.int16, 1e9), (mx.int32, math.inf)),
                         ids=str)
def test_constants_that_a_dtype_cannot_hold(dtype, val):
    "A RuntimeError, in PyTorch as well."
    kind = getattr(torch, str(dtype).rpartition(".")[2])
    for library, x in ((init, mx.zeros(3, dtype)), (torch.nn.init, torch.empty(3, dtype=kind))):
        with pytest.raises(RuntimeError, match="cannot be converted to type"):
            library.constant_(x, val)


def test_warnings():
    "PyTorch's two, once each, at the caller's line; and no other."
    for library, x in ((init, mx.zeros((3, 3))), (torch.nn.init, torch.empty(3, 3))):
        with pytest.warns(UserWarning, match="mean is more than 2 std from") as seen:
            library.trunc_normal_(x, 5, 1)
        assert len(seen) == 1
    for library, x in ((init, mx.zeros((0, 3))), (torch.nn.init, torch.empty(0, 3))):
        with pytest.warns(UserWarning, match="Initializing zero-element tensors is a no-op"):
            assert tuple(library.kaiming_normal_(x).shape) == (0, 3)
    with pytest.warns(UserWarning) as seen: init.trunc_normal(fc.Conv1d(2, 2, 2), 5)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("xavier_normal", "xavier_uniform", "orthogonal", "normal", "zeros"):
            assert getattr(init, name)(mx.zeros((0, 3))).shape == (0, 3)
