"""What PyTorch's state holds, a converted model's holds, under the same names, and nothing else.

Trees of modules are drawn with all that a module can hold: tensors that are saved and others,
frozen, tied, absent; lists and dicts of them; attributes; names that dict and MLX use; layers in
two places; activations that change their input. PyTorch is the judge. A conversion is refused for
what `obstacles` finds, by its name, and for nothing else.
"""
import copy
import pickle
from collections import Counter, OrderedDict

import flashconv
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from flashconv.convert.layers import _to_tensor
from flashconv.convert.models import ChannelsFirst, InPlace
from mlx.utils import tree_flatten, tree_map

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")
pytest.importorskip("hypothesis", reason="it draws the modules")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T = torch.nn
LISTS = (T.ModuleList, T.ModuleDict, T.ParameterList, T.ParameterDict)
DTYPES = ("float32", "float16", "bfloat16", "int64", "bool", "uint8")
NAMES = ("gain", "mask", "i", "f", "größe", "type", "unnamed", "7", "np", "offset")
TAKEN = ("keys", "values", "get", "pop", "update", "copy", "state")  # by dict and mlx.nn.Module
CHANNELS, LENGTH = 2, 5


class Holder(T.Module):
    "Each of its layers, added to what the layer got. One in place changes both."
    def forward(self, x):
        for name in self.order: x = getattr(self, name)(x) + x
        return x


class OurHolder(nn.Module):
    def __call__(self, x):
        for name in self.order: x = getattr(self, name)(x) + x
        return x


