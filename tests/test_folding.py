"""Folding against the unfolded network, which PyTorch judges, over layers, formats and dtypes."""
import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
import torch

import flashconv as fc

NAMES = [f"{kind}{n}d" for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)]


def noted(norm):
    "A norm in evaluation, as if it had been trained."
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            if tensor is not None: tensor.copy_(torch.randn_like(tensor))
        norm.running_var.copy_(torch.rand_like(norm.running_var) + 0.1)
    return norm.eval()


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("name", NAMES)
def test_converted_and_folded(name, data_format, affine):
    "Groups, strides, a missing bias; PyTorch's network is the judge."
    n, T = int(name[-2]), torch.nn
    net = T.Sequential(getattr(T, name)(4, 6, 3, 2, 1, groups=2, bias=False),
                       noted(getattr(T, f"BatchNorm{n}d")(6, affine=affine)), T.ReLU(),
                       getattr(T, name)(6, 4, 2), noted(getattr(T, f"BatchNorm{n}d")(4))).eval()
    ours = fc.convert_model(net, data_format=data_format, fold=True)
    kinds = [type(layer).__name__ for layer in ours.layers]
    assert kinds == [name, "Identity", "ReLU", name, "Identity"]
    x = torch.randn(2, 4, *(7, 6, 5)[:n])
    y = mx.array(x.numpy())
    y = ours(y) if data_format == "channels_first" else mx.moveaxis(ours(mx.moveaxis(y, 1, -1)), -1, 1)
    assert np.allclose(np.array(y), net(x).detach().numpy(), atol=1e-4)


def test_convert_folds_weight_norm_too():
    T = torch.nn
    net = T.Sequential(T.utils.parametrizations.weight_norm(T.Conv1d(2, 4, 3)),
                       noted(T.BatchNorm1d(4))).eval()
    ours, x = fc.convert_model(net, fold=True), torch.randn(2, 2, 9)
    assert [type(layer).__name__ for layer in ours.layers] == ["Conv1d", "Identity"]
    assert np.allclose(np.array(ours(mx.array(x.numpy()))), net(x).detach().numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="call model.eval"): fc.convert_model(net.train(), fold=True)


def sequence(*layers): return nn.Sequential(*layers).eval()


def conv(*args, **kw): return fc.Conv1d(*args, data_format="channels_last", **kw)


class Branches(nn.Module):
    "The output of the layer goes to a norm, and past it."
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(2, 2, 3, padding=1), nn.BatchNorm(2)
        self.norm.running_mean = mx.array([1.0, 2.0])

    def __call__(self, x):
        y = self.conv(x)
        return y + self.norm(y)


def test_a_branch_is_noticed():
    "The model is as it was."
    model, x = Branches().eval(), mx.random.normal((1, 8, 2))
    before, items = model(x), (model.conv.weight, model.conv.bias, model.norm)
    with pytest.raises(ValueError, match="used elsewhere as well"): fc.fold_batch_norm(model, x)
    assert mx.array_equal(model(x), before).item()
    assert all(a is b for a, b in zip(items, (model.conv.weight, model.conv.bias, model.norm)))


class Two(nn.Module):
    "A layer behind a layer, and the norm behind both."
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = conv(2, 2, 3), conv(2, 2, 3), nn.BatchNorm(2)

    def __call__(self, x): return self.norm(self.second(self.first(x)))


def test_a_layer_behind_a_layer():
    "Is no norm."
    model, x = Two().eval(), mx.random.normal((1, 8, 2))
    y = model(x)
    assert [(row.layer, row.reason) for row in fc.folding_report(model, x)] == [("second", "")]
    assert mx.allclose(fc.fold_batch_norm(model, x)(x), y, atol=1e-5)


class Replaced(fc.Conv1d):
    def _conv_forward(self, input, weight, bias): return super()._conv_forward(input, 2 * weight, bias)


SHARED = nn.BatchNorm(2)
STAY = {
    "replaces _conv_forward": lambda: (Replaced(2, 2, 3, data_format="channels_last"), nn.BatchNorm(2)),
    "no weight yet": lambda: (fc.LazyConv1d(2, 3, data_format="channels_last"), nn.BatchNorm(2)),
    "weight is computed": lambda: (fc.weight_norm(conv(2, 2, 3)), nn.BatchNorm(2)),
    "used in several places": lambda: (conv(2, 2, 3), SHARED, conv(2, 2, 3), SHARED),
    "has channels_first": lambda: (fc.Conv1d(2, 2, 3), nn.BatchNorm(2)),
    "no running statistics": lambda: (conv(2, 2, 3), nn.BatchNorm(2, track_running_stats=False)),
    "gives 2 channels": lambda: (conv(2, 2, 3), nn.BatchNorm(3)),
}


@pytest.mark.parametrize("reason, layers", STAY.items(), ids=STAY)
def test_what_stays(reason, layers):
    model = sequence(*layers())
    kinds = [type(layer) for layer in model.layers]
    assert reason in str(fc.folding_report(model))
    assert [type(layer) for layer in fc.fold_batch_norm(model).layers] == kinds


@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16), ids=str)
def test_half(dtype):
    model, x = sequence(conv(8, 8, 3), nn.BatchNorm(8)), mx.random.normal((2, 16, 8))
    model.layers[1].running_var = mx.random.uniform(0.5, 2, (8,))
    model.set_dtype(dtype)
    y, folded = model(x.astype(dtype)), fc.fold_batch_norm(model, inplace=False)(x.astype(dtype))
    assert folded.dtype == dtype
    bound = 16 * oracle.EPS[dtype] * mx.abs(y).max()
    assert mx.all(mx.abs(folded.astype(mx.float32) - y.astype(mx.float32)) < bound).item()


def test_in_place_or_a_copy():
    model = sequence(conv(2, 4, 3, bias=False), nn.BatchNorm(4))
    weight = model.layers[0].weight
    twin = fc.fold_batch_norm(model, inplace=False)
    assert twin is not model and model.layers[0].weight is weight and model.layers[0].bias is None
    assert fc.fold_batch_norm(model) is model and model.layers[0].bias.shape == (4,)


def test_training_is_refused():
    "Named, and nothing changed."
    model = nn.Sequential(conv(2, 4, 3), nn.BatchNorm(4))
    for call in (fc.fold_batch_norm, fc.folding_report):
        with pytest.raises(ValueError, match=r"in training: \['layers.1'\]; call model.eval"): call(model)
    with pytest.raises(TypeError, match="inplace must be a bool"): fc.fold_batch_norm(model, inplace=1)
    assert isinstance(model.layers[1], nn.BatchNorm)
    assert copy.deepcopy(model)(mx.zeros((2, 8, 2))).shape == (2, 6, 4)
