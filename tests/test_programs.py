"""Networks whose forward is code: exported, converted, trained, changed and refused."""
import copy
import dataclasses
import pickle
import warnings
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
warnings.simplefilter("ignore")

import flashconv
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import zoo
from zoo import arrays, compared, doubled, flat

F = torch.nn.functional
AUTO = torch.export.Dim.AUTO
BOUND = 1e-6


def x(*shape, seed=0): return zoo.image(*shape, seed=seed).double()


def network(forward, **parts):
    "A network with some modules, parameters and a forward."
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items(): setattr(self, name, part)
    Network.forward = forward
    torch.manual_seed(0)
    return Network().double()


def equal(theirs, args, kwargs=None, inputs=None, **options):
    "Outputs, gradients and the state are equal in both modes; inputs are others than the example."
    kwargs = kwargs or {}
    ours = flashconv.convert_model(theirs, args, kwargs, **options)
    given, named = inputs or (args, kwargs)
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        copies = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v,
                                              (given, named))
        errors = compared(theirs, ours, *copies)
        assert max(errors) < BOUND, errors
    assert sorted(flashconv.to_torch_state(ours)) == sorted(theirs.state_dict())
    return ours


conv = lambda i=3, o=4: torch.nn.Conv2d(i, o, 3, padding=1)


# In-place operations and views -----------------------------------------------------------------


def write_slice(self, v):
    y = self.conv(v)
    y[:, 1:3, ::2] = y[:, 1:3, ::2] * 2 + 1
    return y.sum((2, 3)), y


def write_view_then_read(self, v):
    y = self.conv(v)
    left, right = y[:, :2], y.narrow(1, 2, 2)
    flat_view = y.view(y.shape[0], -1)
    left.mul_(3)
    right[:, 0].add_(left[:, 1])
    flat_view[:, :5] = 0
    return y * 1, left + right, flat_view.mean(1)


def write_transposed(self, v):
    y = self.conv(v).permute(0, 2, 3, 1)
    y[..., 0] -= y[..., 1]
    y.transpose(1, 2)[:, 0].zero_()
    return y.relu_()


def write_selected(self, v):
    y = self.conv(v)
    for i in range(4): y.select(1, i).mul_(i + 1)
    y.diagonal(0, 2, 3).clamp_(-0.5, 0.5)
    a, b = torch.split(y, [1, 3], 1)
    return y + 0, a, b


def write_mask(self, v):
    y = self.conv(v)
    y[y > 0.3] = 0.25
    y.masked_fill_(y < -0.3, -1)
    y[:, [0, 2]] += 1
    return y


def write_detached(self, v):
    y = self.conv(v)
    with torch.no_grad(): scale = y.abs().mean()
    return y / scale + y.detach() * 0.5


def write_buffer(self, v):
    y = self.conv(v)
    if self.training:
        with torch.no_grad(): self.mean.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
    self.calls += 1
    return y - self.mean[None, :, None, None]


def skip_in_place(self, v):
    y = self.conv(v)
    z = F.relu(y, inplace=True)
    return z + y


@pytest.mark.parametrize("forward", (write_slice, write_view_then_read, write_transposed, write_selected,
                                     write_mask, write_detached, skip_in_place),
                         ids=lambda f: f.__name__)
def test_writes(forward):
    "What is written in place is read afterwards, through whatever view."
    equal(network(forward, conv=conv()), (x(2, 3, 6, 6),))


def test_buffers():
    "Buffers that forward changes are changed, and others are there without being in the state."
    theirs = network(write_buffer, conv=conv())
    theirs.register_buffer("mean", torch.zeros(4).double())
    theirs.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
    ours = equal(theirs, (x(2, 3, 6, 6),))
    assert ours["_calls"].item() == 2 and not list(ours.mean.tolist()) == [0] * 4
    ours.unfreeze()
    assert "mean" not in ours.trainable_parameters()


# Zeros around convolutions ------------------------------------------------------------------------


def pads_of(pad, mode="constant", value=None):
    return lambda self, v: self.conv(F.pad(v, pad, mode, value))


def strict(forward, *sizes, count=0, name="Conv2d", **options):
    return forward, sizes or (7, 6), count, name, options


@pytest.mark.parametrize("forward, sizes, count, name, options", (
    strict(pads_of((1, 2, 3, 0))), strict(pads_of((1, 2)), padding=1), strict(pads_of((2, 0)), 8, name="Conv1d"),
    strict(pads_of((1, 0, 0, 2, 2, 1)), 4, 5, 3, name="Conv3d", padding=(1, 0, 2)), strict(pads_of((1, 0), value=0.0)),
    strict(pads_of((1, 1, 0, 1)), stride=2, dilation=2, groups=3, padding=(2, 1)),
    strict(lambda self, v: self.conv(F.pad(v, (0, 1))) + self.conv(F.pad(v, (1, 0)))),
    strict(lambda self, v: (lambda p: self.conv(p) + self.conv(p))(F.pad(v, (0, 1)))),
    strict(pads_of((-1, 2)), count=1), strict(pads_of((1, 2), value=0.5), count=1), strict(pads_of((1, 2, 0, 1), "reflect"), count=1),
    strict(pads_of((0, 0, 0, 0, 1, 0)), count=1, channels=4), strict(pads_of((1, 0)), count=1, name="ConvTranspose2d"),
    strict(pads_of((1, 0)), count=1, padding="same"),
    strict(lambda self, v: self.conv(F.pad(v, (0, 1)).mul_(2) + 1), count=1),
    strict(lambda self, v: self.conv(F.pad(v, (0, 1)).relu_()), count=1),
    strict(lambda self, v: (lambda p: self.conv(p).sum() + p.square())(F.pad(v, (0, 1))), count=1)))