class Masked(T.Conv1d):
    "A subclass with a forward of its own, for which a subclass of ours stands."
    def __init__(self):
        super().__init__(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular")
        self.register_buffer("hole", torch.tensor([1.0, 0, 1]))

    def forward(self, x): return self._conv_forward(x, self.weight * self.hole, self.bias)


class OurMasked(flashconv.Conv1d):
    def __call__(self, x): return self._conv_forward(x, self.weight * self.hole, self.bias)


class Doubled(T.Linear):
    def forward(self, x): return 2 * super().forward(x)


class OurDoubled(nn.Linear):
    def __call__(self, x): return 2 * super().__call__(x)


class Around(T.Sequential):
    def forward(self, x): return super().forward(x) + x


class OurAround(nn.Sequential):
    def __call__(self, x): return super().__call__(x) + x


CLASSES = {Holder: OurHolder, Masked: OurMasked, Doubled: OurDoubled, Around: OurAround}


class Conv(T.Conv1d): pass
class Norm(T.BatchNorm1d): pass
class Stack(T.Sequential): pass


LAYERS = (lambda: T.Conv1d(CHANNELS, CHANNELS, 3, padding=1), lambda: Conv(2, 2, 1, bias=False),
          lambda: T.ConvTranspose1d(2, 2, 3, padding=1, groups=2), lambda: T.BatchNorm1d(2),
          lambda: Norm(2, affine=False), lambda: T.BatchNorm1d(2, track_running_stats=False),
          lambda: T.GroupNorm(1, 2), lambda: T.InstanceNorm1d(2), lambda: T.PReLU(2), T.Identity,
          T.Tanh, lambda: T.Linear(LENGTH, LENGTH), Masked, lambda: Doubled(LENGTH, LENGTH), lambda: T.Dropout(0.0, inplace=True),
          lambda: T.ReLU(inplace=True), lambda: T.ELU(inplace=True), lambda: T.SiLU(inplace=True))


class Tree:
    "Draws a module."
    def __init__(self, draw): self.draw, self.parameters, self.modules = draw, [], []

    def one_in(self, n): return self.draw(st.integers(1, n)) == n

    def any_of(self, values): return self.draw(st.sampled_from(values))

    def tensor(self, dtypes=DTYPES):
        shape = self.draw(st.lists(st.integers(0, 3), max_size=2))
        return (10 * torch.rand(shape)).to(getattr(torch, self.any_of(dtypes)))

    def parameter(self):
        if self.parameters and self.one_in(8): return self.any_of(self.parameters)
        made = T.Parameter(self.tensor(DTYPES[:3]), requires_grad=self.draw(st.booleans()))
        self.parameters.append(made)
        return made

    def value(self, depth=0):
        "What an attribute may be."
        kind = self.draw(st.integers(0, 2 if depth == 2 else 5))
        if kind == 0: return self.any_of((None, True, -1, 2.5, "text", 1j, torch.relu))
        if kind == 1: return self.tensor()
        if kind == 2: return self.any_of((np.float32(1), torch.Size([2, 3]), "-1"))
        items = [self.value(depth + 1) for _ in range(self.draw(st.integers(0, 2)))]
        return (items, tuple(items), dict(enumerate(items)))[kind - 3]

    def adorn(self, module):
        "Add tensors and attributes to a module."
        for _ in range(self.draw(st.integers(0, 2))):
            name = self.any_of(TAKEN) if self.one_in(40) else self.any_of(NAMES)
            if self.one_in(40): name = "_" + name
            if hasattr(module, name): continue
            kind = self.draw(st.integers(0, 4))
            if kind == 0: module.register_parameter(name, self.parameter())
            elif kind == 1: module.register_parameter(name, None)
            elif kind == 2: module.register_buffer(name, self.tensor())
            elif kind == 3: module.register_buffer(name, self.tensor(), persistent=False)
            else: setattr(module, name, self.value())

    def module(self, depth=1):
        if self.modules and self.one_in(8): return self.any_of(self.modules)
        kind = self.draw(st.integers(0, 5)) if depth else 0
        layers = [self.module(depth - 1) for _ in range(self.draw(st.integers(0, 3)))] if kind else ()
        if kind < 3 and not layers: made = self.any_of(LAYERS)()
        elif kind < 4: made = self.any_of((T.Sequential, Stack, Around))(*layers)
        elif kind == 4: made = T.Sequential(OrderedDict(zip(("keys", "layers", "a"), layers)))
        else: made = self.holder(layers)
        for p in made.parameters(recurse=False): p.requires_grad_(self.draw(st.booleans()))
        self.adorn(made)
        self.modules.append(made)
        return made

    def holder(self, layers):
        made = Holder()
        made.order = [f"block{i}" for i in range(len(layers))]
        for name, layer in zip(made.order, layers): setattr(made, name, layer)
        if self.one_in(4): made.scales = T.ParameterList([self.parameter(), self.parameter()])
        if self.one_in(4): made.named = T.ParameterDict({"one": self.parameter()})
        if self.one_in(4): made.unused = T.ModuleList([T.Linear(1, 1), T.ModuleList()])
        if self.one_in(4): made.table = T.ModuleDict({"copy": T.Linear(1, 1)})
        if self.one_in(4): made.again = [*layers, {"of": (T.Linear(1, 1),)}]
        if self.one_in(6): made.register_module("nothing", None)
        return made


@st.composite
def trees(draw):
    tree = Tree(draw)
    torch.manual_seed(draw(st.integers(0, 99)))
    return tree.holder([tree.module() for _ in range(draw(st.integers(1, 3)))])


def obstacles(theirs):
    "Words that a refusal must contain; none where there is no reason for one."
    modules = list(theirs.modules())
    owners = Counter(id(p) for module in modules for p in module._parameters.values()
                     if p is not None)
    words = ["tied"] if max(owners.values(), default=1) > 1 else []
    for module in modules:
        if isinstance(module, T.ParameterList) and len({p.requires_grad for p in module}) > 1:
            words.append("scales")  # MLX freezes all of a list or nothing
        if isinstance(module, LISTS): continue
        names = {*vars(module), *module._parameters, *module._buffers}
        words += [name for name in names if name in TAKEN]
        saved = {*module._parameters, *module._buffers} - module._non_persistent_buffers_set
        words += [name for name in saved if name.startswith("_") and getattr(module, name) is not None]
    return words


def equal(value, other):
    "Whether two attributes are the same, tensors and arrays among them, to the last bit."
    if isinstance(other, mx.array): other = _to_tensor(other, torch)
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(equal, value, other))
    if isinstance(value, dict):
        return list(value) == list(other) and all(equal(value[key], other[key]) for key in value)
    return value is other or value == other


