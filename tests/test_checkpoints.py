"""States as they are published: in shards, below a prefix, normed, in MLX's layout; all or nothing."""
import json
from itertools import product

import flashconv
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")
from safetensors.torch import save_file
from torch.nn.utils import parametrizations, parametrize

T = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


def theirs(): return T.Sequential(T.Conv2d(3, 4, 3), T.BatchNorm2d(4), T.ConvTranspose2d(4, 2, 2))


def ours(): return nn.Sequential(flashconv.Conv2d(3, 4, 3), nn.BatchNorm(4),
                                 flashconv.ConvTranspose2d(4, 2, 2))


def snapshot(model): return {name: (id(value), value.dtype) for name, value in
                             tree_flatten(model.parameters())}


def assert_loaded(model, state):
    "The model holds the values of a state of PyTorch's."
    got = flashconv.to_torch_state(model)
    for name, value in got.items(): assert torch.equal(value, state[name]), name
    assert len(got) >= 8


def assert_refused(model, source, error, *parts, load=flashconv.load_torch_state, **options):
    "The error says all parts, and the model is as it was."
    before = snapshot(model)
    with pytest.raises(error) as caught: load(model, source, **options)
    for part in parts: assert part in str(caught.value), str(caught.value)
    assert snapshot(model) == before
    return str(caught.value)


PREFIXES = ("module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.",
            "model._orig_mod.", "net.0.", "a.b.c.", "backbone_")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix(prefix):
    "The error says which, first of all, and `prefix` takes it off."
    state, model = theirs().state_dict(), ours()
    given = {prefix + name: value for name, value in state.items()}
    text = assert_refused(model, given, RuntimeError, "Unexpected key(s)", "Missing key(s)")
    if prefix.endswith("."):
        assert f"behind {prefix!r}: pass prefix={prefix!r}" in text.splitlines()[1]
    assert flashconv.load_torch_state(model, given, prefix=prefix) == ([], [])
    assert_loaded(model, state)
    assert len(given) == len(state)  # the caller's dict stays


def test_others_beside_the_prefix():
    "What belongs to another module is left out and named; what is missing or too much is an error."
    state, model = theirs().state_dict(), ours()
    given = {f"model.{name}": value for name, value in state.items()}
    given |= {"loss.weight": torch.ones(2), "teacher.0.weight": state["0.weight"]}
    assert "pass prefix='model.'" in assert_refused(model, given, RuntimeError)
    for strict in (True, False):
        keys = flashconv.load_torch_state(model, given, strict, prefix="model.")
        assert keys == ([], ["loss.weight", "teacher.0.weight"])
    assert_loaded(model, state)
    assert_refused(model, given | {"model.extra": torch.ones(1)}, RuntimeError,
                   'Unexpected key(s) in state_dict: "extra"', prefix="model.")
    del given["model.0.weight"]
    given["0.weight"] = state["0.weight"]  # without the prefix it is another module's
    assert_refused(model, given, RuntimeError, 'Missing key(s) in state_dict: "0.weight"',
                   prefix="model.")


def test_averaged_models():
    averaged = torch.optim.swa_utils.AveragedModel(theirs())
    model = ours()
    assert "prefix='module.'" in assert_refused(model, averaged.state_dict(), RuntimeError)
    keys = flashconv.load_torch_state(model, averaged.state_dict(), prefix="module.")
    assert keys.unexpected_keys == ["n_averaged"]
    assert_loaded(model, averaged.module.state_dict())


def test_wrappers_around_layers():
    "A wrapper's name inside others: the error gives the function, and it works."
    state, model = theirs().state_dict(), ours()
    given = {name.replace("0.", "0._orig_mod."): value for name, value in state.items()}
    text = assert_refused(model, given, RuntimeError)
    assert "rename=lambda name: name.replace('_orig_mod.', '')" in text.splitlines()[1]
    flashconv.load_torch_state(model, given, rename=lambda name: name.replace("_orig_mod.", ""))
    assert_loaded(model, state)


def test_a_model_that_has_the_prefix():
    state, model = theirs().state_dict(), nn.Module()
    model.net = ours()
    text = assert_refused(model, state, RuntimeError)
    assert "rename=lambda name: 'net.' + name" in text.splitlines()[1]
    flashconv.load_torch_state(model, state, rename=lambda name: "net." + name)
    assert_loaded(model.net, state)


