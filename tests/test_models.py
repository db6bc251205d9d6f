"""convert_model: every layer in its table against PyTorch in both formats, and every refusal."""
import copy
import pickle

import flashconv
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")
T = torch.nn
FORMATS = ("channels_first", "channels_last")


def to_last(a): return np.moveaxis(a, 1, -1)


def call(model, x, data_format):
    "What an MLX model gives for an input in PyTorch's layout, in PyTorch's layout if it has rank 3."
    last = data_format == "channels_last"
    y = np.array(model(mx.array(to_last(x) if last else x)))
    return np.moveaxis(y, -1, 1) if last and y.ndim > 2 else y


def same(theirs, shape, data_format, modules=None, tolerance=2e-5):
    "Converted, `theirs` gives the same in both modes, and as much is left of its input's gradient."
    for p in (*theirs.parameters(), *theirs.buffers()):
        if p.is_floating_point(): torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs.eval()
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ours = flashconv.convert_model(theirs, data_format=data_format, modules=modules)
    t = torch.from_numpy(x).requires_grad_()
    y = theirs(t)
    y.square().sum().backward()
    got = call(ours, x, data_format)
    assert got.shape == tuple(y.shape)
    np.testing.assert_allclose(got, y.detach().numpy(), tolerance, tolerance)
    last = data_format == "channels_last"
    gradient = np.array(mx.grad(lambda a: ours(a).square().sum())(
        mx.array(to_last(x) if last else x)))
    np.testing.assert_allclose(np.moveaxis(gradient, -1, 1) if last else gradient, t.grad.numpy(),
                               10 * tolerance, 10 * tolerance)
    return ours


ELEMENTWISE = [T.Identity(), T.ReLU(), T.ReLU6(), T.SELU(), T.SiLU(), T.Mish(), T.Hardswish(),
               T.Sigmoid(), T.Tanh(), T.LogSigmoid(), T.Softsign(), T.LeakyReLU(0.3), T.ELU(0.7),
               T.CELU(0.6), T.GELU(), T.GELU("tanh"), T.Hardtanh(), T.Softplus(), T.PReLU(),
               T.Dropout(0.3)]
SPATIAL = [T.PReLU(4), T.Softmax(1), T.LogSoftmax(1), T.GLU(1), T.Dropout2d(0.2), T.BatchNorm2d(4),
           T.BatchNorm2d(4, eps=1e-2, affine=False), T.BatchNorm2d(4, track_running_stats=False),
           T.GroupNorm(2, 4), T.GroupNorm(4, 4, eps=1e-2, affine=False), T.InstanceNorm2d(4),
           T.InstanceNorm2d(4, affine=True), T.MaxPool2d(2), T.MaxPool2d((3, 2), 2, (1, 0)),
           T.AvgPool2d(3, 2, 1), T.AvgPool2d((2, 3), count_include_pad=False),
           T.Upsample(scale_factor=2), T.Upsample(scale_factor=(3, 2)),
           T.Upsample(scale_factor=2, mode="bilinear"),
           T.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
           T.Upsample(scale_factor=2, mode="bicubic"), T.UpsamplingNearest2d(scale_factor=2),
           T.UpsamplingBilinear2d(scale_factor=3), T.AdaptiveAvgPool2d(1),
           T.AdaptiveAvgPool2d((3, None)), T.AdaptiveAvgPool2d(5), T.AdaptiveMaxPool2d((2, 3)),
           T.ZeroPad2d((1, 2, 0, 1)), T.ConstantPad2d(1, -2.5), T.ReflectionPad2d((1, 2, 3, 0)),
           T.ReplicationPad2d(2), T.CircularPad2d((0, 1, 2, 1)), T.PixelShuffle(2), T.Conv2d(4, 6, 3, groups=2),
           T.ConvTranspose2d(4, 6, 3, 2, 1, 1), T.Flatten(),
           T.Sequential(T.Conv2d(4, 4, 3), T.Flatten(), T.Linear(4 * 5 * 4, 3), T.BatchNorm1d(3),
                        T.Softmax(-1), T.Linear(3, 8), T.Unflatten(1, (2, 2, 2)), T.Conv2d(2, 1, 1))]