def paths(parameters, model):
    "PyTorch's names of what `parameters()` and the like return, found by going down the model."
    for name, _ in tree_flatten(parameters):
        parts, holder = [], model
        for part in name.split("."):
            hidden = {nn.Sequential: "layers", ChannelsFirst: "layer", InPlace: "layer"}
            if next((hidden[cls] for cls in hidden if isinstance(holder, cls)), None) != part: parts.append(part)
            holder = holder[int(part) if isinstance(holder, list) else part]
        yield ".".join(parts)


def check_state(theirs, ours):
    "The same names in the same order, shapes, dtypes and values; each is reached."
    state = theirs.state_dict()
    mine = flashconv.to_torch_state(ours)
    assert list(mine) == list(state) and equal(dict(state), mine)
    assert flashconv.load_torch_state(ours, state) == ([], [])
    assert equal(dict(state), flashconv.to_torch_state(ours))
    assert sorted(paths(ours.parameters(), ours)) == sorted(state)


def check_training(theirs, ours):
    "What an optimizer moves in PyTorch it moves here, in copies too; buffers stay put when thawed."
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    trainable = sorted(name for name, p in parameters.items() if p.requires_grad)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert sorted(paths(model.trainable_parameters(), model)) == trainable
    optimizer = mlx.optimizers.SGD(1.0)
    optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    for name, value in flashconv.to_torch_state(model).items():
        if name not in trainable: assert equal(value, theirs.state_dict()[name]), name
        elif value.numel(): assert not equal(value, theirs.state_dict()[name]), name
    model.unfreeze()
    assert sorted(paths(model.trainable_parameters(), model)) == sorted(parameters)


def check_attributes(theirs, ours):
    "What hangs on a module hangs on what it became."
    given = {**vars(theirs), **theirs._parameters, **theirs._buffers}
    for name, value in given.items():
        if name in NAMES: assert equal(value, getattr(ours, name)), name
    inner = ours.layer if type(ours) in (ChannelsFirst, InPlace) else ours
    for name, child in theirs.named_children():
        if isinstance(child, LISTS): continue
        check_attributes(child, inner.layers[int(name)] if isinstance(inner, nn.Sequential) else inner[name])


def check_call(theirs, ours):
    "The same output, and the same done to the input."
    x = np.random.default_rng(0).standard_normal((1, CHANNELS, LENGTH)).astype(np.float32)
    theirs.eval(), ours.eval()
    for p in theirs.parameters():
        if p.dtype != torch.float32: return
    t, a = torch.from_numpy(x.copy()), mx.array(x)
    with torch.no_grad(): right = theirs(t)
    y = ours(a)
    scale = right.abs().max().item()
    np.testing.assert_allclose(np.array(y), right.numpy(), 1e-3, 1e-5 * (1 + scale))
    np.testing.assert_allclose(np.array(a), t.numpy(), 1e-3, 1e-5 * (1 + scale))


@settings(max_examples=120, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(trees(), st.booleans())
def test_the_rule(theirs, training):
    theirs.train(training)
    before, words = copy.deepcopy(theirs.state_dict()), obstacles(theirs)
    try: ours = flashconv.convert_model(theirs, modules=CLASSES)
    except ValueError as error:
        assert words and all(word in str(error) for word in words), error
        return
    assert not words
    assert equal(dict(before), dict(theirs.state_dict()))
    check_state(theirs, ours)
    check_training(theirs, ours)
    check_attributes(theirs, ours)
    check_call(theirs, ours)
