"""Lazy layers: what they are before the first call, how they become full, and what is refused."""
import copy
import pickle
from math import prod, sqrt

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import flashconv as fc

LAZY = [f"Lazy{kind}{n}d" for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)]
SIZES = (6, 5, 4)
REMEDY = r"flashconv\.materialize\(model, \*inputs\)"


def lazy(name, *args, **kw): return getattr(fc, name)(*args, **kw)


def full(name): return getattr(fc, name.removeprefix("Lazy"))


def ones(name, channels, batch=(2,)): return mx.ones((*batch, channels, *SIZES[:int(name[-2])]))


def assert_untouched(layer, cls, text):
    "`layer` is lazy, prints `text` and has nothing but waiting parameters."
    assert type(layer) is cls and repr(layer) == text and layer.in_channels == 0
    assert layer.has_uninitialized_params()
    for value in layer.state_dict().values(): assert repr(value) == "<UninitializedParameter>"


# Before the first call -----------------------------------------------------------------------

@pytest.mark.parametrize("name", LAZY)
def test_before_the_first_call(name, torch):
    "Text, keys and attributes are PyTorch's."
    ours, theirs = lazy(name, 4, 3, groups=2), getattr(torch.nn, name)(4, 3, groups=2)
    assert_untouched(ours, getattr(fc, name), repr(theirs))
    assert repr(ours).startswith(f"{name}(0, 4, kernel_size=")
    assert str(ours.weight) == str(theirs.weight) == "<UninitializedParameter>"
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    assert ours.in_channels == theirs.in_channels and ours.out_channels == theirs.out_channels
    assert ours.has_uninitialized_params() is theirs.has_uninitialized_params() is True
    assert ours.reset_parameters() is None
    assert_untouched(ours, getattr(fc, name), repr(theirs))


def test_without_a_bias():
    "`bias=False` leaves nothing waiting but the weight, and the first call makes no bias."
    layer = fc.LazyConv2d(4, 3, bias=False)
    assert layer.bias is None and list(layer.state_dict()) == ["weight"]
    layer(mx.ones((1, 3, 4, 4)))
    assert layer.bias is None and type(layer) is fc.Conv2d


@pytest.mark.parametrize("use", [
    lambda p: p + 1, lambda p: 1 + p, lambda p: p - 1, lambda p: p * 2, lambda p: p / 2,
    lambda p: p ** 2, lambda p: -p, lambda p: abs(p), lambda p: p @ p, lambda p: p == 1,
    lambda p: p < 1, lambda p: p[0], lambda p: len(p), lambda p: list(p), lambda p: bool(p),
    lambda p: float(p), lambda p: p.sum(), lambda p: p.reshape(-1), lambda p: p.mean(),
    lambda p: p.item(), lambda p: p.tolist(),
])
def test_arithmetic_on_a_waiting_parameter(use, torch):
    "ValueError in PyTorch's words; ours says what to do."
    for library in (torch.nn, fc):
        with pytest.raises(ValueError, match="Attempted to use an uninitialized parameter in"):
            use(library.LazyConv2d(4, 3).weight)
    with pytest.raises(ValueError, match=REMEDY): use(fc.LazyConv2d(4, 3).weight)


@pytest.mark.parametrize("name", ("shape", "size", "ndim", "nbytes"))
def test_the_shape_of_a_waiting_parameter(name, torch):
    "RuntimeError in PyTorch's words."
    with pytest.raises(RuntimeError, match="Can't access the shape of an uninitialized parameter"):
        torch.nn.LazyConv2d(4, 3).weight.shape
    words = f"Can't access the {name} of an uninitialized parameter.*{REMEDY}"
    with pytest.raises(RuntimeError, match=words):
        getattr(fc.LazyConv2d(4, 3).weight, name)


def test_what_a_waiting_parameter_has():
    "A dtype, an `astype`, and an ordinary AttributeError for names that arrays lack."
    weight = fc.LazyConv2d(4, 3, dtype=mx.float16).weight
    assert weight.dtype == mx.float16 and weight.astype(mx.bfloat16).dtype == mx.bfloat16
    assert not hasattr(weight, "foo")