OTHER = [(T.MaxPool1d(2), (2, 4, 6)), (T.AvgPool1d(3, 1, 1), (2, 4, 6)),
         (T.BatchNorm1d(4), (2, 4, 6)), (T.BatchNorm1d(4), (3, 4)),
         (T.InstanceNorm1d(4), (2, 4, 6)), (T.Upsample(scale_factor=2, mode="linear"), (2, 4, 5)),
         (T.AdaptiveAvgPool1d(4), (2, 4, 6)), (T.ReflectionPad1d((2, 1)), (2, 4, 6)),
         (T.MaxPool3d(2), (1, 3, 4, 4, 6)), (T.AvgPool3d((1, 2, 2)), (1, 3, 4, 4, 6)),
         (T.BatchNorm3d(3), (2, 3, 2, 3, 4)), (T.InstanceNorm3d(3), (2, 3, 2, 3, 4)),
         (T.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 3, 2)),
         (T.AdaptiveMaxPool3d((1, 2, 3)), (1, 2, 3, 3, 5)), (T.ReplicationPad3d(1), (1, 2, 3, 3, 2)),
         (T.Dropout3d(0.5), (1, 2, 3, 3, 2)), (T.Linear(4, 3, bias=False), (5, 4)),
         (T.LayerNorm(4), (5, 4)), (T.LayerNorm(4, bias=False), (5, 4)),
         (T.LayerNorm(4, elementwise_affine=False), (5, 4)), (T.RMSNorm(4, eps=1e-5), (5, 4)),
         (T.Softmax(-1), (5, 4)), (T.Conv1d(4, 2, 3, padding="same"), (1, 4, 7)),
         (T.Conv3d(2, 2, 2), (1, 2, 3, 4, 3)), (T.Hardtanh(), (5, 4))]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("theirs", ELEMENTWISE, ids=repr)
def test_elementwise(theirs, data_format): same(theirs, (2, 4, 5, 6), data_format)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("theirs", SPATIAL, ids=lambda layer: repr(layer)[:60])
def test_spatial(theirs, data_format): same(theirs, (2, 4, 7, 6), data_format)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(("theirs", "shape"), OTHER, ids=lambda value: repr(value)[:60])
def test_other_ranks(theirs, shape, data_format): same(theirs, shape, data_format)


@pytest.mark.parametrize("data_format", FORMATS)
def test_embedding(data_format):
    theirs = T.Embedding(7, 3)
    ours = flashconv.convert_model(theirs, data_format=data_format)
    np.testing.assert_array_equal(np.array(ours(mx.array([[1, 6]]))),
                                  theirs(torch.tensor([[1, 6]])).detach().numpy())


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(("theirs", "shape"), [
    (T.BatchNorm1d(4), (5, 4)), (T.BatchNorm1d(4, momentum=0.3), (5, 4, 3)),
    (T.BatchNorm2d(4), (3, 4, 5, 2)), (T.BatchNorm3d(4), (3, 4, 5, 2, 2))], ids=repr)
def test_running_statistics(theirs, shape, data_format):
    "In training mode the batch is normalised by itself, and the statistics move as PyTorch's."
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) + 2
    ours = flashconv.convert_model(theirs.train(), data_format=data_format)
    for _ in range(3):
        right = theirs(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(call(ours, x, data_format), right, 1e-4, 1e-5)
    for name, value in flashconv.to_torch_state(ours).items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)