def test_zeros_around_convolutions(forward, sizes, count, name, options):
    "Zeros that convolutions alone read are theirs; others stay."
    channels = options.pop("channels", 3)
    theirs = network(forward, conv=getattr(torch.nn, name)(channels, 6, 3, **options))
    ours = equal(theirs, (x(2, 3, *sizes),))
    assert ours.program.count("ops.pad(") == count
    report = flashconv.conversion_report(theirs, (x(2, 3, *sizes),))
    assert count == (not any(row.became == "padding of convolutions" for row in report))
    same_source(theirs, (x(2, 3, *sizes),))


def test_zeros_around_what_is_written_to():
    "A convolution reads what was padded, as it was then."
    def forward(self, v):
        y = v * 1
        padded = F.pad(y, (1, 0))
        y.mul_(3)
        return self.conv(padded), y
    theirs = network(forward, conv=conv())
    assert "ops.pad(" not in equal(theirs, (x(2, 3, 7, 6),)).program


# Modes -------------------------------------------------------------------------------------------


def test_modes():
    "Dropout is drawn in training, a norm may stay as it is, and what forward asks is asked."
    def forward(self, v):
        y = self.norm(self.conv(v))
        if self.training: y = y * 2
        return F.dropout(self.drop(y), 0.5, self.training).mean((2, 3)) + F.dropout(y, 0.5, True).sum() * 0
    theirs = network(forward, conv=conv(), norm=torch.nn.BatchNorm2d(4), drop=torch.nn.Dropout(0.5))
    v = x(2, 3, 6, 6)
    ours = flashconv.convert_model(theirs, (v,))
    array = arrays(v)
    first, second = (np.array(ours.train()(array)) for _ in range(2))
    assert not np.array_equal(first, second)
    assert ours.norm.num_batches_tracked.item() == 2
    before = np.array(ours.norm.running_mean)
    ours.norm.eval()
    ours(array)
    assert np.array_equal(before, ours.norm.running_mean) and ours.norm.num_batches_tracked.item() == 2
    flashconv.load_torch_state(ours, theirs.eval().state_dict())
    ours.eval()
    assert np.allclose(ours(array), theirs(v).detach(), atol=1e-6)