@pytest.mark.parametrize("name", LAZY)
def test_all_arguments_arrive(name):
    "What the constructor is told, by name or by position, is what the full layer would keep."
    given = dict(kernel_size=3, stride=4, padding=1, dilation=2, groups=2, bias=False,
                 padding_mode="zeros", device=mx.cpu, dtype=mx.float16)
    if "Transpose" in name:
        order = ("kernel_size", "stride", "padding", "output_padding", "groups", "bias",
                 "dilation", "padding_mode", "device", "dtype")
        given = {key: (given | {"output_padding": 3})[key] for key in order}
    else: given["padding_mode"] = "reflect"
    full_one = full(name)(2, 4, **given, data_format="channels_last")
    for layer in (lazy(name, 4, **given, data_format="channels_last"),
                  lazy(name, 4, *given.values(), data_format="channels_last")):
        for key in (*given, "out_channels", "data_format"):
            if key not in ("bias", "dtype"): assert getattr(layer, key) == getattr(full_one, key)
        assert layer.device is not None and layer.weight.dtype == mx.float16 and layer.bias is None


# The first call ------------------------------------------------------------------------------

@pytest.mark.parametrize("batch", ((), (0,), (2,)), ids=str)
@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("name", LAZY)
def test_the_first_call(name, data_format, batch):
    "The layer becomes the full one in place, with its parameters and its numbers."
    layer = lazy(name, 6, 3, 2, groups=2, dtype=mx.float16, data_format=data_format)
    x = mx.random.normal((*batch, 4, *SIZES[:int(name[-2])])).astype(mx.float16)
    if data_format == "channels_last": x = mx.moveaxis(x, len(batch), -1)
    y = layer(x)
    eager = full(name)(4, 6, 3, 2, groups=2, dtype=mx.float16, data_format=data_format)
    assert type(layer) is full(name) and repr(layer) == repr(eager) and layer.in_channels == 4
    eager.load_state_dict(layer.state_dict())
    assert y.dtype == mx.float16 and mx.array_equal(y, eager(x)) and mx.array_equal(y, layer(x))
    assert type(layer.weight) is type(layer.bias) is mx.array
    assert set(dict(nn.utils.tree_flatten(layer.parameters()))) == {"weight", "bias"}


@pytest.mark.parametrize("name", LAZY)
def test_the_initial_bound(name):
    "The parameters are drawn from the bound that the full layer has."
    layer = lazy(name, 64, 3, groups=2)
    layer(ones(name, 32))
    bound = 1 / sqrt(layer.weight.shape[1] * prod(layer.weight.shape[2:]))
    assert 0.98 * bound < mx.abs(layer.weight).max() <= bound * (1 + 1e-6)
    assert 0.8 * bound < mx.abs(layer.bias).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
@pytest.mark.parametrize("padding", ("same", "valid"))
@pytest.mark.parametrize("n", (1, 2, 3))
def test_string_padding(n, padding, mode, torch):
    "'same' and 'valid' print as in PyTorch and stay after the first call."
    ours, theirs = (getattr(library, f"LazyConv{n}d")(4, 2, padding=padding, padding_mode=mode)
                    for library in (fc, torch.nn))
    assert repr(ours) == repr(theirs)
    x = ones(f"LazyConv{n}d", 3)
    y, judged = ours(x), theirs(torch.ones(*x.shape))
    assert repr(ours) == repr(theirs) and y.shape == tuple(judged.shape)


@pytest.mark.parametrize("n", (1, 2, 3))
def test_output_size_at_the_first_call(n):
    "By position and by keyword."
    size = [(i - 1) * 2 + 2 for i in SIZES[:n]]
    for args, kw in (((size,), {}), ((), {"output_size": size})):
        layer = lazy(f"LazyConvTranspose{n}d", 4, 1, 2)
        assert layer(ones(f"_{n}d", 3), *args, **kw).shape[2:] == tuple(size)