REFUSED = [
    (T.MaxPool2d(2, return_indices=True), "return_indices=True"),
    (T.AdaptiveMaxPool2d(2, return_indices=True), "return_indices=True"),
    (T.Upsample(scale_factor=2, mode="area"), "area"),
    (T.BatchNorm2d(2, momentum=None), "momentum=None"),
    (T.RMSNorm((2, 3), eps=1e-5), "normalized_shape=(2, 3)"), (T.RMSNorm(3), "eps=None"),
    (T.RMSNorm(3, 1e-5, elementwise_affine=False), "elementwise_affine=False"),
    (T.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
    (T.Embedding(3, 2, padding_idx=0), "padding_idx=0"), (T.Embedding(3, 2, max_norm=1.0), "max_norm"),
    (T.Softmax(0), "dim=0"),
    (T.Softmax(), "dim=None"), (T.GLU(2), "dim=2"), (T.Unflatten(2, (1, 2)), "dim=2"),
    (T.Dropout(1.0), "1.0"), (T.LSTM(2, 2), "no equal is known"),
    (T.MultiheadAttention(2, 1), "no equal is known"), (T.ModuleList([T.ReLU()]), "can't be called"),
    (T.Conv2d(1, 1, 1, device="meta"), "meta"), (T.Linear(1, 1, device="meta"), "no dense tensor"),
    (T.LazyLinear(3), "no values yet"), (T.LazyBatchNorm1d(), "no equal is known"),
]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(("theirs", "reason"), REFUSED, ids=lambda value: repr(value)[:60])
def test_refused(theirs, reason, data_format):
    "What has no equal is an error that says why, in the report too."
    with pytest.raises(ValueError) as error: flashconv.convert_model(theirs, data_format=data_format)
    assert reason in str(error.value) and type(theirs).__name__ in str(error.value)
    report = flashconv.conversion_report(theirs, data_format=data_format)
    assert reason in repr(report) and not any(row.ours for row in report if row.reasons)


@pytest.mark.parametrize(("layers", "fits"), [
    ((T.Conv2d(3, 3, 1), T.Linear(3, 3)), False), ((T.Linear(3, 3), T.Conv1d(3, 3, 1)), False),
    ((T.BatchNorm2d(3), T.ReLU(), T.LayerNorm(3)), False),
    ((T.Sequential(T.MaxPool2d(1)), T.Sequential(T.GELU(), T.Linear(3, 3))), False),
    ((T.Embedding(3, 3), T.Conv1d(3, 3, 1)), False), ((T.Conv2d(3, 3, 1), T.Softmax(-1)), False),
    ((T.Conv2d(3, 3, 3), T.Flatten(), T.Linear(3, 3), T.BatchNorm1d(3), T.Linear(3, 3)), True),
    ((T.Linear(3, 12), T.Unflatten(1, (3, 2, 2)), T.Conv2d(3, 3, 1)), True),
    ((T.Conv2d(3, 3, 1), T.Flatten(2)), False)], ids=repr)
def test_last_axis(layers, fits):
    "Channels last, a layer along PyTorch's last axis can't follow one of pictures; first, it can."
    theirs = T.Sequential(*layers)
    flashconv.convert_model(theirs)
    if fits: flashconv.convert_model(theirs, data_format="channels_last")
    else:
        with pytest.raises(ValueError, match="Flatten|start_dim"):
            flashconv.convert_model(theirs, data_format="channels_last")


class Both(T.Module):
    "Two branches, a parameter, a buffer and attributes."
    def __init__(self, twice=True):
        super().__init__()
        self.branches = T.ModuleList([T.Conv2d(3, 3, 3, padding=1), T.Identity()])
        self.named = T.ModuleDict({"norm": T.BatchNorm2d(3)})
        self.gain = T.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor([0.5]))
        self.absent, self.twice, self.note = None, twice, {"a": ["copy"]}

    def forward(self, x):
        y = sum(branch(x) for branch in self.branches)
        return self.named["norm"](y) * self.gain * (1 + self.twice) + self.shift


class OurBoth(nn.Module):
    def __init__(self): raise AssertionError("the constructor is not called")

    def __call__(self, x):
        y = sum(branch(x) for branch in self.branches)
        return self.named["norm"](y) * self.gain * (1 + self.twice) + self.shift


class Unknown(Both): pass


@pytest.mark.parametrize("data_format", FORMATS)
def test_own_classes(data_format):
    theirs = T.Sequential(Both(), Both(False))
    ours = same(theirs, (2, 3, 4, 4), data_format, {Both: OurBoth})
    assert ours.layers[0].absent is None and ours.layers[0].note == {"a": ["copy"]}
    theirs[0].note["a"].append("changed later")
    assert ours.layers[0].note == {"a": ["copy"]}
    assert flashconv.load_torch_state(ours, theirs.state_dict()) == ([], [])
    assert list(flashconv.to_torch_state(ours)) == list(theirs.state_dict())
    assert "shift" not in ours.layers[0].trainable_parameters()
    with pytest.raises(ValueError, match=r"(?s)1 of \d+ layers.*1: Unknown: no equal is known"):
        flashconv.convert_model(T.Sequential(Both(), Unknown()), modules={Both: OurBoth})