@pytest.mark.parametrize(("prefix", "error", "part"), [
    ("nope.", RuntimeError, "no name begins with prefix='nope.'"), (3, TypeError, "but got 3"),
    ("module", ValueError, "got prefix='module'")])
def test_wrong_prefixes(prefix, error, part):
    given = {f"module.{name}": value for name, value in theirs().state_dict().items()}
    assert_refused(ours(), given, error, part, prefix=prefix)


def test_no_hint_without_a_reason():
    "A state that misses a name, of another model or empty: no prefix is proposed."
    state = theirs().state_dict()
    del state["0.weight"]
    for given in (state, {"x.y": torch.ones(1)}, {}):
        assert "pass" not in assert_refused(ours(), given, RuntimeError)


def test_rename():
    state, model = theirs().state_dict(), ours()
    new = {"0": "conv", "1": "bn", "2": "up"}
    old = {value: key for key, value in new.items()}
    given = {f"net.{new[name[0]]}{name[1:]}": value for name, value in state.items()}
    given["net.ema.decay"] = torch.ones(1)

    def rename(name):
        first, _, rest = name.partition(".")
        return f"{old[first]}.{rest}" if first in old else None

    assert flashconv.load_torch_state(model, given, prefix="net.", rename=rename) == ([], [])
    assert_loaded(model, state)
    for wrong, error, part in (
        ("0.", TypeError, "rename to be a function"), (lambda name: 1, TypeError, "but got 1 for"),
        (lambda name: "x", ValueError, "rename gives 'x' for 'net.conv.weight' and for"),
        ({}.__getitem__, KeyError, "net.conv.weight"),
        (lambda name: None, RuntimeError, "Missing key(s)")):
        assert_refused(model, given, error, part, rename=wrong)


@pytest.mark.parametrize(("nest", "said"), [
    (lambda s: {"state_dict": s, "epoch": 3}, "source['state_dict']"),
    (lambda s: {"epoch": torch.tensor(3), "model": s, "args": {"lr": 0.1}}, "source['model']"),
    (lambda s: {"net": {"G": s, "D": s}}, "source['net']['G'] or source['net']['D']"),
    (lambda s: {"weights": s, "ema": s}, "source['weights'] or source['ema']"),
    (lambda s: {"model": {"x._extra_state": {"a": torch.ones(1)}, **s}}, "source['model']")])
def test_nested(nest, said):
    "The error says which key holds the state, and what it says works."
    state, model = theirs().state_dict(), ours()
    optimizer = torch.optim.Adam([T.Parameter(torch.ones(2))])
    sum(optimizer.param_groups[0]["params"]).sum().backward()
    optimizer.step()
    source = nest(state) | {"optimizer": optimizer.state_dict()}
    text = assert_refused(model, source, RuntimeError, f"as in {said}")
    assert text.endswith(said) and "optimizer" not in text
    flashconv.load_torch_state(model, eval(said.partition(" or ")[0]), strict=False)
    assert_loaded(model, state)


def test_nested_files(tmp_path):
    torch.save({"state_dict": theirs().state_dict(), "epoch": 1}, tmp_path / "last.ckpt")
    assert_refused(ours(), tmp_path / "last.ckpt", RuntimeError, "last.ckpt holds dicts under "
                   "['state_dict']", "torch.load(file, weights_only=True)['state_dict']")


@pytest.mark.parametrize(("source", "error"), [
    ([1], TypeError), ({0: torch.ones(1)}, TypeError), (torch.ones(1), TypeError), (3, TypeError)])
def test_no_state(source, error): assert_refused(ours(), source, error)


# Normed weights ------------------------------------------------------------------------------

LAYERS = [lambda: T.Conv1d(4, 6, 5, groups=2), lambda: T.Conv2d(3, 3, 3), lambda: T.Conv3d(2, 3, (1, 2, 3)),
          lambda: T.ConvTranspose1d(6, 4, 3, groups=2), lambda: T.ConvTranspose2d(3, 3, 3),
          lambda: T.ConvTranspose3d(2, 4, 2), lambda: T.Linear(5, 3), lambda: T.Linear(4, 4),
          lambda: T.Conv1d(1, 1, 1), lambda: T.ConvTranspose1d(1, 5, 1, bias=False)]