def test_running_statistics():
    "After three batches they are PyTorch's, those of a norm that is called twice too."
    theirs = network(lambda self, v: self.inst(self.norm(self.norm(self.conv(v)))), conv=conv(),
                     norm=torch.nn.BatchNorm2d(4, momentum=0.3),
                     inst=torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    ours = equal(theirs, (x(2, 3, 6, 6),))
    assert ours.norm.num_batches_tracked.item() == 2


def test_modes_are_kept():
    "The network has the modes that PyTorch's has, before and after, and what is frozen stays."
    theirs = network(lambda self, v: self.b(self.a(v)), a=conv(), b=torch.nn.BatchNorm2d(4))
    theirs.train()
    theirs.b.eval()
    theirs.a.weight.requires_grad_(False)
    ours = flashconv.convert_model(theirs, (x(2, 3, 4, 4),))
    assert theirs.training and not theirs.b.training and theirs.a.training
    assert ours.training and not ours.b.training and ours.a.training
    assert list(ours.trainable_parameters()["a"]) == ["bias"]
    ours.unfreeze()
    assert set(ours.trainable_parameters()["b"]) == {"weight", "bias"}
    assert "weight" in ours.trainable_parameters()["a"]


# Names and state ---------------------------------------------------------------------------------


def test_names():
    "Names that MLX uses itself, underscores, numbers and lists are PyTorch's in the state."
    def forward(self, v):
        y = self._hidden(v) + self.update(v)
        for layer in self.layers: y = layer(y)
        return self.items[0](y) * self._scale + self.table["a.b".split(".")[0]](y) + self.weights[1]
    theirs = network(forward, _hidden=conv(), update=conv(), items=torch.nn.ModuleList([conv(4, 4)]),
                     layers=torch.nn.Sequential(conv(4, 4), torch.nn.ReLU(), conv(4, 4)),
                     _scale=torch.nn.Parameter(torch.ones(1)),
                     table=torch.nn.ModuleDict({"a": conv(4, 4)}),
                     weights=torch.nn.ParameterList([torch.zeros(1), torch.ones(1)]))
    ours = equal(theirs, (x(2, 3, 4, 4),))
    other = flashconv.convert_model(network(forward, **dict(theirs._modules), **dict(theirs._parameters)),
                                    (x(2, 3, 4, 4),))
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    flashconv.load_torch_state(other, state)
    back = flashconv.to_torch_state(other)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    theirs.load_state_dict(flashconv.to_torch_state(ours))


def test_names_of_python():
    "Names that Python uses itself, or that are no names in Python, are PyTorch's in the state."
    def forward(self, v):
        y = self.table["in"](v) + self.table["3x3-a"](v) + self.table["3x3_a"](v)
        return torch.where((y > 0) & (y < 1), y, getattr(self, "global"))
    theirs = network(forward, table=torch.nn.ModuleDict({"in": conv(), "3x3-a": conv(), "3x3_a": conv()}),
                     **{"global": torch.nn.Parameter(torch.ones(1))})
    ours = equal(theirs, (x(2, 3, 4, 4),))
    assert list(flashconv.to_torch_state(ours)) == list(theirs.state_dict())
    same_source(theirs, (x(2, 3, 4, 4),))


def test_ties():
    "A tensor under two names is one array, with the gradient of both uses."
    theirs = network(lambda self, v: self.b(self.a(v)) + self.c(v), a=conv(3, 3), b=conv(3, 3))
    theirs.b.weight = theirs.a.weight
    theirs.c = theirs.a
    ours = equal(theirs, (x(2, 3, 4, 4),))
    assert len(zoo.tree_flatten(ours.parameters())) == 3
    state = theirs.state_dict()
    assert flashconv.load_torch_state(ours, {n: v * 0 + 1 for n, v in state.items()}) == ([], [])
    assert float(ours.a.weight.min()) == 1


def test_a_list_at_the_top():
    "A Sequential that is refused layer by layer."
    class Double(torch.nn.Module):
        def forward(self, v): return v * 2
    ours = equal(torch.nn.Sequential(conv(), Double(), torch.nn.BatchNorm2d(4)).double(), (x(2, 3, 4, 4),))
    weights = dict(zoo.tree_flatten(ours.parameters()))
    ours.load_weights(list(weights.items()))
    assert "layers.0.weight" in weights


def test_persistence(tmp_path):
    "Copies, pickles and files hold the same network."
    theirs = network(lambda self, v: self.norm(self.conv(v)) * self.scale, conv=conv(),
                     norm=torch.nn.BatchNorm2d(4))
    theirs.register_buffer("scale", torch.full((1,), 3.0).double(), persistent=False)
    v = x(2, 3, 4, 4)
    ours = flashconv.convert_model(theirs.float(), (v.float(),))
    array = arrays(v.float())
    y = np.array(ours(array))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        flashconv.load_torch_state(again, theirs.state_dict())
        assert np.array_equal(again(array), y)
    ours.save_weights(str(tmp_path / "w.safetensors"))
    other = flashconv.convert_model(copy.deepcopy(theirs), (v.float(),))
    other.conv.weight = mx.zeros_like(other.conv.weight)
    other.load_weights(str(tmp_path / "w.safetensors"))
    assert np.array_equal(other.eval()(array), ours.eval()(array))


# What goes in and comes out -----------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    image: object
    rest: object = None


def test_structures():
    "Nested tuples, dicts and dataclasses, by place and by name, and constants."
    def forward(self, batch, scale=2.0, *, mask=None, pairs=()):
        y = self.conv(batch["a"]) * scale + pairs[0][0]
        return Pair(y, {"z": [y.mean(), mask]}), (y.shape[0], None)
    theirs = network(forward, conv=conv())
    v, mask = x(2, 3, 4, 4), x(2)
    kwargs = {"mask": mask, "pairs": ((x(1), 3),)}
    ours = flashconv.convert_model(theirs, ({"a": v},), kwargs)
    found, (count, nothing) = ours({"a": arrays(v)}, **arrays(kwargs))
    right, _ = theirs({"a": v}, **kwargs)
    assert count == 2 and nothing is None and list(found) == ["image", "rest"]
    assert np.allclose(found.image, right.image.detach()) and np.allclose(found[0], found["image"])
    assert np.array_equal(found.rest["z"][1], mask)
    assert np.allclose(ours(batch={"a": arrays(v)}, **arrays(kwargs))[0].image, found.image)
    with pytest.raises(ValueError, match="exported for 3"):
        ours({"a": arrays(v)}, mask=arrays(mask), pairs=((arrays(x(1)), 4),))
    with pytest.raises(TypeError, match="expected"): ours({"b": arrays(v)}, **arrays(kwargs))
    with pytest.raises(TypeError, match="expected an mx.array"): ours({"a": 1}, **arrays(kwargs))


# Sizes ---------------------------------------------------------------------------------------------


def sized(self, v):
    n, c, h, w = v.shape
    y = self.norm(self.conv(v))
    y = F.interpolate(F.avg_pool2d(y, 2), size=(h, w), mode="bilinear", align_corners=False)
    tokens = y.flatten(2).transpose(1, 2)
    tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
    grid = torch.arange(h, dtype=v.dtype) / h
    return tokens.transpose(1, 2).reshape(n, 4, h, w) + grid[:, None], y.mean() * (w // 2)


@pytest.mark.parametrize("shape", ((2, 3, 8, 8), (5, 3, 12, 10), (1, 3, 6, 14)))
def test_sizes(shape):
    "A batch and spatial sizes other than the example's."
    equal(network(sized, conv=conv(), norm=torch.nn.BatchNorm2d(4)), (x(2, 3, 8, 8),),
          inputs=((x(*shape),), {}), dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},))


def test_sizes_that_do_not_fit():
    "Each is an error that says which."
    theirs = network(sized, conv=conv(), norm=torch.nn.BatchNorm2d(4)).eval()
    fixed = flashconv.convert_model(theirs, (x(2, 3, 8, 8),))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 8, 8\), but got \(1, 3, 8, 8\)"):
        fixed(mx.zeros((1, 3, 8, 8), mx.float64))
    height = torch.export.Dim("height", min=4, max=20)
    ours = flashconv.convert_model(theirs, (x(2, 3, 8, 8),), dynamic_shapes={"v": {2: 2 * height}})
    assert ours(mx.zeros((2, 3, 24, 8), mx.float64))[0].shape == (2, 4, 24, 8)
    for shape in ((2, 3, 9, 8), (2, 3, 60, 8), (2, 4, 8, 8), (2, 3, 8, 10), (3, 8, 8)):
        with pytest.raises(ValueError, match="exported for"): ours(mx.zeros(shape, mx.float64))