def test_all_is_listed():
    "One error names everything, children of unknown classes included."
    theirs = T.Sequential(Both(), T.Sequential(T.LSTM(1, 1), T.Softmax(0)), T.ReLU())
    theirs[0].branches[1] = T.GRU(1, 1)
    with pytest.raises(ValueError) as error: flashconv.convert_model(theirs)
    for path in ("0: Both", "0.branches.1: GRU", "1.0: LSTM", "1.1: Softmax"):
        assert f"\n\t{path}: " in str(error.value)
    assert len(str(error.value).splitlines()) == 5
    assert [row.path for row in flashconv.conversion_report(theirs)] == [
        "0", "0.branches.0", "0.branches.1", "0.named.norm", "1.0", "1.1", "2"]


def test_layers_without_parameters_are_modules():
    "Modes reach them, and they freeze, as every module of MLX does."
    theirs = T.Sequential(T.Flatten(), T.Unflatten(1, (2, 2)), T.AdaptiveAvgPool1d(1),
                          T.ZeroPad1d(1))
    for layer in flashconv.convert_model(theirs.eval()).layers:
        assert not layer.training and layer.train().training and not layer.eval().training
        assert layer.freeze().unfreeze() is layer and layer.parameters() == {}


def test_what_changes_a_layer_is_refused():
    class Halved(T.Linear):
        def forward(self, x): return super().forward(x) / 2
    hooked, patched = T.ReLU(), T.Linear(1, 1)
    hooked.register_forward_hook(lambda layer, x, y: y + 1)
    patched.forward = lambda x: x
    turned = torch.nn.utils.parametrizations.orthogonal(T.Linear(2, 2))
    whole = T.Sequential(T.ReLU())
    whole.register_forward_pre_hook(lambda layer, x: None)
    class Frozen(T.BatchNorm2d):
        def train(self, mode=True): return super().train(False)
    class Standard(T.Linear):
        def __init__(self):
            super().__init__(1, 1)
            self.raw = self._parameters.pop("weight")
        @property
        def weight(self): return self.raw / 2
    for theirs, reason in ((Halved(1, 1), "no equal"), (hooked, "has the hook"),
                           (patched, "no equal"), (turned, "parametrized"), (whole, "hook"),
                           (Frozen(1), "replaces train"), (Standard(), "replaces weight")):
        with pytest.raises(ValueError, match=reason): flashconv.convert_model(theirs)
    class Named(T.Linear): pass
    assert type(flashconv.convert_model(Named(2, 3))) is nn.Linear