DTYPES = {"float32": 3e-7, "float64": 1e-15, "float16": 2e-3, "bfloat16": 1.6e-2}
SHAPES = {T.Linear: (2, 4), T.Conv1d: (2, 1, 9)}


def plain(layer):
    "Our layer of the arguments of PyTorch's, with other values, in a stack."
    dtype = getattr(mx, str(next(layer.parameters()).dtype).rpartition(".")[2])
    if isinstance(layer, T.Linear): made = nn.Linear(layer.in_features, layer.out_features)
    else:
        made = getattr(flashconv, next(c.__name__ for c in type(layer).__mro__ if c.__module__ != "torch.nn.utils.parametrize"))(
            layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups,
            bias=layer.bias is not None)
    model = nn.Sequential(made)
    model.set_dtype(dtype)
    return model


def check_folded(layer, remove, tolerance):
    "Folded, the state gives the weight that PyTorch computes in evaluation."
    model, state = plain(layer), T.Sequential(layer.eval()).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    assert "pass fold=True" in assert_refused(model, state, RuntimeError, '"0.weight"')
    with mx.stream(mx.cpu):
        assert flashconv.load_torch_state(model, state, fold=True) == ([], [])
        got = flashconv.to_torch_state(model)["0.weight"]
    assert all(torch.equal(state[name], before[name]) for name in before)
    remove(layer)
    assert got.dtype == layer.weight.dtype and got.shape == layer.weight.shape
    scale = layer.weight.abs().max().item()
    torch.testing.assert_close(got, layer.weight.detach(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ("old", "new"))
@pytest.mark.parametrize("make", LAYERS, ids=lambda make: repr(make()))
def test_weight_norm(make, style, dtype):
    "Along every axis and none."
    for dim in (*range(make().weight.ndim), None):
        layer = make().to(getattr(torch, dtype))
        norm = {"old": T.utils.weight_norm, "new": parametrizations.weight_norm}[style]
        norm(layer, dim=dim)
        with torch.no_grad():
            for name, value in layer.named_parameters():
                if name.endswith(("_g", "original0")): value.uniform_(-1, 2)
        remove = {"old": T.utils.remove_weight_norm,
                  "new": lambda layer: parametrize.remove_parametrizations(layer, "weight")}[style]
        check_folded(layer, remove, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("style", "steps"), [("old", 0), ("old", 3), ("new", 0), ("new", 3)])
@pytest.mark.parametrize("make", LAYERS, ids=lambda make: repr(make()))
def test_spectral_norm(make, style, steps, dtype):
    "With PyTorch's axis, fresh or trained, and with another where the sizes tell."
    norm = {"old": T.utils.spectral_norm, "new": parametrizations.spectral_norm}[style]
    shape = make().weight.shape
    for dim in (None, 0, 1):
        default = int("Transpose" in repr(make()))
        if dim not in (None, default) and shape[0] == shape[1]: continue
        layer = norm(make(), dim=dim).to(getattr(torch, dtype)).train()
        for _ in range(steps): layer.weight if style == "new" else next(
            iter(layer._forward_pre_hooks.values()))(layer, None)
        with torch.no_grad():  # as an optimizer's step would leave it
            original = dict(layer.named_parameters())["weight_orig" if style == "old" else
                                                      "parametrizations.weight.original"]
            original.add_(torch.randn_like(original) * 0.01)
        remove = {"old": T.utils.remove_spectral_norm,
                  "new": lambda layer: parametrize.remove_parametrizations(layer, "weight")}[style]
        check_folded(layer, remove, (4 if steps else 40) * DTYPES[dtype])  # fresh: sigma cancels


def test_both_with_a_prefix():
    "Deep in a model, several norms, names in the way, below a prefix."
    net = T.Sequential(parametrizations.weight_norm(T.Conv1d(4, 4, 3), dim=2),
                       T.Sequential(T.utils.spectral_norm(T.Linear(4, 4)), T.LayerNorm(4))).eval()
    model = nn.Sequential(flashconv.Conv1d(4, 4, 3), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    text = assert_refused(model, state, RuntimeError)
    assert "pass prefix='module.'" in text and "2 of the weights" in text and "fold=True" in text
    assert flashconv.load_torch_state(model, state, prefix="module.", fold=True) == ([], [])
    parametrize.remove_parametrizations(net[0], "weight")
    T.utils.remove_spectral_norm(net[1][0])
    for name, value in flashconv.to_torch_state(model).items():
        torch.testing.assert_close(value, net.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_names_that_only_look_normed():
    "A model's own x_g and x_v stay what they are; further parametrizations are not left out."
    model = nn.Module()
    model.x_g, model.x_v = mx.zeros((4,)), mx.zeros((4,))
    state = {"x_g": torch.ones(4), "x_v": torch.full((4,), 2.0)}
    assert flashconv.load_torch_state(model, state, fold=True) == ([], [])
    assert model.x_v.tolist() == [2.0] * 4
    layer = parametrizations.weight_norm(T.Linear(3, 3))
    parametrizations.spectral_norm(layer)
    linear = nn.Linear(3, 3)
    assert_refused(linear, layer.state_dict(), RuntimeError, '"weight"', fold=True)
    assert_refused(linear, parametrizations.orthogonal(T.Linear(3, 3)).state_dict(), RuntimeError,
                   "parametrizations.weight.original", fold=True)
    wrong = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(3, 3), "bias": torch.ones(3)}
    assert_refused(linear, wrong, RuntimeError, '"weight_g"', fold=True)


# Shards --------------------------------------------------------------------------------------

def shards(folder, state, ending=".safetensors", stem="model"):
    "Write a state as two shards and an index."
    names, files = list(state), [f"{stem}-{i}-of-2{ending}" for i in (1, 2)]
    for i, file in enumerate(files):
        part = {name: state[name].contiguous() for name in names[i::2]}
        save_file(part, folder / file) if ending == ".safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {
        name: files[i % 2] for i, name in enumerate(names)}}))
    return index, files