# Training -------------------------------------------------------------------------------------------


def classifier(self, v): return self.head(F.relu(self.norm(self.conv(v))).mean((2, 3)))


def test_training_compiled():
    "Three steps of an optimizer in one compiled function give PyTorch's losses."
    theirs = network(classifier, conv=conv(), norm=torch.nn.BatchNorm2d(4),
                     head=torch.nn.Linear(4, 3)).train()
    v, target = x(4, 3, 6, 6), torch.tensor([0, 2, 1, 1])
    ours, optimizer = flashconv.convert_model(theirs, (v,)), optim.SGD(0.1, momentum=0.9)

    def loss(model, a, b): return nn.losses.cross_entropy(model(a), b, reduction="mean")
    state = [ours.state, optimizer.state, mx.random.state]

    def step(a, b):
        value, gradients = nn.value_and_grad(ours, loss)(ours, a, b)
        optimizer.update(ours, gradients)
        return value
    step = mx.compile(step, inputs=state, outputs=state)
    torch_optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        torch_optimizer.zero_grad()
        right = F.cross_entropy(theirs(v), target)
        right.backward()
        torch_optimizer.step()
        found = step(arrays(v), arrays(target))
        mx.eval(state)
        assert abs(found.item() - right.item()) < 1e-6
    assert np.allclose(ours.norm.running_var, theirs.norm.running_var, atol=1e-6)
    assert np.allclose(mx.compile(ours.eval())(arrays(v)), theirs.eval()(v).detach(), atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_dtypes(dtype):
    "Halves and numbers of Python's, promoted as PyTorch does."
    def forward(self, v):
        y = self.conv(v) * 0.5 + torch.arange(4)[:, None, None]
        return y, y.float().mean() + 1, (y > 0).sum(), v.long() / 2, y.sum(dtype=torch.float64)
    theirs, v = network(forward, conv=conv()).to(dtype).eval(), x(2, 3, 4, 4).to(dtype)
    found = flashconv.convert_model(theirs, (v,))(arrays(v))
    for a, b in zip(found, theirs(v)):
        assert str(a.dtype).rpartition(".")[2] == str(b.dtype).rpartition(".")[2]
        assert np.allclose(a.astype(mx.float32), b.float().detach(), rtol=0.02, atol=0.02)


# Programs that exist already --------------------------------------------------------------------------


def test_exported_programs(tmp_path):
    "An exported program and its file, whose flags follow the mode."
    theirs = network(classifier, conv=conv(), norm=torch.nn.BatchNorm2d(4),
                     head=torch.nn.Linear(4, 3)).eval()
    v = x(2, 3, 6, 6)
    exported = torch.export.export(theirs, (v,))
    torch.export.save(exported, tmp_path / "net.pt2")
    for source in (exported, tmp_path / "net.pt2", str(tmp_path / "net.pt2")):
        ours = flashconv.convert_model(source)
        assert list(flashconv.to_torch_state(ours)) == list(theirs.state_dict())
        assert np.allclose(ours(arrays(v)), theirs(v).detach(), atol=1e-7)
    assert max(compared(theirs.train(), ours.train(), (v,), {})) < BOUND
    for name, options in (("dynamic_shapes", ({0: AUTO},)), ("modules", {Odd: OurOdd})):
        with pytest.raises(TypeError, match=f"{name} is for a torch.nn.Module"):
            flashconv.convert_model(exported, **{name: options})
    with pytest.raises(FileNotFoundError): flashconv.convert_model(tmp_path / "none.pt2")
    with pytest.raises(ValueError, match="named .pt2"): flashconv.convert_model("net.pth", (v,))


def normalise(self, v):
    y = self.norm(self.conv(v))
    return self.head(self.norm(y * 2).mean((2, 3))), self.norm.running_mean * 1


def count(self, v):
    self.calls.add_(1)
    self.seen.mul_(0.5).add_(v.mean())
    return self.conv(v) * self.seen


def normalise_by_itself(self, v):
    return self.alone(v), F.batch_norm(v, None, None, self.norm.weight[:3], self.norm.bias[:3], True)[0]


def normalise_otherwise(self, v):
    y = self.conv(v)
    return F.instance_norm(y), F.group_norm(y, 2), F.layer_norm(y, (6,)), self.head(y.mT.reshape(-1, 4)) @ y[0, 0, :3]


@pytest.mark.parametrize("way", ("core", "functional"))
@pytest.mark.parametrize("forward", (normalise, count, normalise_by_itself, normalise_otherwise),
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", (False, True))
def test_decomposed_programs(forward, way, training):
    "A program without writes keeps what it gives back for buffers and inputs; norms follow the mode."
    theirs = network(forward, conv=conv(), norm=torch.nn.BatchNorm2d(4), head=torch.nn.Linear(4, 3),
                     alone=torch.nn.BatchNorm2d(3, track_running_stats=False))
    theirs.register_buffer("calls", torch.ones((), dtype=torch.int64))
    theirs.register_buffer("seen", torch.ones(()).double())
    exported = torch.export.export(theirs.train(training), (x(2, 3, 6, 6),))
    before = str(exported)
    decomposed = exported.run_decompositions(*([{}] if way == "functional" else []))
    ours = flashconv.convert_model(decomposed)
    for seed in range(2): assert max(compared(theirs, ours, (x(2, 3, 6, 6, seed=seed),), {})) < BOUND
    if training: assert max(compared(theirs.eval(), ours.eval(), (x(2, 3, 6, 6),), {})) < BOUND
    assert str(exported) == before
    assert torch.equal(flashconv.to_torch_state(ours)["norm.num_batches_tracked"], theirs.norm.num_batches_tracked)


def test_decomposed_programs_that_write_to_their_input():
    theirs = network(lambda self, v: self.conv(v.mul_(2)) + v, conv=conv())
    v = x(2, 3, 6, 6)
    theirs.conv = conv(3, 3).double()
    ours = flashconv.convert_model(torch.export.export(theirs, (v.clone(),)).run_decompositions())
    mine, right = arrays(v.clone()), theirs(v)
    assert np.allclose(ours(mine), right.detach(), atol=BOUND) and np.allclose(mine, v)


def test_decomposed_programs_that_exchange_buffers():
    def forward(self, v):
        before = self.a.clone()
        self.a.copy_(self.b)
        self.b.copy_(before)
        return v * self.a + self.b
    theirs = network(forward)
    theirs.register_buffer("a", x(3))
    theirs.register_buffer("b", x(3, seed=1))
    ours = flashconv.convert_model(torch.export.export(theirs, (x(2, 3),)).run_decompositions())
    for _ in range(3): assert np.allclose(ours(arrays(x(2, 3))), theirs(x(2, 3)), atol=BOUND)
    for name, value in theirs.state_dict().items(): assert torch.equal(flashconv.to_torch_state(ours)[name], value)


def test_own_operations_of_decomposed_programs():
    "A function of the user's for a small operation is called, and what it is part of stays in pieces."
    theirs, v, calls = network(lambda self, v: self.head(self.conv(v)), conv=conv(), head=torch.nn.Linear(6, 2)), x(1, 3, 6, 6), []
    def own(bias, a, b):
        calls.append(a.shape)
        return bias + a @ b
    exported = torch.export.export(theirs, (v,)).run_decompositions()
    ours = flashconv.convert_model(exported, operations={"addmm": own})
    assert np.allclose(ours(arrays(v)), theirs(v).detach(), atol=BOUND) and calls
    assert "linear" not in ours.program and "conv2d" in ours.program


def test_files(tmp_path, capfd):
    "Those that are cut, of another version or something else are refused in one sentence."
    theirs, v = network(lambda self, v: self.conv(v), conv=conv()).eval(), x(2, 3, 6, 6)
    torch.export.save(torch.export.export(theirs, (v,)), tmp_path / "net.pt2")
    whole = (tmp_path / "net.pt2").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt2").write_bytes(b"")
    torch.save(theirs.state_dict(), tmp_path / "state.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(tmp_path / "later.pt2", "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item).replace(b'"major": 8', b'"major": 99'))
    for name, words in (("cut", "zip archive"), ("empty", "zip archive"), ("state", "archive_format"),
                        ("later", "major=99")):
        with pytest.raises(RuntimeError, match="no exported program of this PyTorch") as refused:
            flashconv.convert_model(tmp_path / f"{name}.pt2")
        assert words in str(refused.value) and "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


# Refusals ------------------------------------------------------------------------------------------------


def test_refusals():
    "All that has no equal is listed, with the user's line and the way on."
    def forward(self, v):
        y = torch.linalg.svdvals(self.conv(v).mean((0, 1)))
        return torch.special.i0(y)
    theirs = network(forward, conv=conv())
    with pytest.raises(ValueError) as refused: flashconv.convert_model(theirs, (x(2, 3, 4, 4),))
    text = str(refused.value)
    assert text.startswith("2 of the network's operations")
    assert "linalg_svdvals" in text and "test_programs.py" in text and "operations={...}" in text
    assert "torch.special.i0(y)" in text
    report = flashconv.conversion_report(theirs, (x(2, 3, 4, 4),))
    assert len(report.problems) == 2 and "special_i0" in str(report)


def not_cast(self, v):
    with torch.autocast("cpu", torch.bfloat16, enabled=False): y = self.conv(v)
    with torch.autocast("cuda", torch.bfloat16): return self.conv(y[:, :3]) + y


def attend(v): return F.scaled_dot_product_attention(v, v, v, v.new_zeros(4, 4))


AUTOCAST = {
    "conv1d": lambda v: F.conv1d(v[..., 0], v[:, :, 0, :3]), "conv2d": lambda v: F.conv2d(v, v[..., :2, :2], v[0, :, 0, 0]),
    "conv3d": lambda v: F.conv3d(v[None], v[:, :, None, :2, :2]), "same": lambda v: F.conv2d(v, v[..., :2, :2], padding="same"),
    "conv_transpose1d": lambda v: F.conv_transpose1d(v[..., 0], v[:, :, 0, :3]),
    "conv_transpose2d": lambda v: F.conv_transpose2d(v, v[..., :2, :2]),
    "conv_transpose3d": lambda v: F.conv_transpose3d(v[None], v[:, :, None, :2, :2]),
    "linear": lambda v: F.linear(v, v[0, 0], v[0, 0, 0]), "matmul": lambda v: v @ v.mT, "mm": lambda v: torch.mm(v[0, 0], v[1, 1]),
    "bmm": lambda v: torch.bmm(v[0], v[1]), "addmm": lambda v: torch.addmm(v[0, 0], v[0, 1], v[1, 0]),
    "addbmm": lambda v: torch.addbmm(v[0, 0], v[0], v[1]), "baddbmm": lambda v: torch.baddbmm(v[0], v[1], v[2]),
    "einsum": lambda v: torch.einsum("abij,abjk->abk", v, v), "prelu": lambda v: F.prelu(v, v[0, :1, 0, 0]),
    "attention": attend,
    "prod": lambda v: v.prod(1), "cdist": lambda v: torch.cdist(v[0], v[1]), "max_pool3d": lambda v: F.max_pool3d(v, 2),
    "avg_pool3d": lambda v: F.avg_pool3d(v, 2), "adaptive_avg_pool3d": lambda v: F.adaptive_avg_pool3d(v, 2),
    "grid_sample": lambda v: F.grid_sample(v, v[..., :2], align_corners=True), "pad": lambda v: F.pad(v, (1, 1, 1, 1)),
    "reflect": lambda v: F.pad(v, (1, 1, 1, 1), "reflect"), "replicate": lambda v: F.pad(v, (1, 1, 1, 1), "replicate"),
    "circular": lambda v: F.pad(v, (1, 1, 1, 1), "circular"), "mse_loss": lambda v: F.mse_loss(v, v * 2),
    "l1_loss": lambda v: F.l1_loss(v, v * 2), "smooth_l1_loss": lambda v: F.smooth_l1_loss(v, v * 2),
    "huber_loss": lambda v: F.huber_loss(v, v * 2), "fft": lambda v: torch.fft.rfft2(v).real, "fft1": lambda v: torch.fft.fft(v).imag,
    "stft": lambda v: torch.stft(v.reshape(4, 64), 8, return_complex=True).real, "softmax": lambda v: v.softmax(1),
    "layer_norm": lambda v: F.layer_norm(v, (4,), v[0, 0, 0]), "batch_norm": lambda v: F.batch_norm(v, None, None, training=True),
    "cat": lambda v: torch.cat([v, v.float()]), "sum": lambda v: v.sum(1), "gelu": F.gelu, "interpolate": lambda v: F.interpolate(v, scale_factor=2, mode="bilinear"),
    "group_norm": lambda v: F.group_norm(v, 2), "norm": lambda v: v.norm(dim=1), "cosine": lambda v: F.cosine_similarity(v, v * v),
    "nll_loss": lambda v: F.nll_loss(v, torch.ones(4, 4, 4, dtype=torch.int64)), "kl_div": lambda v: F.kl_div(v, v.softmax(1), reduction="sum"),
    "cross_entropy": lambda v: F.cross_entropy(v.float(), torch.ones(4, 4, 4, dtype=torch.int64)), "trace": lambda v: v[0, 0].trace(),
    "conv_tbc": lambda v: torch.conv_tbc(v[0], v[1], v[0, 0, 0]), "tensordot": lambda v: torch.tensordot(v, v, 2), "inner": lambda v: torch.inner(v[0], v[1]),
    "multi_dot": lambda v: torch.linalg.multi_dot([v[0, 0], v[0, 1], v[1, 0]]), "vecdot": lambda v: torch.linalg.vecdot(v, v),
    "max_pool2d": lambda v: F.max_pool2d(v, 2), "avg_pool2d": lambda v: F.avg_pool2d(v, 2),
    "nested": lambda v: (lambda y: torch.autocast("cpu", enabled=False)(lambda a: a.float() @ v.float())(y) + y)(v @ v),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name, dtype):
    "Each operation in a region of autocast, of tensors in three dtypes: the dtype is PyTorch's, and so are the values."
    def forward(self, v):
        with torch.autocast("cpu", torch.bfloat16): return AUTOCAST[name](v)
    theirs, v = network(forward), x(4, 4, 4, 4).to(dtype)
    if dtype == torch.float64 and "ft" in name: return  # which MLX has in float32 only
    try: right = theirs(v)
    except RuntimeError: return  # not in bfloat16 in PyTorch
    y = flashconv.convert_model(theirs, (v,))(arrays(v))
    assert str(y.dtype).rpartition(".")[2] == str(right.dtype).rpartition(".")[2]
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-6}[right.dtype]
    right = right.double().numpy()
    assert np.abs(np.array(y.astype(mx.float32), np.float64) - right).max() <= bound * np.abs(right).max()


