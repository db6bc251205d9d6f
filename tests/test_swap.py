"""upgrade and downgrade: the same numbers, the same arrays, and word of every layer that stays."""
import flashconv
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

LAYERS = [(nn.Conv1d(4, 6, 3, 2, 1, 2, groups=2), (2, 9, 4)), (nn.Conv2d(4, 6, (3, 2)), (1, 5, 6, 4)),
          (nn.Conv3d(2, 3, 2, bias=False), (1, 3, 4, 3, 2)),
          (nn.ConvTranspose1d(4, 2, 3, 2, 1), (2, 5, 4)),
          (nn.ConvTranspose2d(2, 3, 4, 2, 1, output_padding=1), (1, 3, 4, 2)),
          (nn.ConvTranspose3d(2, 3, (1, 2, 3), bias=False), (1, 2, 3, 3, 2))]


class Net(nn.Module):
    "Layers in attributes, lists, dicts and beneath underscores."
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm(4)),
                       {"up": nn.ConvTranspose2d(4, 4, 2, stride=2)}]
        self._hidden = nn.Conv2d(4, 2, 1)
        self.again, self.head = self.stem, nn.Linear(2, 3)

    def __call__(self, x):
        y = self.blocks[1]["up"](nn.relu(self.blocks[0](self.stem(x))))
        return self.head(self._hidden(y).mean((1, 2)))


def arrays(model): return dict(tree_flatten(model.parameters()))


def kinds(model, package):
    return sum(type(module).__module__.startswith(package) and "Conv" in type(module).__name__
               for module in model.modules())


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:40])
def test_single_layers(layer, shape):
    x = mx.random.normal(shape)
    ours = flashconv.upgrade(layer)
    assert type(ours) is getattr(flashconv, type(layer).__name__)
    assert mx.allclose(ours(x), layer(x), 1e-5, 1e-5)
    if "groups" not in vars(layer) or layer.groups == 1 or ours.num_spatial_dims < 3:
        back = flashconv.downgrade(ours)
        assert type(back) is type(layer) and mx.array_equal(back.weight, layer.weight)


def test_models():
    model, x = Net().eval(), mx.random.normal((2, 6, 5, 3))
    before, weights, names = model(x), arrays(model), set(arrays(model))
    mode, theirs = model.training, kinds(model, "mlx")
    assert flashconv.upgrade(model) is model
    assert (kinds(model, "mlx"), kinds(model, "flashconv")) == (0, theirs)
    assert model.again is model.stem and model.training == mode
    assert set(arrays(model)) == names
    assert mx.allclose(model(x), before, 1e-5, 1e-5)
    again = dict(model.named_modules())
    flashconv.upgrade(model)  # nothing to do
    assert all(dict(model.named_modules())[name] is module for name, module in again.items())
    assert flashconv.downgrade(model) is model
    assert (kinds(model, "mlx"), kinds(model, "flashconv")) == (theirs, 0)
    for name, value in arrays(model).items(): assert mx.array_equal(value, weights[name]), name


def test_gradients():
    model, x = Net(), mx.random.normal((2, 6, 5, 3))
    def gradients():
        return dict(tree_flatten(nn.value_and_grad(model, lambda x: model(x).square().sum())(x)[1]))
    theirs = gradients()
    flashconv.upgrade(model)
    ours = gradients()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        right = theirs[name]
        if value.ndim == 4: right = mx.moveaxis(right, -1, 0 if name == "blocks.1.up.weight" else 1)
        assert mx.allclose(value, right, 1e-4, 1e-4), name


def test_weights_are_shared():
    "A view in another shape: evaluated, it takes no memory of its own."
    model = nn.Sequential(nn.Conv2d(64, 64, 5), nn.ConvTranspose2d(64, 64, 5))
    mx.eval(model.parameters())
    mx.synchronize()
    before = mx.get_active_memory()
    flashconv.upgrade(model)
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before < 10_000


def test_dtype_mode_and_frozen():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)).eval()
    model.set_dtype(mx.bfloat16)
    model.layers[0].freeze(keys=["bias"])
    for swap in (flashconv.upgrade, flashconv.downgrade):
        swap(model)
        assert not any(module.training for module in model.modules())
        assert list(model.layers[0].trainable_parameters()) == ["weight"]
        assert model.layers[1].weight.dtype == mx.bfloat16


class Causal(nn.Conv1d):
    def __call__(self, x): return super().__call__(mx.pad(x, ((0, 0), (2, 0), (0, 0))))


class Plain(nn.Conv1d): pass


def test_what_stays_is_said():
    model = nn.Sequential(Causal(1, 2, 3), nn.Sequential(Plain(2, 2, 3), Causal(2, 2, 3)))
    with pytest.warns(UserWarning) as told: flashconv.upgrade(model)
    assert len(told) == 1 and told[0].filename == __file__
    assert "layers.0: Causal" in str(told[0].message)
    assert "layers.1.layers.1: Causal" in str(told[0].message)
    assert type(model.layers[1].layers[0]) is flashconv.Conv1d and type(model.layers[0]) is Causal