@pytest.mark.parametrize(("ending", "stem"), [
    (".safetensors", "model"), (".bin", "pytorch_model"), (".safetensors", "model.fp16"),
    (".safetensors", "diffusion_pytorch_model")])
def test_shards(ending, stem, tmp_path):
    "By the index and by the folder, with a prefix as well."
    state = theirs().state_dict()
    index, _ = shards(tmp_path, {f"module.{name}": v for name, v in state.items()}, ending, stem)
    (tmp_path / "config.json").write_text("{}")
    for source in (index, str(index), tmp_path, str(tmp_path)):
        model = ours()
        assert flashconv.load_torch_state(model, source, prefix="module.") == ([], [])
        assert_loaded(model, state)


def test_folders(tmp_path):
    "Safetensors before pickles, an index before a file; what is left to choose is an error."
    state, model = theirs().state_dict(), ours()
    assert_refused(model, tmp_path, ValueError, "holds no file")
    torch.save(state, tmp_path / "a.pt")
    flashconv.load_torch_state(model, tmp_path)
    assert_loaded(model, state)
    torch.save(state, tmp_path / "b.pt")
    assert_refused(model, tmp_path, ValueError, "a.pt, b.pt")
    save_file(state, tmp_path / "model.safetensors")
    save_file(state, tmp_path / ".hidden.safetensors")
    flashconv.load_torch_state(model, tmp_path)
    shards(tmp_path, state)
    flashconv.load_torch_state(model, tmp_path)
    shards(tmp_path, state, stem="other")
    assert_refused(model, tmp_path, ValueError, "model.safetensors.index.json, other.safet")


def test_broken_indexes(tmp_path):
    state, model = theirs().state_dict(), ours()
    index, files = shards(tmp_path, state)
    good = index.read_text()
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', good[:-9]):
        index.write_text(text)
        assert_refused(model, index, RuntimeError, "is no index")
    swapped = json.loads(good)
    swapped["weight_map"]["0.weight"] = files[1]
    index.write_text(json.dumps(swapped))
    assert_refused(model, index, RuntimeError, f"0.weight in {files[1]}")
    swapped["weight_map"]["0.weight"] = "../absent.safetensors"
    index.write_text(json.dumps(swapped))
    assert_refused(model, index, FileNotFoundError, "../absent.safetensors")
    index.write_text(good)
    whole = (tmp_path / files[1]).read_bytes()
    (tmp_path / files[1]).write_bytes(whole[:-4])
    assert_refused(model, tmp_path, RuntimeError, files[1], "can't be read")
    (tmp_path / files[1]).unlink()
    assert_refused(model, tmp_path, FileNotFoundError, files[1])
    assert_refused(model, tmp_path / "none.index.json", FileNotFoundError)