@pytest.mark.parametrize("call", (
    lambda self, v: F.bilinear(v[:, 0], v[:, 1], v), lambda self, v: F.affine_grid(v[:, :2, :3], (4, 1, 3, 4)), lambda self, v: self.lstm(v)[0]))
def test_what_autocast_does_inside(call):
    "What PyTorch makes of several operations, some of them in half precision, is refused."
    def forward(self, v):
        with torch.autocast("cpu", torch.bfloat16): return call(self, v)
    with pytest.raises(ValueError, match="autocast computes parts of it"):
        flashconv.convert_model(network(forward, lstm=torch.nn.LSTM(4, 4)).float(), (x(4, 4, 4).float(),))


def test_training_under_autocast():
    "Parameters stay float32, their gradients too."
    def forward(self, v):
        with torch.autocast("cpu", torch.bfloat16): y = self.norm(self.conv(v)).relu()
        return self.head(y.float().mean((2, 3)))
    theirs = network(forward, conv=conv(), norm=torch.nn.BatchNorm2d(4), head=torch.nn.Linear(4, 2)).float()
    v = x(3, 3, 6, 6).float()
    ours = flashconv.convert_model(theirs, (v,))
    assert max(compared(theirs, ours, (v,), {})) < 2**-6
    same_source(theirs, (v,))


