"""Weight norm and spectral norm against PyTorch's: numbers, gradients, states, conversion."""
import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import oracle
import pytest
import torch
from mlx.utils import tree_flatten

import flashconv as fc

P = torch.nn.utils.parametrizations
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


def kinds(library):
    "Name -> a function that gives a layer a norm of PyTorch's, or of ours under the same name."
    return {
        "weight": lambda layer: library.weight_norm(layer),
        "weight, last axis": lambda layer: library.weight_norm(layer, dim=layer.weight.ndim - 1),
        "weight, axis 1": lambda layer: library.weight_norm(layer, dim=1),
        "weight, one length": lambda layer: library.weight_norm(layer, dim=None),
        "weight, dim -1": lambda layer: library.weight_norm(layer, dim=-1),
        "weight, dim -2": lambda layer: library.weight_norm(layer, dim=-2),
        "spectral": lambda layer: library.spectral_norm(layer),
        "spectral, 3 steps": lambda layer: library.spectral_norm(layer, n_power_iterations=3,
                                                                 eps=1e-4, dim=1),
    }


KINDS, OURS = kinds(P), kinds(fc)
NAMES = [f"{kind}{n}d" for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)]


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * (1 + np.abs(theirs).max())


def given(name): return torch.randn(2, 4, *(7, 6, 5)[:int(name[-2])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_states_numbers_and_gradients(name, kind):
    "A state of PyTorch's, three steps in training, and one call in evaluation."
    theirs = KINDS[kind](getattr(torch.nn, name)(4, 6, 3))
    ours = OURS[kind](getattr(fc, name)(4, 6, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert fc.load_torch_state(ours, theirs.state_dict()) == ([], [])
    x = given(name)
    for _ in range(3):
        theirs.zero_grad()
        loss = theirs(x).square().mean()
        loss.backward()
        value, gradients = nn.value_and_grad(ours, lambda m, x: mx.square(m(x)).mean())(ours, mx.array(x.numpy()))
        close(value, loss)
        parts = gradients["parametrizations"]["weight"]
        for part, parameter in theirs.parametrizations.weight.named_parameters():
            close(parts[part], parameter.grad, 1e-4)
    for key, array in ours.state_dict().items(): close(array, theirs.state_dict()[key])
    close(ours.eval()(mx.array(x.numpy())), theirs.eval()(x))
    saved = fc.to_torch_state(ours)
    assert all(torch.allclose(saved[key], value, atol=1e-5) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("Conv2d", "ConvTranspose1d"))
def test_converted_both_ways(name, kind):
    "Bit for bit, and PyTorch's layer stays as it was."
    theirs = KINDS[kind](getattr(torch.nn, name)(4, 6, 3, bias=False)).eval()
    x = given(name)
    before, state = theirs(x), copy.deepcopy(theirs.state_dict())
    ours = fc.from_torch(theirs)
    back = fc.to_torch(ours)
    for key, value in state.items():
        assert torch.equal(theirs.state_dict()[key], value) and torch.equal(back.state_dict()[key], value)
    assert torch.equal(theirs(x), before)
    close(ours(mx.array(x.numpy())), before)
    assert torch.allclose(back(x), before, atol=1e-6) and type(back).__name__ == type(theirs).__name__


def test_a_network():
    "Old and new style, a linear layer, frozen parts; `fold_weight_norm` makes all plain."
    T = torch.nn
    net = T.Sequential(T.utils.weight_norm(T.Conv1d(2, 4, 3)), T.ELU(),
                       P.weight_norm(T.ConvTranspose1d(4, 2, 4, 2)), T.Flatten(),
                       P.spectral_norm(T.Linear(64, 3))).eval()
    net[2].parametrizations.weight.original1.requires_grad_(False)
    x = torch.randn(5, 2, 17)
    ours = fc.convert_model(net)
    close(ours(mx.array(x.numpy())), net(x))
    trainable = ours.layers[2].trainable_parameters()["parametrizations"]["weight"]
    assert list(k for k, v in trainable.items() if isinstance(v, mx.array)) == ["original0"]
    assert all(not row.reasons for row in fc.conversion_report(net))
    folded = fc.fold_weight_norm(ours)
    assert "parametrizations" not in str(list(dict(folded.layers[0])))
    assert [type(layer).__name__ for layer in folded.layers][::2] == ["Conv1d", "ConvTranspose1d", "Linear"]
    close(folded(mx.array(x.numpy())), net(x))


def test_old_names():
    "`weight_g`, `weight_v`; `weight_orig`, `weight_u`, `weight_v`; for a layer and below a prefix."
    old = torch.nn.utils.weight_norm(torch.nn.Conv1d(4, 6, 3))
    layer = fc.weight_norm(fc.Conv1d(4, 6, 3))
    state = {key: oracle.to_mlx(value) for key, value in old.state_dict().items()}
    assert layer.load_state_dict(state) == ([], [])
    x = torch.randn(1, 4, 9)
    close(layer(mx.array(x.numpy())), old(x))
    model = nn.Sequential(fc.weight_norm(fc.Conv1d(4, 6, 3)))
    fc.load_torch_state(model, {f"net.0.{key}": value for key, value in old.state_dict().items()},
                        prefix="net.")
    close(model(mx.array(x.numpy())), old(x))
    spectral = torch.nn.utils.spectral_norm(torch.nn.Conv1d(4, 6, 3)).eval()
    layer = fc.spectral_norm(fc.Conv1d(4, 6, 3)).eval()
    fc.load_torch_state(layer, spectral.state_dict())
    close(layer(mx.array(x.numpy())), spectral(x))


@pytest.mark.parametrize("norm", (fc.weight_norm, fc.spectral_norm))
def test_modules(norm):
    "Pickles, copies, training with an optimizer, freezing, dtypes, compile, reset, assignment."
    layer, x = norm(fc.Conv1d(4, 6, 3, padding="causal")), mx.random.normal((2, 4, 8))
    layer.eval()
    y = layer(x)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert mx.array_equal(twin(x), y).item() and isinstance(twin, fc.Conv1d)
    assert mx.allclose(mx.compile(layer)(x), y, atol=1e-5).item()
    layer.freeze()
    assert not any(isinstance(value, mx.array)
                   for _, value in tree_flatten(layer.trainable_parameters()))
    layer.unfreeze()
    optimizer, step = optim.SGD(0.1), nn.value_and_grad(layer, lambda m, x: mx.square(m(x)).mean())
    losses = []
    for _ in range(5):
        value, gradients = step(layer, x)
        optimizer.update(layer, gradients)
        losses.append(value.item())
    assert losses[-1] < losses[0]
    layer.reset_parameters()
    assert list(layer.state_dict())[0] == "bias" and "weight" not in layer
    weight = mx.random.normal((6, 4, 3))
    layer.weight = weight
    if norm is fc.weight_norm: assert mx.allclose(layer.weight, weight, atol=1e-5).item()
    layer.set_dtype(mx.float16)
    assert layer(x.astype(mx.float16)).dtype == mx.float16


def test_frozen_weights_stay_frozen():
    layer = fc.Conv1d(2, 2, 3)
    layer.freeze(keys=["weight"])
    fc.weight_norm(layer)
    assert layer.trainable_parameters().get("parametrizations", {}) in ({}, {"weight": {}})
    assert "weight" in fc.remove_weight_norm(layer)._no_grad


def test_refused():
    layer = fc.weight_norm(fc.Conv1d(2, 4, 3))
    state = dict(layer.state_dict())
    for call, error, message in (
        (lambda: fc.weight_norm(layer), ValueError, "parametrized already"),
        (lambda: fc.spectral_norm(layer), ValueError, "parametrized already"),
        (lambda: fc.weight_norm(fc.Conv1d(2, 4, 3), dim=3), IndexError, "Dimension out of range"),
        (lambda: fc.weight_norm(fc.Conv1d(2, 4, 3), dim=1.0), TypeError, "dim"),
        (lambda: fc.weight_norm(fc.Conv1d(2, 4, 3), 3), ValueError, "name 3"),
        (lambda: fc.weight_norm(3), TypeError, "module must be a layer"),
        (lambda: fc.spectral_norm(fc.Conv1d(2, 4, 3), n_power_iterations=0), ValueError, "positive"),
        (lambda: fc.spectral_norm(fc.Conv1d(2, 4, 3), "bias"), ValueError, "two axes"),
        (lambda: fc.remove_spectral_norm(layer), ValueError, "not found"),
        (lambda: fc.remove_weight_norm(fc.Conv1d(2, 4, 3)), ValueError, "not found"),
        (lambda: fc.fold_weight_norm(3), TypeError, "mlx.nn.Module"),
        (lambda: fc.to_mlx(layer), ValueError, "fold_weight_norm"),
        (lambda: layer.load_state_dict({"weight_g": mx.ones((4, 1, 1)), "bias": mx.ones(4)}),
         RuntimeError, "original1"),
    ):
        with pytest.raises(error, match=message): call()
    for name, array in layer.state_dict().items(): assert array is state[name]