# MLX's layout --------------------------------------------------------------------------------

CONVS = [(name, channels, kernel, groups) for name in (
             "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
         for (channels, groups), kernel in product((((3, 3), 1), ((4, 6), 1), ((4, 4), 2)), (1, 3, 4))
         if groups == 1 or name in ("Conv1d", "Conv2d")]


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize(("name", "channels", "kernel", "groups"), CONVS)
def test_mlx_layout(name, channels, kernel, groups, data_format, tmp_path):
    "Square or not, our layer gives what mlx.nn's does."
    options = {} if groups == 1 else {"groups": groups}
    layer = getattr(nn, name)(*channels, kernel, **options)
    made = getattr(flashconv, name)(*channels, kernel, groups=groups, data_format=data_format)
    n = int(name[-2])
    x = mx.random.normal((2, *(5,) * n, channels[0]))
    layer.save_weights(str(tmp_path / "model.safetensors"))
    layer.save_weights(str(tmp_path / "model.npz"))
    for source in (tmp_path / "model.safetensors", str(tmp_path / "model.npz"),
                   dict(tree_flatten(layer.parameters()))):
        made.weight = mx.zeros_like(made.weight)
        assert flashconv.load_mlx_weights(made, source) == ([], [])
        axis = 0 if "Transpose" in name else 1
        np.testing.assert_array_equal(np.array(made.weight), np.moveaxis(np.array(layer.weight), -1, axis))
    y = made(x) if data_format == "channels_last" else mx.moveaxis(made(mx.moveaxis(x, -1, 1)), 1, -1)
    np.testing.assert_allclose(np.array(y), np.array(layer(x)), 1e-4, 1e-5)


@pytest.mark.parametrize(("make", "groups"), [(flashconv.ConvTranspose1d, 2), (flashconv.Conv3d, 2)])
def test_mlx_layout_that_mlx_lacks(make, groups):
    "Grouped transposed and volume layers: the axis is the same as without groups."
    made = make(4, 4, 2, groups=groups, bias=False)
    right = np.random.default_rng(0).standard_normal(made.weight.shape).astype(np.float32)
    axis = 0 if made.transposed else 1
    flashconv.load_mlx_weights(made, {"weight": np.moveaxis(right, axis, -1)})
    np.testing.assert_array_equal(np.array(made.weight), right)


class Net(nn.Module):
    "A network of mlx.nn's layers or ours, in lists, dicts and stacks."
    def __init__(self, package=nn, **last):
        super().__init__()
        self.stem = nn.Sequential(package.Conv2d(3, 3, 3, **last), nn.BatchNorm(3), nn.Sequential(
            package.ConvTranspose2d(3, 3, 3, **last)))
        self.ups = [package.Conv1d(2, 2, 2, **last), {"deep": package.Conv3d(1, 1, 1, **last)}]
        self.pair, self.words = nn.Bilinear(3, 3, 3), nn.Embedding(3, 3)
        self.gain = mx.ones(3)


@pytest.mark.parametrize("name", ("mlx", "pytorch"))
def test_mlx_network(name, tmp_path):
    "MLX's names, or PyTorch's in MLX's layout, into our layers and into mlx.nn's."
    source = Net()
    source.stem.layers[1].running_mean = mx.array([1.0, 2.0, 3.0])
    right = flashconv.to_torch_state(source)
    weights = dict(tree_flatten(source.parameters()))
    if name == "pytorch": weights = {n.replace("layers.", ""): value for n, value in weights.items()}
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), weights, {"format": "mlx"})
    for model in (Net(), Net(flashconv, data_format="channels_last"), Net(flashconv)):
        assert flashconv.load_mlx_weights(model, tmp_path) == ([], [])
        got = flashconv.to_torch_state(model)
        assert got.keys() == right.keys()
        for key, value in right.items(): assert torch.equal(got[key], value), key