@pytest.mark.parametrize("make", (lambda: T.Linear(3, 2), lambda: T.Conv1d(3, 2, 1)), ids=("Linear", "Conv1d"))
def test_a_layer_with_a_norm_and_nothing_around_it(make):
    theirs = torch.nn.utils.parametrizations.weight_norm(make())
    ours, x = flashconv.convert_model(theirs), torch.randn(3, 3)
    assert set(flashconv.to_torch_state(ours)) == set(theirs.state_dict())
    np.testing.assert_allclose(np.array(ours(mx.array(x.numpy()))), theirs(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_shared_layers_and_tied_parameters():
    "A layer in two places stays one. A parameter in two layers can't, and is refused."
    shared = T.Linear(3, 3)
    ours = flashconv.convert_model(T.Sequential(shared, T.ReLU(), shared))
    assert ours.layers[0] is ours.layers[2]
    tied = T.Sequential(T.Linear(3, 3), T.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="1: Linear: its weight is also 0.weight"):
        flashconv.convert_model(tied)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16", "float64"))
def test_bits_and_modes(dtype):
    "Values, dtypes, what is frozen and each module's mode come over; the model is not touched."
    theirs = T.Sequential(T.Conv1d(2, 3, 3), T.BatchNorm1d(3), T.Sequential(T.Linear(4, 4)))
    theirs.to(getattr(torch, dtype)).train()
    theirs[1].eval()
    theirs[2][0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = flashconv.convert_model(theirs)
    for name, value in flashconv.to_torch_state(ours).items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert (ours.training, ours.layers[1].layer.training, ours.layers[2].training) == (
        True, False, True)
    assert list(ours.layers[2].layers[0].trainable_parameters()) == ["bias"]
    with torch.no_grad():
        for p in theirs.parameters(): p.zero_()
    assert torch.equal(flashconv.to_torch_state(ours)["0.weight"], before["0.weight"])


def test_lazy_convolutions_stay_lazy():
    ours = flashconv.convert_model(T.Sequential(T.LazyConv2d(4, 3), T.ReLU()))
    assert type(ours.layers[0]) is flashconv.LazyConv2d
    ours(mx.zeros((1, 5, 4, 4)))
    assert ours.layers[0].in_channels == 5


def test_an_mlx_module():
    "The result trains, compiles, copies and pickles as others do."
    theirs = T.Sequential(T.Conv2d(2, 3, 3), T.BatchNorm2d(3), T.AdaptiveAvgPool2d(2), T.Flatten(),
                          T.Linear(12, 2))  # mlx.nn's pooling can't be copied
    ours, x = flashconv.convert_model(theirs.eval()), mx.random.normal((2, 2, 6, 6))
    y = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), mx.compile(ours)):
        assert mx.allclose(other(x), y, 1e-5, 1e-6)
    loss, gradients = nn.value_and_grad(ours, lambda x: ours(x).square().mean())(x)
    assert "running_mean" not in gradients["layers"][1]["layer"]


@pytest.mark.parametrize("model", (None, "resnet", nn.Linear(1, 1), T.Linear, {}))
def test_no_module(model):
    for function in (flashconv.convert_model, flashconv.conversion_report):
        with pytest.raises(TypeError, match="torch.nn.Module"): function(model)


@pytest.mark.parametrize(("keywords", "error", "message"), [
    ({"data_format": "NHWC"}, ValueError, "data_format"),
    ({"modules": {Both: None}}, TypeError, "mlx.nn.Module"),
    ({"modules": {Both: T.Linear}}, TypeError, "mlx.nn.Module"),
    ({"modules": {Both: OurBoth.__call__}}, TypeError, "mlx.nn.Module"),
    ({"modules": [Both]}, TypeError, "modules")], ids=("format", "None", "torch", "function", "list"))
def test_bad_arguments(keywords, error, message):
    with pytest.raises(error, match=message): flashconv.convert_model(T.ReLU(), **keywords)


# What stands in the way is said

class Passing(T.Module):
    "A block whose skip connection carries what its layers have done to their input."
    def __init__(self, *layers):
        super().__init__()
        self.body = T.Sequential(*layers)

    def forward(self, x): return (self.body(x).flatten(1) + x.flatten(1)) * 2


class OurPassing(nn.Module):
    def __call__(self, x): return (self.body(x).flatten(1) + x.flatten(1)) * 2


@pytest.mark.parametrize("layers", [
    lambda: [T.ReLU(inplace=True), T.Conv2d(2, 2, 1)], lambda: [T.ELU(inplace=True)],
    lambda: [T.Identity(), T.Dropout(0.5), T.LeakyReLU(0.3, inplace=True), T.Conv2d(2, 2, 1)],
    lambda: [T.Sequential(T.Sequential(), T.Hardtanh(inplace=True)), T.BatchNorm2d(2)],
    lambda: [T.Conv2d(2, 2, 1), T.ReLU(inplace=True)], lambda: [T.Dropout2d(0.5, inplace=True)],
    lambda: (lambda act: [T.Conv2d(2, 2, 1), act, Passing(act, T.Conv2d(2, 2, 1))])(T.SELU(inplace=True))])
def test_in_place(layers):
    "The block gives what it gives in PyTorch, and what happens to its input happens here."
    theirs = T.Sequential(T.Conv2d(2, 2, 1), Passing(*layers())).eval()
    if isinstance(theirs[1].body[-1], Passing): theirs[1].body.append(T.Unflatten(1, (2, 3, 4)))
    ours = flashconv.convert_model(theirs, modules={Passing: OurPassing})
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)
    right = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(np.array(ours(mx.array(x))), right, 1e-5, 1e-5)
    np.testing.assert_allclose(np.array(mx.compile(ours)(mx.array(x))), right, 1e-5, 1e-5)


