"""Folding in exported programs, against the network as PyTorch runs it."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import flashconv
import mlx.core as mx
import mlx.nn
from test_folding import noted
from test_programs import network, x
from zoo import arrays, flat

T, F = torch.nn, torch.nn.functional
BOUND = 1e-9  # everything here is float64


def folded(theirs, args, inputs=None, bound=BOUND, **options):
    "The folded network, whose outputs are PyTorch's; and its report."
    theirs.eval()
    ours = flashconv.convert_model(theirs, args, fold=True, **options)
    for right, y in zip(flat(theirs(*(inputs or args))), flat(ours(*arrays(inputs or args))), strict=True):
        right = right.detach().numpy()
        assert y.shape == right.shape
        assert np.abs(np.array(y, np.float64) - right).max() <= bound * np.abs(right).max()
    return ours, flashconv.conversion_report(theirs, args, fold=True, **options).folding


def after(name, *args, affine=True, **options):
    "A layer and the norm behind it."
    layer, n = getattr(T, name)(*args, **options), name[-2] if name[-1] == "d" else 1
    channels = getattr(layer, "out_channels", None) or layer.out_features
    return network(lambda self, v: self.norm(self.layer(v)).relu_(), layer=layer,
                   norm=noted(getattr(T, f"BatchNorm{n}d")(channels, affine=affine)))


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("name", [f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)])
def test_convolutions(name, bias, affine):
    "Groups, strides and dilation; the norm is gone from program and state."
    theirs = after(name, 4, 6, 3, 2, 1, groups=2, bias=bias, affine=affine)
    ours, report = folded(theirs, (x(2, 4, *(7, 6, 5)[:int(name[-2])]),))
    assert str(report) == "layer and norm: folded" and "batch_norm" not in ours.program
    assert list(flashconv.to_torch_state(ours)) == ["layer.weight", "layer.bias"]


def test_linear():
    "Behind a linear layer; not where the norm's channels are another axis."
    _, report = folded(after("Linear", 4, 6), (x(3, 4),))
    assert report[0].reason == ""
    theirs = after("Linear", 5, 6)
    theirs.norm = noted(T.BatchNorm1d(4)).double()
    ours, report = folded(theirs, (x(2, 4, 5),))
    assert "channels" in report[0].reason and "batch_norm" in ours.program


WAYS = {"core": lambda program: program.run_decompositions(),
        "functional": lambda program: program.run_decompositions({})}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("name", [*(f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)), "Linear"])
def test_decomposed(name, bias, way):
    "A program that a decomposition has taken apart is folded as the one that it was."
    options = {} if name == "Linear" else dict(kernel_size=3, stride=2, padding=1, groups=2)
    theirs = after(name, 4, 6, bias=bias, **options).eval()
    v = x(2, 4, *(7, 6, 5)[:int(name[-2])]) if options else x(3, 4)
    program = WAYS[way](torch.export.export(theirs, (v,)))
    ours = flashconv.convert_model(program, fold=True)
    assert np.allclose(ours(arrays(v)), theirs(v).detach(), atol=BOUND)
    assert list(flashconv.to_torch_state(ours)) == ["layer.weight", "layer.bias"]
    report = flashconv.conversion_report(program, fold=True).folding
    assert str(report) == "layer and norm: folded" and "batch_norm" not in ours.program


def test_flattened_linear():
    "The leading axes of a linear layer may be one where the norm is, as in LeViT."
    theirs = after("Linear", 5, 6)
    type(theirs).forward = flattened
    ours, report = folded(theirs, (x(2, 4, 5),))
    assert report[0].reason == "" and "batch_norm" not in ours.program


def flattened(self, v):
    y = self.layer(v)
    return self.norm(y.flatten(0, 1)).reshape_as(y)


@pytest.mark.parametrize("shape", ((2, 3, 8, 8), (5, 3, 12, 9)))
def test_sizes(shape):
    "Other sizes than the example's."
    auto = torch.export.Dim.AUTO
    _, report = folded(after("Conv2d", 3, 4, 3), (x(2, 3, 8, 8),), (x(*shape),),
                       dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    assert report[0].reason == ""


STAY = {
    "used elsewhere": lambda self, v: self.norm(y := self.conv(v)) + y,
    "in several places": lambda self, v: self.norm(self.conv(self.norm(self.conv(v)))),
    "not known": lambda self, v: self.norm(F.conv2d(v, self.conv.weight * v.mean())),
    "no running statistics": lambda self, v: self.plain(self.conv(v)),
    "statistics of each batch": lambda self, v: F.batch_norm(self.conv(v), self.norm.running_mean,
                                                             self.norm.running_var, training=True),
}


@pytest.mark.parametrize("reason, forward", STAY.items(), ids=STAY)
def test_what_stays(reason, forward):
    "Is not folded, and computes what it did."
    theirs = network(forward, conv=T.Conv2d(4, 4, 3, padding=1), norm=noted(T.BatchNorm2d(4)),
                     plain=T.BatchNorm2d(4, track_running_stats=False))
    _, report = folded(theirs, (x(2, 4, 6, 6),), bound=1e-6)
    assert all(reason in row.reason for row in report) and len(report)


def test_written_weights_stay():
    "A weight that the network writes to is no constant."
    def forward(self, v):
        self.kernel.mul_(0.5)
        return self.norm(F.conv2d(v, self.kernel))
    theirs = network(forward, norm=noted(T.BatchNorm2d(4)))
    theirs.register_buffer("kernel", x(4, 3, 2, 2))
    theirs.eval()
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = flashconv.convert_model(theirs, (x(1, 3, 5, 5),), fold=True)
    theirs.load_state_dict(state)
    assert "batch_norm" in ours.program
    for _ in range(2):
        assert np.allclose(ours(arrays(x(1, 3, 5, 5))), theirs(x(1, 3, 5, 5)).detach(), atol=1e-6)


def test_functions_and_shared_norms():
    "Layers that are calls of functions, two of them; one norm behind both, and a bias that is shared."
    def forward(self, v):
        y = self.norm(F.conv2d(v, self.first, self.bias))
        return self.norm(F.conv2d(y, self.second, self.bias)) + self.norm(F.conv2d(y, self.third))
    theirs = network(forward, norm=noted(T.BatchNorm2d(3)), bias=T.Parameter(x(3)),
                     **{name: T.Parameter(x(3, 3, 1, 1, seed=i)) for i, name in enumerate(
                         ("first", "second", "third"))})
    ours, report = folded(theirs, (x(2, 3, 5, 5),))
    assert [row.layer for row in report] == ["first", "second", "third"]
    assert sorted(flashconv.to_torch_state(ours)) == ["bias", "bias_1", "bias_2", "first", "second", "third"]


class Standardised(T.Conv2d):
    "Its weight is computed in each call, which folding does once."
    def forward(self, v):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(v, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize("layer", (
    lambda: T.utils.parametrizations.weight_norm(T.Conv2d(3, 4, 3)), lambda: Standardised(3, 4, 3),
    lambda: T.utils.parametrizations.spectral_norm(T.Conv2d(3, 4, 3)),
    lambda: T.utils.weight_norm(T.Conv2d(3, 4, 3, bias=False))),
    ids=("weight_norm", "standardised", "spectral_norm", "old_weight_norm"))
@pytest.mark.filterwarnings("ignore")
def test_computed_weights(layer):
    "A weight that depends on the state alone is computed once, with a norm behind it or without."
    theirs = network(lambda self, v: (self.norm(self.layer(v)), self.last(v)), layer=layer(), last=layer(),
                     norm=noted(T.BatchNorm2d(4)))
    ours, report = folded(theirs, (x(2, 3, 7, 7),))
    assert report[0].reason == "" and "norm" not in ours.program and "std" not in ours.program
    assert set(flashconv.to_torch_state(ours)) - {"last.bias"} == {"layer.weight", "layer.bias", "last.weight"}


def test_source_and_files(tmp_path):
    "What source writes computes the same to the last bit; copies by file do, too."
    theirs = network(lambda self, v: self.b(self.a(v)), a=after("Conv2d", 3, 4, 3), b=after("Conv2d", 4, 4, 1))
    v = x(2, 3, 6, 6).float()
    ours, _ = folded(theirs.float(), (v,), bound=1e-5)
    space, text = {}, flashconv.source(ours)
    exec(text, space)
    again = space["network"]()
    assert text.count("class Conv2d") == 1 and "batch_norm" not in text
    assert flashconv.load_torch_state(again, flashconv.to_torch_state(ours)) == ([], [])
    assert np.array_equal(again(arrays(v)), ours(arrays(v)))
    torch.export.save(torch.export.export(theirs, (v,)), tmp_path / "net.pt2")
    other = flashconv.convert_model(tmp_path / "net.pt2", fold=True)
    assert np.array_equal(other(arrays(v)), ours(arrays(v)))


def test_gradients():
    "In evaluation a folded network has those of the network, in the input and through the chain."
    theirs = after("Conv2d", 3, 4, 3)
    ours, _ = folded(theirs, (x(2, 3, 6, 6),))
    v = x(2, 3, 6, 6).requires_grad_()
    right, = torch.autograd.grad(theirs(v).sum(), v)
    assert np.allclose(mx.grad(lambda a: ours(a).sum())(arrays(v.detach())), right, atol=1e-9)
    assert "weight" in ours.trainable_parameters()["layer"]


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)))
def test_dtypes(dtype, bound):
    "Computed in float32 at least, whatever the network's dtype is, which stays."
    theirs, v = after("Conv2d", 3, 4, 3).to(dtype).eval(), x(2, 3, 6, 6).to(dtype)
    ours = flashconv.convert_model(theirs, (v,), fold=True)
    y = ours(arrays(v))
    assert ours.layer.weight.dtype == y.dtype == getattr(mx, str(dtype).rpartition(".")[2])
    right = theirs.double()(v.double()).detach().numpy()
    assert np.abs(np.array(y.astype(mx.float32)) - right).max() < bound * np.abs(right).max()


def test_own_norm():
    "A norm that the user has a function for stays."
    theirs, calls = after("Conv2d", 3, 4, 3), []
    def own(v, *rest):
        calls.append(rest)
        return [v, None, None]
    ours = flashconv.convert_model(theirs.eval(), (x(1, 3, 5, 5),), operations={"batch_norm": own}, fold=True)
    calls.clear()
    ours(arrays(x(1, 3, 5, 5)))
    assert len(calls) == 1


class Odd(T.Module):
    def forward(self, v): return v * float(v.shape[0])


class OurOdd(mlx.nn.Module):
    def __call__(self, v): return v * v.shape[0]


def test_own_modules():
    "A module of the user's is what it is without folding."
    theirs = network(lambda self, v: self.body(self.odd(v)), odd=Odd(), body=after("Conv2d", 3, 4, 3))
    ours, report = folded(theirs, (x(2, 3, 6, 6),), modules={Odd: OurOdd})
    assert report[0].reason == "" and isinstance(ours.odd, OurOdd)


def test_refusals():
    "Training is refused, before and after; and what is no bool."
    theirs = after("Conv2d", 3, 4, 3)
    theirs.train()
    v = x(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"in training: \['norm'\]; call model.eval"):
        flashconv.convert_model(theirs, (v,), fold=True)
    with pytest.raises(ValueError, match=r"in training: \['norm'\]"):
        flashconv.convert_model(torch.export.export(theirs, (v,)), fold=True)
    ours = flashconv.convert_model(theirs.eval(), (v,), fold=True)
    with pytest.raises(ValueError, match="without fold=True"): ours.train()(arrays(v))
    with pytest.raises(TypeError, match="bool"): flashconv.convert_model(theirs, (v,), fold=1)
    with pytest.raises(TypeError, match="fold needs args"): flashconv.conversion_report(theirs, fold=True)
    for call in (flashconv.fold_batch_norm, flashconv.folding_report):
        with pytest.raises(TypeError, match="fold=True"): call(flashconv.convert_model(theirs, (v,)))