def test_mlx_weights_into_a_converted_network():
    "Norms that stand in a wrapper here have no wrapper in the file."
    layers = T.Sequential(T.Conv2d(3, 3, 3), T.BatchNorm2d(3), T.Sequential(T.GroupNorm(1, 3)))
    source = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm(3), nn.Sequential(nn.GroupNorm(1, 3)))
    for layer in (source.layers[1], source.layers[2].layers[0]): layer.weight = mx.random.normal((3,))
    right = flashconv.to_torch_state(source)
    for data_format in ("channels_first", "channels_last"):
        model = flashconv.convert_model(layers, data_format=data_format)
        own = dict(tree_flatten(source.parameters()))
        assert flashconv.load_mlx_weights(model, own) == ([], [])
        got = flashconv.to_torch_state(model)
        for key, value in right.items(): assert torch.equal(got[key], value), key


def test_mlx_weights_refused(tmp_path):
    "Whatever is wrong, the model stays."
    model, load = ours(), flashconv.load_mlx_weights
    good = dict(tree_flatten(flashconv.downgrade(nn.Sequential(
        *[nn.Conv2d(3, 4, 3), nn.BatchNorm(4), nn.ConvTranspose2d(4, 2, 2)])).parameters()))
    def refused(source, error, *parts, **options):
        return assert_refused(model, source, error, *parts, load=load, **options)
    refused(good | {"layers.9.weight": mx.ones(1)}, RuntimeError, '"layers.9.weight"')
    refused(good | {"layers.0.nope": mx.ones(1)}, RuntimeError, '"layers.0.nope"')
    refused(good | {"layers.0.weight.x": mx.ones(1)}, RuntimeError, '"layers.0.weight.x"')
    refused(good | {"0.weight": mx.ones(1)}, RuntimeError, "layers.0.weight and 0.weight are the same")
    refused(good | {"layers.0.weight": mx.ones(3)}, RuntimeError, "size mismatch for 0.weight")
    refused(good | {"layers.0.weight": [1]}, RuntimeError, "0.weight is no dense")
    refused({k: v for k, v in good.items() if k != "layers.1.bias"}, RuntimeError, 'Missing key(s)', "1.bias")
    half = {name: value.astype(mx.float16) for name, value in good.items()}
    refused(half, RuntimeError, "dtype mismatch for 0.weight")
    refused(3, TypeError)
    refused([("a", 1)], TypeError)
    refused(tmp_path / "x.safetensors", FileNotFoundError)
    refused(tmp_path / "x.pt", ValueError, ".safetensors or .npz")
    flashconv.save_torch_state(ours(), tmp_path / "pt.safetensors")
    refused(tmp_path / "pt.safetensors", RuntimeError, "format=pt", "load_torch_state")
    (tmp_path / "broken.npz").write_bytes(b"no")
    refused(tmp_path / "broken.npz", RuntimeError, "can't be read")
    with pytest.raises(TypeError, match="mlx.nn.Module"): load({}, good)
    assert load(model, half, assign=True) == ([], []) and model.layers[0].weight.dtype == mx.float16
    del half["layers.1.bias"]
    assert load(model, half | {"more": mx.ones(1)}, strict=False) == (["1.bias"], ["more"])


def test_mlx_shards(tmp_path):
    source = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm(3))
    weights, files = dict(tree_flatten(source.parameters())), ("a.safetensors", "b.safetensors")
    for i, file in enumerate(files):
        mx.save_safetensors(str(tmp_path / file), dict(list(weights.items())[i::2]), {"format": "mlx"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: files[i % 2] for i, name in enumerate(weights)}}))
    model = nn.Sequential(flashconv.Conv2d(3, 3, 3), nn.BatchNorm(3))
    assert flashconv.load_mlx_weights(model, tmp_path) == ([], [])
    np.testing.assert_array_equal(np.array(model.layers[0].weight),
                                  np.moveaxis(np.array(source.layers[0].weight), -1, 1))


def test_mlx_weights_fill_lazy_layers():
    layer = nn.Conv2d(3, 3, 3)
    lazy = flashconv.LazyConv2d(3, 3)
    flashconv.load_mlx_weights(lazy, dict(tree_flatten(layer.parameters())))
    assert type(lazy) is flashconv.Conv2d and lazy.in_channels == 3
    np.testing.assert_array_equal(np.array(lazy.weight), np.moveaxis(np.array(layer.weight), -1, 1))