def test_in_place_where_nobody_sees_it():
    "Behind a layer that makes something new an activation stays MLX's."
    ours = flashconv.convert_model(T.Sequential(T.Conv1d(1, 1, 1), T.ReLU(inplace=True),
                                                T.ReLU(inplace=True)))
    assert [type(layer) for layer in ours.layers[1:]] == [nn.ReLU, nn.ReLU]
    report = flashconv.conversion_report(T.Sequential(T.ReLU(inplace=True)))
    assert report[0].ours == "flashconv.InPlace(mlx.nn.ReLU)"


class Saves(T.Linear):
    def get_extra_state(self): return {"a": 1}
    def set_extra_state(self, state): pass


def adorned(layer, /, **attributes):
    "A layer with attributes, of which tensors are buffers."
    for name, value in attributes.items():
        if type(value) is torch.Tensor: layer.register_buffer(name, value)
        else: setattr(layer, name, value)
    return layer


def hooked(layer):
    layer._register_state_dict_hook(lambda module, state, prefix, _: state.update({prefix + "z": 1}))
    return layer


def two_that_share(make):
    "Two layers with what `make` gives for each in turn."
    first, second = T.Linear(4, 4), T.BatchNorm1d(4)
    make(first, second)
    return T.Sequential(first, second)


OBSTACLES = {
    "wrapped": (lambda: torch.compile(T.Sequential(T.Tanh())), "convert model._orig_mod"),
    "wrapped inside": (lambda: T.Sequential(T.DataParallel(T.Tanh())), "put model.0.module in its place"),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(T.Tanh()), "convert model.module"),
    "extra state": (lambda: T.Sequential(Saves(1, 1)), "has 0._extra_state"),
    "state hook": (lambda: T.Sequential(hooked(T.Linear(1, 1))), "has 0.z"),
    "method": (lambda: adorned(T.Linear(1, 1), update=3), "its update has a name"),
    "parameter": (lambda: adorned(T.Conv1d(1, 1, 1), keys=T.Parameter(torch.ones(1))), "its keys has"),
    "underscore": (lambda: adorned(T.Conv1d(1, 1, 1), _hidden=torch.ones(1)), "its _hidden begins"),
    "child": (lambda: T.Sequential(adorned(T.Tanh(), _deep=T.Linear(1, 1))), "its _deep begins"),
    "ours": (lambda: adorned(T.Conv1d(1, 1, 1), data_format="NCL"), "its data_format is something else"),
    "wrapper's": (lambda: adorned(T.BatchNorm1d(1), layer=3), "its layer is something else"),
    "list": (lambda: adorned(T.Sequential(), layers=T.Parameter(torch.ones(1))), "its layers"),
    "on a list": (lambda: T.Sequential(adorned(T.Tanh(), some=adorned(T.ModuleList(), gain=torch.ones(1)))),
                  "its gain would be lost"),
    "complex128": (lambda: adorned(T.Linear(1, 1), a=torch.ones(1, dtype=torch.complex128)), "its a is no"),
    "sparse": (lambda: adorned(T.Linear(1, 1), a=torch.eye(2).to_sparse()), "its a is no dense"),
    "attribute": (lambda: adorned(T.Tanh(), a=[torch.eye(2).to_sparse()]), "its a can't come along"),
    "itself twice": (lambda: (lambda layer: adorned(layer, a=layer.weight))(T.Linear(1, 1)), "its a is also weight"),
    "view": (lambda: two_that_share(lambda a, b: setattr(b, "weight", T.Parameter(a.weight.data[0]))),
             "its weight is also 0.weight"),
    "buffer": (lambda: two_that_share(lambda a, b: b.register_buffer("w", a.bias.detach())), "its w is also"),
    "in a list": (lambda: two_that_share(lambda a, b: setattr(b, "ref", [a.weight])), "it holds 0.weight"),
    "flattened": (lambda: T.Sequential(Passing(T.Flatten(), T.ReLU(inplace=True))), "what was flattened"),
    "mixed list": (lambda: Passing(adorned(T.Tanh(), p=T.ParameterList(
        [torch.ones(1), T.Parameter(torch.ones(1), False)]))), "its p has frozen and other"),
    "method of a layer": (lambda: (lambda layer: adorned(layer, act=layer.extra_repr))(T.Linear(1, 1)),
                          "method extra_repr"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles(name):
    "Each is named, by the report too, and the module stays as it was."
    make, words = OBSTACLES[name]
    theirs, modules = make(), {Passing: OurPassing}
    before = copy.copy(vars(theirs))
    with pytest.raises(ValueError) as error: flashconv.convert_model(theirs, modules=modules)
    assert words in str(error.value)
    assert words in repr(flashconv.conversion_report(theirs, modules=modules))
    assert vars(theirs) == before


def test_masks_may_be_shared():
    "A buffer that nothing changes is copied for each layer that has it."
    mask = torch.ones(3)
    theirs = T.Sequential(adorned(T.Linear(1, 1), mask=mask), adorned(T.Linear(1, 1), mask=mask))
    assert list(flashconv.to_torch_state(flashconv.convert_model(theirs))) == list(theirs.state_dict())


def test_attributes_refer_to_the_converted():
    "Layers in lists are those of the tree, methods are the new class's, whatever isn't is there too."
    class Graph(T.Module):
        def __init__(self):
            super().__init__()
            self.a, self.alone = T.Linear(1, 1), [T.Linear(1, 1)]
            self.refs, self.run, self.config = {"a": (self.a, [self])}, self.step, {"dtype": torch.float32}
            self.act, self.width = torch.relu, 3
        def step(self): return "PyTorch"
    class OurGraph(nn.Module):
        def step(self): return "MLX"
        def act(self, x): return nn.relu(x)
        @property
        def width(self): return 4
    theirs = Graph()
    ours = flashconv.convert_model(theirs, modules={Graph: OurGraph})
    assert ours.refs["a"][0] is ours.a and ours.refs["a"][1][0] is ours and ours.run() == "MLX"
    assert ours.act(mx.array(-1.0)) == 0 and ours.width == 4 and ours.config == theirs.config
    assert type(ours.alone[0]) is nn.Linear and list(ours.parameters()) == ["a"]
    assert copy.deepcopy(ours).run() == "MLX"


def test_what_is_left_out_stays_out():
    "A buffer that isn't saved, or a tensor in a list, gets another value: still no state, no weight."
    theirs = adorned(T.Conv1d(1, 1, 1), seen=[torch.ones(1)])
    theirs.register_buffer("window", torch.ones(2), persistent=False)
    for ours in (flashconv.convert_model(theirs), flashconv.from_torch(theirs)):
        ours.window, ours.seen = ours.window * 2, [mx.zeros(1)]
        assert list(flashconv.to_torch_state(ours)) == list(ours.state_dict()) == ["weight", "bias"]
        assert list(ours.trainable_parameters()) == ["weight", "bias"]


@pytest.mark.parametrize("data_format", FORMATS)
def test_batches_are_counted(data_format):
    "In training mode, as in PyTorch; a state without the number is loaded all the same."
    theirs = T.Sequential(T.BatchNorm2d(2), T.BatchNorm2d(2, track_running_stats=False)).train()
    ours, x = flashconv.convert_model(theirs, data_format=data_format), np.ones((2, 2, 2, 2), np.float32)
    for _ in range(3): theirs(torch.from_numpy(x)), call(ours, x, data_format)
    ours.eval(), call(ours, x, data_format)
    assert flashconv.to_torch_state(ours)["0.num_batches_tracked"] == 3
    state = {name: value for name, value in theirs.state_dict().items() if "num" not in name}
    assert flashconv.load_torch_state(ours, state) == ([], [])
    assert flashconv.load_torch_state(nn.Sequential(nn.BatchNorm(2), nn.BatchNorm(2, track_running_stats=False)),
                                      theirs.state_dict()) == ([], [])
    with pytest.raises(RuntimeError, match="steps.num_batches_tracked"):
        flashconv.load_torch_state(ours, state | {"steps.num_batches_tracked": torch.tensor(1)})