def overlapping(self, v):
    y = self.conv(v)
    return y.as_strided((2, 4, 3, 2, 2), (64, 16, 4, 4, 1)), y.as_strided((5,), (3,), 2).sum()


def written_through_steps(self, v):
    y = self.conv(v) * 1
    y.as_strided((5,), (3,)).zero_()
    return y


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("forward", (not_cast, overlapping), ids=lambda f: f.__name__)
def test_regions_and_steps(forward): equal(network(forward, conv=conv()), (x(2, 3, 4, 4),))


@pytest.mark.parametrize("forward, words", (
    (written_through_steps, "clone"),
    (lambda self, v: self.conv(v).mT.as_strided((5,), (3,)), "in another order"),
    (lambda self, v: self.conv(v)[:, 1:].as_strided((5,), (3,)), "more than this tensor"),
    (lambda self, v: self.conv(v).masked_select(v[:, :1] > 0), "depends on the data"),
    (lambda self, v: (self.conv(v) > 0).nonzero() + 1, "depends on the data"),
    (lambda self, v: self.conv(v).round().unique()[:2], "depends on the data")), ids=range(6))
def test_what_is_refused(forward, words):
    "One sentence each: what follows from it is no second one."
    with pytest.raises(ValueError) as refused:
        flashconv.convert_model(network(forward, conv=conv()), (x(2, 3, 4, 4),))
    text = str(refused.value)
    assert words in text and text.startswith("1 of the network's operations")