class Stepping(nn.Conv1d):
    def step(self, x): return self(x) * self.gain


class Constant(nn.Conv1d):
    lookahead = 4


class Counted(nn.Conv1d):
    "One that adds what can come along."
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain, self.lookahead, self.taps, self.absent = mx.ones(1), 4, [1, 2], None
        self.freeze(keys=["gain"])


class Holding(nn.Conv1d):
    "One that holds a layer, which is a layer like any other."
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.before = [nn.Conv1d(1, 1, 1)]


@pytest.mark.parametrize(("cls", "reason"), [
    (Stepping, "adds step"), (Constant, "adds lookahead"), (Holding, "its before holds layers")])
def test_subclasses_that_stay(cls, reason):
    "They do in a model, with all that they have, and are refused alone."
    model = nn.Sequential(cls(1, 1, 1), nn.Conv1d(1, 1, 1))
    layer, names = model.layers[0], set(arrays(model))
    with pytest.warns(UserWarning, match=f"layers.0: .*{reason}"): flashconv.upgrade(model)
    assert model.layers[0] is layer and type(model.layers[1]) is flashconv.Conv1d
    assert set(arrays(model)) == names
    if cls is Holding: assert type(layer.before[0]) is flashconv.Conv1d
    with pytest.raises(ValueError, match=reason): flashconv.upgrade(cls(1, 1, 1))
    with pytest.raises(ValueError, match=reason): flashconv.from_mlx(cls(1, 1, 1))


def test_additions_come_along():
    "Arrays, frozen ones, numbers and lists, by a subclass or hung on a layer; there and back."
    hung = nn.Conv1d(1, 1, 1)
    hung.gain, hung.lookahead, hung.taps, hung.absent = mx.ones(1), 4, [1, 2], None
    hung.freeze(keys=["gain"])
    for layer in (Counted(1, 1, 1), hung):
        model = nn.Sequential(layer)
        for swap in (flashconv.upgrade, flashconv.downgrade):
            swap(model)
            new = model.layers[0]
            assert new is not layer and set(new.parameters()) == {"weight", "bias", "gain", "taps"}
            assert set(dict(tree_flatten(new.trainable_parameters()))) == {"weight", "bias"}
            assert (new.lookahead, new.taps, new.absent) == (4, [1, 2], None)
            layer.gain[0] = 7
            assert new.gain.item() == 1
            layer.gain[0] = 1


@pytest.mark.parametrize("name", ("data_format", "device", "in_channels", "num_spatial_dims"))
def test_attributes_that_mean_something_here(name):
    layer = nn.Conv1d(1, 1, 1)
    setattr(layer, name, "mine")
    with pytest.raises(ValueError, match=f"its {name} is something else"): flashconv.upgrade(layer)


def test_layers_in_tuples_stay():
    "Nothing can be put in their place, so they would be two where they were one."
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1))
    model.pair = (model.layers[0], [nn.Conv1d(1, 1, 1)])
    object.__setattr__(model, "hidden", model.layers[1])
    with pytest.warns(UserWarning, match="layers.0: it is in a tuple"): flashconv.upgrade(model)
    assert model.pair[0] is model.layers[0] and type(model.layers[0]) is nn.Conv1d
    assert model.hidden is model.layers[1] and type(model.hidden) is flashconv.Conv1d
    assert type(model.pair[1][0]) is flashconv.Conv1d


@pytest.mark.parametrize(("layer", "reason"), [
    (flashconv.Conv2d(1, 1, 3), "channels first"),
    (flashconv.Conv2d(1, 1, 2, padding="same", data_format="channels_last"), "as much before"),
    (flashconv.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", data_format="channels_last"),
     "padding_mode"),
    (flashconv.Conv3d(2, 2, 3, groups=2, data_format="channels_last"), "groups=2"),
    (flashconv.LazyConv2d(1, 3, data_format="channels_last"), "materialize")], ids=repr)
def test_what_mlx_lacks(layer, reason):
    "It stays in a model, and is refused alone."
    model = nn.Sequential(layer, nn.ReLU(), flashconv.Conv2d(1, 1, 3, data_format="channels_last"))
    with pytest.warns(UserWarning, match=reason): flashconv.downgrade(model)
    assert model.layers[0] is layer and type(model.layers[2]) is nn.Conv2d
    with pytest.raises(ValueError, match=reason): flashconv.downgrade(layer)


def test_nothing_is_said_of_a_model_without_layers(recwarn):
    model = nn.Sequential(nn.Linear(2, 2))
    assert flashconv.upgrade(model) is model and flashconv.downgrade(model) is model
    assert not recwarn


@pytest.mark.parametrize("model", (None, [nn.Conv1d(1, 1, 1)], nn.Conv2d, "model", np.zeros(3)),
                         ids=("None", "list", "class", "str", "array"))
def test_no_module(model):
    for function in (flashconv.upgrade, flashconv.downgrade):
        with pytest.raises(TypeError, match="mlx.nn.Module"): function(model)