TRACES = {
    "compile": lambda layer, x: mx.compile(lambda x: layer(x))(x),
    "grad": lambda layer, x: mx.grad(lambda x: layer(x).sum())(x),
    "vmap": lambda layer, x: mx.vmap(layer)(x[None]),
    "checkpoint": lambda layer, x: mx.checkpoint(layer)(x),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("name", ("LazyConv2d", "LazyConvTranspose2d"))
def test_the_first_call_inside_a_transformation(name, trace):
    "The parameters made there are ordinary arrays, not leftovers of the trace."
    layer, x = lazy(name, 4, 3), ones(name, 3)
    mx.eval(TRACES[trace](layer, x))
    assert type(layer) is full(name)
    mx.eval(layer.parameters())
    assert mx.isfinite(layer(x)).all() and mx.abs(layer.weight).max() > 0


# A call that fails ---------------------------------------------------------------------------

RANKS = r"Expected 3D \(unbatched\) or 4D \(batched\) input to Lazy"
FAILURES = {  # input shape for a 2d layer with kernel 3 and 2 groups, PyTorch's error and words
    "rank too low": ((3, 4), RuntimeError, RANKS),
    "rank too high": ((1, 1, 4, 5, 5), RuntimeError, RANKS),
    "groups": ((1, 3, 8, 8), ValueError, "in_channels must be divisible by groups"),
}


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("name", ("LazyConv2d", "LazyConvTranspose2d"))
def test_a_refused_first_call(name, what, torch):
    "PyTorch's error; afterwards the layer is lazy, and a good input makes it full."
    shape, error, words = FAILURES[what]
    ours, theirs = lazy(name, 4, 3, groups=2), getattr(torch.nn, name)(4, 3, groups=2)
    text = repr(ours)
    for layer, x in ((theirs, torch.ones(*shape)), (ours, mx.ones(shape))):
        with pytest.raises(error, match=words): layer(x)
    if error is RuntimeError:
        with pytest.raises(error, match=name): ours(mx.ones(shape))
    assert_untouched(ours, getattr(fc, name), text)
    assert ours(mx.ones((1, 4, 8, 8))).shape[1] == 4 and type(ours) is full(name)


@pytest.mark.parametrize("wrong", (None, [[1.0]], 1.0, "x", np.ones((1, 3, 8, 8))),
                         ids=lambda value: type(value).__name__)
def test_a_first_call_without_an_array(wrong):
    "TypeError, and still lazy."
    layer = fc.LazyConv2d(4, 3)
    text = repr(layer)
    with pytest.raises(TypeError): layer(wrong)
    assert_untouched(layer, fc.LazyConv2d, text)


@pytest.mark.parametrize("kw, shape", [
    ({}, (1, 3, 2, 2)), ({"stride": 0}, (1, 3, 8, 8)), ({}, (1, 3, 0, 8)),
    ({"padding": 9, "padding_mode": "reflect"}, (1, 3, 8, 8)),
    ({"dtype": mx.float16}, (1, 3, 8, 8)),
], ids=str)
def test_a_first_call_that_fails_after_the_parameters_were_made(kw, shape):
    "The channels fitted, the rest did not: nothing has changed."
    layer = fc.LazyConv2d(4, 3, **kw)
    text = repr(layer)
    with pytest.raises(RuntimeError): layer(mx.ones(shape))
    assert_untouched(layer, fc.LazyConv2d, text)


# Copies and states ---------------------------------------------------------------------------

COPIES = {"pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "deepcopy": copy.deepcopy,
          "copy": copy.copy}


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("name", LAZY)
def test_copies_of_a_lazy_layer(name, copier):
    "A copy is lazy with all its settings, and making it full leaves the original lazy."
    layer = lazy(name, 4, 3, 2, groups=2, dtype=mx.bfloat16, device=mx.cpu)
    twin = COPIES[copier](layer)
    assert_untouched(twin, type(layer), repr(layer))
    assert twin.weight.dtype == mx.bfloat16 and twin.device == layer.device
    y = twin(ones(name, 6).astype(mx.bfloat16))
    assert type(twin) is full(name) and y.dtype == mx.bfloat16
    assert_untouched(layer, getattr(fc, name), repr(lazy(name, 4, 3, 2, groups=2)))


@pytest.mark.parametrize("copier", COPIES)
def test_copies_of_a_layer_that_was_lazy(copier):
    "After the first call there is no trace of laziness left to copy."
    layer = fc.LazyConv2d(4, 3)
    y = layer(mx.ones((1, 3, 4, 4)))
    twin = COPIES[copier](layer)
    assert type(twin) is fc.Conv2d and mx.array_equal(twin(mx.ones((1, 3, 4, 4))), y)


@pytest.mark.parametrize("how", ("load_state_dict", "load_weights", "file", "update", "assignment"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("name", LAZY)
def test_loading_makes_a_layer_full(name, bias, how, tmp_path):
    "Full weights make a lazy layer full, its `in_channels` included."
    eager = full(name)(4, 6, 3, groups=2, bias=bias)
    layer = lazy(name, 6, 3, groups=2, bias=bias)
    state = eager.state_dict()
    if how == "load_state_dict": layer.load_state_dict(state)
    elif how == "load_weights": layer.load_weights(list(state.items()))
    elif how == "file":
        eager.save_weights(str(tmp_path / "w.safetensors"))
        layer.load_weights(str(tmp_path / "w.safetensors"))
    elif how == "update": layer.update(state)
    else:
        for k, v in state.items(): setattr(layer, k, v)
    assert type(layer) is full(name) and layer.in_channels == 4 and repr(layer) == repr(eager)
    assert mx.array_equal(layer(ones(name, 4)), eager(ones(name, 4)))


@pytest.mark.parametrize("state", [
    {"weight": (6, 2, 3, 2), "bias": (6,)}, {"weight": (5, 2, 3, 3), "bias": (6,)},
    {"weight": (6, 2, 3, 3), "bias": (5,)}, {"weight": (6, 2, 3, 3)}, {"bias": (6,)},
    {"weight": (6, 2, 3, 3), "bias": (6,), "x": (1,)}, {"weight": (6, 18), "bias": (6,)},
], ids=str)
def test_loading_what_does_not_fit(state):
    "Refused whole: the layer stays lazy, and no parameter was taken."
    layer = fc.LazyConv2d(6, 3, groups=2)
    text = repr(layer)
    arrays = {k: mx.ones(shape) for k, shape in state.items()}
    for load in (layer.load_state_dict, lambda s: layer.load_weights(list(s.items()))):
        with pytest.raises((RuntimeError, ValueError)): load(arrays)
        assert_untouched(layer, fc.LazyConv2d, text)


def test_a_lazy_state_into_a_full_layer(torch):
    "RuntimeError in both libraries; the full layer keeps its weights."
    layer = fc.Conv2d(3, 4, 3)
    before = layer.weight
    with pytest.raises(RuntimeError):
        torch.nn.Conv2d(3, 4, 3).load_state_dict(torch.nn.LazyConv2d(4, 3).state_dict())
    with pytest.raises(RuntimeError): layer.load_state_dict(fc.LazyConv2d(4, 3).state_dict())
    assert layer.weight is before and type(layer) is fc.Conv2d


def test_a_lazy_state_into_a_lazy_layer():
    "Nothing happens, and nothing is wrong."
    layer = fc.LazyConv2d(4, 3)
    keys = layer.load_state_dict(fc.LazyConv2d(4, 3).state_dict())
    assert str(keys) == "<All keys matched successfully>"
    assert_untouched(layer, fc.LazyConv2d, repr(fc.LazyConv2d(4, 3)))


def test_a_part_of_the_parameters():
    "What was loaded stays, what waits is made at the first call."
    layer = fc.LazyConv2d(4, 3)
    layer.load_state_dict({"bias": mx.full((4,), 7.0)}, strict=False)
    assert type(layer) is fc.LazyConv2d and layer.has_uninitialized_params()
    layer(mx.ones((1, 3, 4, 4)))
    assert type(layer) is fc.Conv2d and layer.in_channels == 3
    assert mx.all(layer.bias == 7) and mx.abs(layer.weight).max() > 0


# Models --------------------------------------------------------------------------------------

class Model(nn.Module):
    "Lazy layers in attributes, lists and dictionaries, between layers with two modes."

    def __init__(self):
        super().__init__()
        self.first = fc.LazyConv2d(4, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm(4), nn.Dropout(0.5)
        self.rest = [fc.LazyConvTranspose2d(6, 2, 2),
                     {"last": fc.LazyConv2d(1, 1), "eager": fc.Conv2d(1, 1, 1)}]

    def __call__(self, x):
        x = mx.moveaxis(self.drop(self.norm(mx.moveaxis(self.first(x), 1, -1))), -1, 1)
        return self.rest[1]["eager"](self.rest[1]["last"](self.rest[0](x)))


def lazies(model): return [m for m in model.modules() if type(m).__name__.startswith("Lazy")]


def input_for_model(): return mx.random.normal((2, 3, 8, 8)) + 5


def test_materialize():
    "All lazy layers become full; running statistics and values stay as they were."
    model, x = Model(), input_for_model()
    mean, var = model.norm.running_mean, model.norm.running_var
    eager = model.rest[1]["eager"].weight
    assert len(lazies(model)) == 3 and fc.materialize(model, x) is model and not lazies(model)
    assert [type(m) for m in (model.first, model.rest[0], model.rest[1]["last"])] == [
        fc.Conv2d, fc.ConvTranspose2d, fc.Conv2d]
    assert mx.array_equal(model.norm.running_mean, mean)
    assert mx.array_equal(model.norm.running_var, var)
    assert model.rest[1]["eager"].weight is eager
    weight = model.first.weight
    fc.materialize(model, x)
    assert model.first.weight is weight


@pytest.mark.parametrize("training", (True, False))
def test_materialize_restores_modes(training):
    "Every module has the mode it had, also where modules differ."
    model = Model()
    model.train(training)
    model.norm.eval()
    model.rest[0].train()
    before = {path: m.training for path, m in model.named_modules()}
    assert len(set(before.values())) == 2
    fc.materialize(model, input_for_model())
    assert {path: m.training for path, m in model.named_modules()} == before


def test_materialize_that_fails_changes_nothing():
    "Half of the layers were reached: all are lazy again, modes and statistics as before."
    class Broken(Model):
        def __call__(self, x):
            super().__call__(x)
            raise KeyError("beyond the layers")

    model = Broken()
    model.drop.eval()
    before, mean = {path: m.training for path, m in model.named_modules()}, model.norm.running_mean
    with pytest.raises(KeyError, match="beyond the layers"):
        fc.materialize(model, input_for_model())
    assert len(lazies(model)) == 3
    for layer in lazies(model): assert layer.has_uninitialized_params() and layer.in_channels == 0
    assert {path: m.training for path, m in model.named_modules()} == before
    assert mx.array_equal(model.norm.running_mean, mean)


def test_materialize_names_the_layers_it_did_not_reach():
    "A layer off the path is an error, not a surprise at the first training step."
    model = Model()
    model.unused = [fc.LazyConv1d(1, 1)]
    with pytest.raises(RuntimeError, match=r"unused\.0"): fc.materialize(model, input_for_model())


def test_materialize_takes_several_inputs_and_a_single_layer():
    "The inputs are passed on as they are."
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = fc.LazyConv1d(2, 1), fc.LazyConv1d(2, 1)

        def __call__(self, x, y): return self.a(x) + self.b(y)

    model = fc.materialize(Two(), mx.ones((1, 3, 4)), mx.ones((1, 5, 4)))
    assert (model.a.in_channels, model.b.in_channels) == (3, 5)
    layer = fc.LazyConv1d(2, 1)
    assert fc.materialize(layer, mx.ones((3, 4))) is layer and type(layer) is fc.Conv1d


def test_a_layer_that_is_used_twice():
    "One object in two places becomes full once."
    shared = fc.LazyConv1d(3, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fc.materialize(model, mx.ones((1, 3, 4)))
    assert model.layers[0] is model.layers[2] is shared and type(shared) is fc.Conv1d


REFUSED = {
    "parameters": lambda m, tmp: m.parameters(),
    "trainable_parameters": lambda m, tmp: m.trainable_parameters(),
    "value_and_grad": lambda m, tmp: nn.value_and_grad(m, lambda x: m(x).sum())(input_for_model()),
    "optimizer": lambda m, tmp: optim.Adam(0.1).init(m.trainable_parameters()),
    "eval": lambda m, tmp: mx.eval(m.parameters()),
    "save_weights": lambda m, tmp: m.save_weights(str(tmp / "w.safetensors")),
    "load_weights": lambda m, tmp: m.load_weights([("first.weight", mx.ones((4, 3, 3, 3)))]),
    "set_dtype": lambda m, tmp: m.set_dtype(mx.float16),
    "apply": lambda m, tmp: m.apply(lambda a: a),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_miss_the_parameters_is_refused(what, tmp_path):
    "A clear error that names layer and remedy, for models and layers; nothing changes, no file."
    model = Model()
    with pytest.raises(RuntimeError, match=f"(?s)LazyConv.*{REMEDY}"):
        REFUSED[what](model, tmp_path)
    assert len(lazies(model)) == 3 and not list(tmp_path.iterdir())
    fc.materialize(model, input_for_model())
    if what != "load_weights": REFUSED[what](model, tmp_path)


def test_parameters_of_a_single_lazy_layer_are_refused():
    "Also for the layer alone."
    with pytest.raises(RuntimeError, match=REMEDY): fc.LazyConv2d(4, 3).parameters()
    with pytest.raises(RuntimeError, match=REMEDY): fc.LazyConv2d(4, 3).trainable_parameters()


def test_a_model_loads_weights_into_lazy_layers(tmp_path):
    "`load_weights(strict=False)` makes its lazy layers full; strict loading wants `materialize`."
    trained, x = fc.materialize(Model(), input_for_model()), input_for_model()
    trained.eval()
    file = str(tmp_path / "model.safetensors")
    trained.save_weights(file)
    model = Model()
    model.load_weights(file, strict=False)
    assert not lazies(model)
    model.eval()
    assert mx.array_equal(model(x), trained(x))
    model = fc.materialize(Model(), x)
    model.load_weights(file)
    model.eval()
    assert mx.array_equal(model(x), trained(x))


@pytest.mark.parametrize("mode", ("train", "eval"))
def test_modes_of_lazy_models(mode):
    "`train` and `eval` reach lazy layers, and the full layers keep the mode."
    model = Model()
    getattr(model, mode)()
    modes = {m.training for m in model.modules()}
    assert modes == {mode == "train"}
    model(input_for_model())
    assert {m.training for m in model.modules()} == modes


def trainable(model): return {k for k, _ in nn.utils.tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("steps", [
    [("freeze", {})], [("freeze", {"keys": ["bias"]})], [("freeze", {"keys": "weight"})],
    [("unfreeze", {})], [("freeze", {}), ("unfreeze", {})],
    [("freeze", {}), ("unfreeze", {"keys": "bias"})],
], ids=str)
def test_freezing_lazy_models(steps):
    "What is frozen before the first call is frozen after it, as `requires_grad` is in PyTorch."
    model, eager = Model(), fc.materialize(Model(), input_for_model())
    for step, kw in steps:
        for m in (model, eager): getattr(m, step)(**kw)
    fc.materialize(model, input_for_model())
    assert trainable(model) == trainable(eager)


def test_training_after_materialize():
    "An optimizer sees all parameters, and the loss falls."
    model, x = fc.materialize(Model(), input_for_model()), input_for_model()
    model.eval()
    target = mx.zeros_like(model(x))
    optimizer = optim.Adam(0.02)
    step = nn.value_and_grad(model, lambda x: ((model(x) - target) ** 2).mean())
    before = {k: mx.array(v) for k, v in nn.utils.tree_flatten(model.trainable_parameters())}
    losses = []
    for _ in range(15):
        loss, gradients = step(x)
        optimizer.update(model, gradients)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for k, v in nn.utils.tree_flatten(model.trainable_parameters()):
        assert not mx.array_equal(v, before[k]), f"{k} was not trained"


# Subclasses ----------------------------------------------------------------------------------

class Doubled(fc.Conv2d):
    "A layer of somebody's own."

    def __call__(self, x): return 2 * super().__call__(x)


class LazyDoubled(fc.LazyConv2d):
    "Its lazy form, with an argument of its own."

    cls_to_become = Doubled

    def __init__(self, *args, label, **kw):
        super().__init__(*args, **kw)
        self.label, self.scale = label, mx.array(3.0)


def test_a_subclass_becomes_what_it_says():
    "`cls_to_become` decides; the first call is already the new class's; attributes stay."
    layer, x = LazyDoubled(4, 3, label="mine"), mx.random.normal((1, 3, 5, 5))
    assert repr(layer).startswith("LazyDoubled(0, 4")
    y = layer(x)
    assert type(layer) is Doubled and layer.label == "mine" and layer.scale == 3
    plain = fc.Conv2d(3, 4, 3)
    assert plain.load_state_dict(layer.state_dict(), strict=False) == ([], ["scale"])
    assert mx.array_equal(y, 2 * plain(x)) and mx.array_equal(layer(x), y)


def test_a_subclass_copies_and_fails_like_any_other():
    "A copy keeps attributes; a refused call names the subclass and keeps it lazy."
    layer = copy.deepcopy(LazyDoubled(4, 3, label="mine"))
    with pytest.raises(RuntimeError, match="input to LazyDoubled"): layer(mx.ones((2, 2)))
    assert type(layer) is LazyDoubled and layer.label == "mine" and layer.has_uninitialized_params()
    assert type(pickle.loads(pickle.dumps(layer))) is LazyDoubled


def test_a_lazy_subclass_without_a_full_one(torch):
    "Without its own `cls_to_become` it becomes the plain layer, as in PyTorch."
    class Ours(fc.LazyConv2d): pass

    class Theirs(torch.nn.LazyConv2d): pass

    ours, theirs = Ours(4, 3), Theirs(4, 3)
    ours(mx.ones((1, 3, 5, 5))), theirs(torch.ones(1, 3, 5, 5))
    assert type(ours) is fc.Conv2d and type(theirs) is torch.nn.Conv2d


@pytest.mark.parametrize("fill", (
    lambda layer, x: layer.initialize_parameters(x),
    lambda layer, x: (layer.initialize_parameters(x), layer.initialize_parameters(x)),
    lambda layer, x: layer.load_state_dict(fc.Conv2d(2, 4, 3).state_dict()),
    lambda layer, x: layer.load_weights(list(fc.Conv2d(2, 4, 3).state_dict().items())),
    lambda layer, x: fc.materialize(layer, x),
    lambda layer, x: layer(x)), ids=range(6))
def test_a_filled_layer_still_answers(fill):
    "However it came by its parameters, it says that none waits, and keeps them when asked again."
    layer, x = fc.LazyConv2d(4, 3), mx.ones((1, 2, 8, 8))
    assert layer.has_uninitialized_params() is True
    fill(layer, x)
    weight = layer.weight
    assert layer.has_uninitialized_params() is False
    layer.initialize_parameters(x)
    assert layer.weight is weight and layer.has_uninitialized_params() is False


def test_what_pytorch_answers_after_initialize_parameters():
    "The judge of the test above: no parameter waits, a second initialization changes nothing."
    torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")
    layer, x = torch.nn.LazyConv2d(4, 3), torch.ones(1, 2, 8, 8)
    layer.initialize_parameters(x)
    weight = layer.weight.clone()
    layer.initialize_parameters(x)
    assert layer.has_uninitialized_params() is False and torch.equal(layer.weight, weight)