def test_own_operations():
    "An operation of the user's stands for one that has no equal, or instead of ours."
    theirs = network(lambda self, v: torch.special.i0(self.conv(v)).relu(), conv=conv())
    series = lambda v: sum((v / 2) ** (2 * k) / np.prod(np.arange(1, k + 1.0)) ** 2 for k in range(20))
    ours = flashconv.convert_model(theirs, (x(2, 3, 4, 4),), operations={"special_i0": series})
    v = x(2, 3, 4, 4, seed=3)
    assert np.allclose(ours(arrays(v)), theirs(v).detach(), atol=1e-6)
    with pytest.raises(TypeError, match="operations"):
        flashconv.convert_model(theirs, (v,), operations=[series])


class Odd(torch.nn.Module):
    "A part that no exporter can follow."

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, v, power=2):
        return self.conv(v) ** (power if float(v.sum()) > -1e9 else 3)


class OurOdd(nn.Module):
    def __call__(self, v, power=2): return self.conv(v) ** power


def test_own_modules():
    "A module of the user's stands for a submodule, with its tensors."
    theirs = network(lambda self, v: self.tail(self.odd(v, power=3)), odd=Odd(), tail=conv(4, 2)).eval()
    v = x(2, 3, 4, 4)
    ours = flashconv.convert_model(theirs, (v,), modules={Odd: OurOdd})
    errors = compared(theirs, ours, (v,), {})
    assert max(errors) < BOUND
    assert isinstance(ours.odd, OurOdd) and "forward" not in vars(theirs.odd)


def branch():
    def forward(self, v): return self.conv(v) if v.sum() > 0 else v
    return forward


def item():
    def forward(self, v): return self.conv(v) * v.max().item()
    return forward


def selection():
    def forward(self, v): return self.conv(v)[v[:, :1].expand(-1, 4, -1, -1) > 0]
    return forward


def own_gradient():
    def forward(self, v): return self.conv(Doubled.apply(v))
    return forward


def to_numpy():
    def forward(self, v): return self.conv(v.numpy())
    return forward


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v): return v * 2
    @staticmethod
    def backward(ctx, g): return g * 3


@pytest.mark.parametrize("make, words", (
    (branch, "test_programs"), (item, "test_programs"), (own_gradient, "autograd.Function"),
    (selection, "test_programs"), (to_numpy, "test_programs")), ids=lambda value: getattr(
        value, "__name__", ""))
def test_what_the_exporter_refuses(make, words):
    "The reason is a sentence, with the line; nothing is half done."
    theirs = network(make(), conv=conv())
    with pytest.raises(ValueError, match=words): flashconv.convert_model(theirs, (x(2, 3, 4, 4),))
    assert theirs.training and isinstance(theirs.conv.weight, torch.nn.Parameter)


def test_one_mode():
    "Where only one mode can be exported, the other one says why it can't be run."
    def forward(self, v):
        if self.training and v.sum() > 0: v = v * 2
        return self.conv(v)
    theirs, v = network(forward, conv=conv()).eval(), x(2, 3, 4, 4)
    ours = flashconv.convert_model(theirs, (v,))
    assert np.allclose(ours(arrays(v)), theirs(v).detach(), atol=1e-9)
    with pytest.raises(ValueError, match="could not export the network in training mode"):
        ours.train()(arrays(v))


def test_bad_examples():
    "What is no example, or lies elsewhere, is refused before anything is exported."
    theirs = network(classifier, conv=conv(), norm=torch.nn.BatchNorm2d(4), head=torch.nn.Linear(4, 3))
    with pytest.raises(TypeError, match="tuple"): flashconv.convert_model(theirs, x(2, 3, 4, 4))
    with pytest.raises(TypeError, match="kwargs"): flashconv.convert_model(theirs, (), [1])
    with pytest.raises(TypeError, match="mx.array"): flashconv.convert_model(theirs, (mx.zeros(3),))
    with pytest.raises(TypeError, match="needs args"): flashconv.convert_model(theirs, kwargs={})
    with pytest.raises(TypeError, match="torch.nn.Module"): flashconv.convert_model(nn.ReLU(), (x(1),))
    with pytest.raises(ValueError, match="channels_last"):
        flashconv.convert_model(theirs, (x(2, 3, 4, 4),), data_format="channels_last")
    with pytest.raises(ValueError, match="meta"):
        flashconv.convert_model(theirs, (torch.empty(2, 3, 4, 4, device="meta"),))
    for wrong in ((x(2, 5, 4, 4),), (x(2, 3, 4, 4).float(),), (x(2, 3, 4, 4), 1), (), (x(2, 3, 4, 4).numpy(),)):
        with pytest.raises(ValueError, match="does not run on this example in PyTorch"):
            flashconv.convert_model(theirs, wrong)
    with pytest.raises(ValueError, match="meta, where nothing has values"):
        flashconv.convert_model(copy.deepcopy(theirs).to("meta"), (x(2, 3, 4, 4).to("meta"),))
    lazy = torch.nn.Sequential(torch.nn.LazyConv2d(3, 3))
    with pytest.raises(ValueError, match="lazy"): flashconv.convert_model(lazy, (x(1, 3, 4, 4),))


def test_report():
    "Operations with their numbers, what became of them, parameters and multiplications."
    theirs = network(classifier, conv=conv(), norm=torch.nn.BatchNorm2d(4), head=torch.nn.Linear(4, 3))
    report = flashconv.conversion_report(theirs, (x(2, 3, 4, 4),))
    rows = {row.operation: row for row in report}
    assert rows["aten::conv2d"].macs == 2 * 4 * 16 * 27 and "functional.conv2d" in rows["aten::conv2d"].became
    assert rows["aten::linear"].macs == 2 * 3 * 4
    assert report.parameters == sum(p.numel() for p in theirs.parameters())
    assert "multiplications" in str(report)


# Source -----------------------------------------------------------------------------------------------


def same_source(theirs, args, kwargs=None):
    "The text of a network, which computes the same to the last bit in both modes."
    ours = flashconv.convert_model(theirs, args, kwargs or {})
    text, space = flashconv.source(ours), {}
    exec(text, space)
    again = space["network"]()
    flashconv.load_torch_state(again, theirs.state_dict())
    for training in (False, True):
        outputs = [flat(m.train(training)(*arrays(args), **arrays(kwargs or {}))) for m in (ours, again)]
        assert len(outputs[0]) == len(outputs[1]) > 0
        for a, b in zip(*outputs): assert np.array_equal(a, b)
    states = [flashconv.to_torch_state(m) for m in (ours, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return text


def test_source():
    "Repeated blocks are one class, and a module that is called twice has one too."
    def block():
        return network(lambda self, v: F.relu(self.norm(self.conv(v))) + v, conv=conv(4, 4),
                       norm=torch.nn.BatchNorm2d(4))
    theirs = network(lambda self, v: self.shared(self.shared(self.body(self.stem(v)))) * self.scale,
                     stem=conv(), body=torch.nn.Sequential(*(block() for _ in range(3))), shared=block())
    theirs.register_buffer("scale", torch.tensor([0.3]).double(), persistent=False)
    text = same_source(theirs, (x(2, 3, 4, 4),))
    assert text.count("class BatchNorm2d") <= 3 and text.count("class Conv2d") == 1


@pytest.mark.parametrize("forward", (write_slice, write_view_then_read, write_mask, write_detached),
                         ids=lambda f: f.__name__)
def test_source_of_writes(forward): same_source(network(forward, conv=conv()), (x(2, 3, 6, 6),))


def test_source_of_two_programs():
    "A network that does something else in training has two functions."
    def forward(self, v): return self.conv(v) * 2 if self.training else self.conv(v).relu()
    text = same_source(network(forward, conv=conv()), (x(2, 3, 4, 4),))
    assert "in_training" in text


def test_source_of_other_results_in_training():
    "As networks with auxiliary heads have them."
    def forward(self, v):
        y = self.conv(v)
        return {"y": y, "more": [y.mean(), y.amax((2, 3))]} if self.training else y
    text = same_source(network(forward, conv=conv()), (x(2, 3, 4, 4),))
    assert "return y[0]" in text and "'more': [y[1], y[2]]" in text


def test_source_of_no_network():
    with pytest.raises(TypeError, match="convert_model"): flashconv.source(nn.ReLU())


# Networks of libraries -------------------------------------------------------------------------------


GATE = {"resnet": "transformers", "convnext": "transformers", "mobilenet-v2": "transformers",
        "segformer": "transformers", "swin": "transformers", "hifigan": "transformers",
        "unet2d": "diffusers", "vae": "diffusers", "controlnet": "diffusers", "monai-unet": "monai",
        "dynunet": "monai", "attention-unet": "monai"}


@pytest.mark.parametrize("name", GATE)
def test_zoo(name):
    "A dozen networks, in both modes and for three steps of training; `make zoo` tries the others."
    pytest.importorskip(GATE[name], exc_type=ImportError)
    results = zoo.tried(name)
    assert not any(isinstance(result, str) for result in results), results
    assert all(result[-1] < 1 for result in results), results
