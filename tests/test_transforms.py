"""What MLX does to functions and models: second derivatives, vmap, compile, training, laziness."""
from contextlib import nullcontext
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import oracle
import pytest
import torch
from judge import looped, our_gradient, their_gradient

import flashconv as fc
import flashconv.functional as F
from flashconv.algorithms import choice, derivatives

NAMES = [f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)]
SIZES = {1: (6,), 2: (6, 5), 3: (6, 5, 5)}
MANY = {1: (700,), 2: (28, 27), 3: (9, 10, 9)}  # places: sums of another length take other ways
OPTIONS = {
    "plain": {},
    "many places": {},
    "strided": {"stride": 2, "padding": 1, "dilation": 2},
    "grouped": {"groups": 2, "padding": (1, 0, 2)},
    "all": {"stride": (2, 1, 1), "padding": (1, 2, 0), "dilation": (1, 2, 1), "groups": 2},
}


def build(name, options, dtype=mx.float32, data_format="channels_first"):
    "Input, weight, bias, and our and PyTorch's function of them."
    n = int(name[-2])
    kw = {k: v[:n] if isinstance(v, tuple) else v for k, v in OPTIONS[options].items()}
    g, rng = kw.get("groups", 1), np.random.default_rng(0)
    places = (MANY if options == "many places" else SIZES)[n]
    shapes = (2, 4, *places), (4, 4 // g, *(3, 2, 2)[:n]), (4,)
    def theirs(*a): return getattr(torch.nn.functional, name)(*a, **kw)
    def ours(x, *rest):
        if data_format == "channels_first": return getattr(F, name)(x, *rest, **kw)
        y = getattr(F, name)(mx.moveaxis(x, 1, -1), *rest, data_format=data_format, **kw)
        return mx.moveaxis(y, -1, 1)
    return [oracle.draw(rng, s, dtype) for s in shapes], ours, theirs


@pytest.fixture(params=("chosen", "native"))
def algorithm(request, monkeypatch):
    "The algorithms chosen here, and then the one with rules of its own, which GPUs are given."
    def choose(g, shape, dtype, force=False):
        if dtype == mx.float32: return "native", "as on GPUs"
        return choice.choose(g, shape, dtype, force)
    if request.param == "native": monkeypatch.setattr(derivatives, "choose", choose)


# Derivatives ---------------------------------------------------------------------------------

@pytest.mark.parametrize("of", (0, 1, 2), ids=("input", "weight", "bias"))
@pytest.mark.parametrize("dtype", (mx.float32, mx.complex64), ids=str)
@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name, options, data_format, dtype, of, algorithm):
    "The gradients of each gradient, by everything that it depends on: PyTorch's double backward."
    arrays, ours, theirs = build(name, options, dtype, data_format)
    y = ours(*arrays)
    c = oracle.draw(np.random.default_rng(1), y.shape, dtype)
    oracle.check(our_gradient(lambda *a: ours(*a), of), their_gradient(theirs, of), [*arrays, c])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_a_penalty(name):
    "`mx.grad` of a loss with a gradient in it: the squared norm of the input's gradient."
    arrays, ours, theirs = build(name, "all")

    def penalty(x, w, b): return mx.square(mx.grad(lambda x: (ours(x, w, b) ** 2).sum())(x)).sum()
    mine = mx.grad(penalty, argnums=(0, 1, 2))(*arrays)
    leaves = [oracle.to_torch(a).requires_grad_() for a in arrays]
    first, = torch.autograd.grad((theirs(*leaves) ** 2).sum(), leaves[0], create_graph=True)
    (first ** 2).sum().backward()
    for m, leaf in zip(mine, leaves):
        scale = leaf.grad.abs().max()
        assert ((oracle.to_torch(m) - leaf.grad).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_asked_for(name):
    "Each argument alone gives what all together give in PyTorch."
    arrays, ours, theirs = build(name, "all")
    leaves = [oracle.to_torch(a).requires_grad_() for a in arrays]
    theirs(*leaves).sum().backward()
    bounds = [oracle.to_torch(a).abs().requires_grad_() for a in arrays]
    theirs(*bounds).sum().backward()
    for i, leaf in enumerate(leaves):
        mine = mx.grad(lambda *a: ours(*a).sum(), argnums=i)(*arrays)
        oracle.assert_within_rounding(mine, leaf.grad, bounds[i].grad, mx.float32, str(i))


def test_forward_mode_over_a_gradient_without_a_batch():
    "MLX has no jvp of an index's gradient, so the batch of one that is made is not indexed away."
    x, w, c = mx.array([[1.0, 2, 3]]), mx.array([[[4.0, 5]]]), mx.array([[6.0, 7]])
    def gradient(x, w): return mx.vjp(F.conv1d, [x, w], [c])[1][1]
    with fc.algorithm("taps"):
        (_,), (change,) = mx.jvp(gradient, [x, w], [mx.array([[1.0, 0, 2]]), mx.zeros_like(w)])
    assert change.tolist() == [[[6 * 1 + 7 * 0, 6 * 0 + 7 * 2]]]


@pytest.mark.parametrize("name", (None, "native", "matmul", "taps", "fft"), ids=str)
def test_gradients_where_all_of_the_input_is_cut_off(name):
    "A stamp at place 0, which the padding cuts off: places 1 and 2 are output_padding."
    x, w, c = mx.ones((1, 1)), mx.ones((1, 1, 1)), mx.ones((1, 1))
    def f(x, w): return F.conv_transpose1d(x, w, stride=3, padding=1, output_padding=2)
    with nullcontext() if name is None else fc.algorithm(name):
        (y,), gradients = mx.vjp(f, [x, w], [c])
        assert y.tolist() == [[0]] and [g.tolist() for g in gradients] == [[[0]], [[[0]]]]


def test_memory_of_the_gradient_of_a_weight_gradient():
    "210 taps ten apart on 16 inputs took 18 GB as stamps of the 210; the output has 17 MB."
    kw = {"stride": 10, "dilation": (2, 1, 1), "padding": 1, "output_padding": (4, 4, 2)}
    x, w = mx.random.normal((3, 9, 7, 5, 6)), mx.random.normal((9, 3, 2, 4, 2))
    def f(x, w): return F.conv_transpose3d(x, w, groups=3, **kw)
    def of_weight(c): return mx.vjp(f, [x, w], [c])[1][1]
    c, toward = mx.random.normal((3, 9, 65, 46, 52)), mx.random.normal(w.shape)
    mx.eval(x, w, c, toward)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    _, (second,) = mx.vjp(of_weight, [c], [toward])
    mx.eval(second)
    assert mx.get_peak_memory() - before < 200 * 2**20
    leaf = oracle.to_torch(x)
    judged = torch.nn.functional.conv_transpose3d(leaf, oracle.to_torch(toward), groups=3, **kw)
    bound = torch.nn.functional.conv_transpose3d(leaf.abs(), oracle.to_torch(toward).abs(),
                                                 groups=3, **kw)
    oracle.assert_within_rounding(second, judged, bound, mx.float32)


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.complex64), ids=str)
def test_a_kernel_larger_than_its_input(dtype, data_format):
    "Where input and kernel change places, in groups and with a vmapped weight or input."
    kw = {"stride": 2, "dilation": (5, 3), "padding": (3, 1), "output_padding": (4, 1), "groups": 2}
    rng = np.random.default_rng(0)
    x, w = (oracle.draw(rng, shape, dtype) for shape in ((2, 4, 3, 2), (4, 3, 4, 3)))
    def ours(x, w):
        if data_format == "channels_first": return F.conv_transpose2d(x, w, **kw)
        y = F.conv_transpose2d(mx.moveaxis(x, 1, -1), w, data_format=data_format, **kw)
        return mx.moveaxis(y, -1, 1)
    def theirs(x, w): return torch.nn.functional.conv_transpose2d(x, w, **kw)
    oracle.check(ours, theirs, [x, w])
    for axes in ((0, None), (None, 1), (2, 0)):
        oracle.check(mx.vmap(ours, in_axes=axes), looped(theirs, axes), many([x, w], axes))


# vmap ----------------------------------------------------------------------------------------

AXES = [(0, None, None), (None, 0, None), (0, 0, None), (0, 0, 0), (None, None, 0), (1, None, None),
        (-1, 2, None), (None, -1, 1), (2, 1, 0)]


def many(arrays, axes, size=3):
    "Each array with an axis is stacked `size` times along it, with other values each time."
    rng = np.random.default_rng(2)
    def several(a): return [oracle.draw(rng, a.shape, a.dtype) for _ in range(size)]
    return [a if axis is None else mx.stack(several(a), axis) for a, axis in zip(arrays, axes)]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_vmap(name, options, axes, algorithm):
    "Over inputs, weights, biases and any of them together, at any axis; and the gradients of it."
    arrays, ours, theirs = build(name, options)
    oracle.check(mx.vmap(ours, in_axes=axes), looped(theirs, axes), many(arrays, axes))


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16, mx.float64, mx.complex64), ids=str)
@pytest.mark.parametrize("axes", ((0, None, None), (None, 0, None), (1, 2, 0)), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_in_other_dtypes_and_formats(name, axes, dtype, data_format):
    "The same in half, double and complex, channels first and last."
    arrays, ours, theirs = build(name, "all", dtype, data_format)
    with oracle.where(dtype): arrays = many(arrays, axes)
    oracle.check(mx.vmap(ours, in_axes=axes), looped(theirs, axes), arrays)


@pytest.mark.parametrize("out", (1, 2, -1))
@pytest.mark.parametrize("name", NAMES)
def test_vmap_out_axes(name, out):
    "The mapped axis wherever it is wanted in the result."
    arrays, ours, theirs = build(name, "all")
    axes = (1, 0, None)
    oracle.check(mx.vmap(ours, in_axes=axes, out_axes=out), looped(theirs, axes, out),
                 many(arrays, axes))


@pytest.mark.parametrize("of", (0, 1, 2), ids=("input", "weight", "bias"))
@pytest.mark.parametrize("axes", ((0, None, None, 0), (None, 0, None, 0), (1, 2, 0, 1),
                                  (None, None, None, 0)), ids=str)
@pytest.mark.parametrize("options", ("strided", "all", "many places"))
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_gradients(name, options, axes, of, algorithm):
    "Per-example gradients: vmap of the vjp, and its gradients in turn."
    arrays, ours, theirs = build(name, options)
    c = oracle.draw(np.random.default_rng(1), ours(*arrays).shape)
    transforms = options == "many places"  # long enough for FFT
    oracle.check(mx.vmap(our_gradient(lambda *a: ours(*a), of), in_axes=axes),
                 looped(their_gradient(theirs, of), axes), many([*arrays, c], axes),
                 assertion=oracle.assert_within_norm if transforms else oracle.assert_within_rounding)


@pytest.mark.parametrize("inner, outer", [
    ((0, None, None), (None, 0, None)), ((None, 0, None), (0, None, None)),
    ((0, 0, None), (0, 0, None)), ((None, 1, 0), (1, 0, None)),
    ((0, None, None), (0, None, None)), ((None, 0, None), (None, 0, None)),
], ids=str)
@pytest.mark.parametrize("options", ("plain", "all"))
@pytest.mark.parametrize("name", NAMES)
def test_nested_vmap(name, options, inner, outer, algorithm):
    "vmap of vmap, every input with every weight and pairwise, with gradients."
    arrays, ours, theirs = build(name, options)
    arrays = many(many(arrays, inner, 2), outer, 3)
    oracle.check(mx.vmap(mx.vmap(ours, in_axes=inner), in_axes=outer),
                 looped(looped(theirs, inner), outer), arrays)


@pytest.mark.parametrize("axis", (0, 1, 2))
@pytest.mark.parametrize("mode", ("constant", "reflect", "replicate", "circular"))
def test_vmap_of_pad(mode, axis):
    "Padding under vmap, with its gradient."
    x = oracle.draw(np.random.default_rng(0), (4, 3, 6, 5))
    oracle.check(mx.vmap(lambda x: F.pad(x, (2, -1), mode), in_axes=axis),
                 looped(lambda x: torch.nn.functional.pad(x, (2, -1), mode), (axis,)), [x])


@pytest.mark.parametrize("name", ("Conv2d", "ConvTranspose2d", "Conv3d"))
def test_vmap_of_a_layer(name):
    "A layer over a stack of batches."
    layer, theirs = (getattr(L, name)(4, 6, 3, 2, 1, groups=2) for L in (fc, torch.nn))
    x = oracle.draw(np.random.default_rng(0), (3, 2, 4, *SIZES[int(name[-2])]))

    def mine(x, weight, bias):
        layer.weight, layer.bias = weight, bias
        return mx.vmap(layer)(x)

    def judge(x, weight, bias):
        state = {"weight": weight, "bias": bias}
        return torch.stack([torch.func.functional_call(theirs, state, (xi,)) for xi in x])
    oracle.check(mine, judge, [x, layer.weight, layer.bias])


# compile, checkpoint, streams ----------------------------------------------------------------

@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_compile(name, options):
    "A compiled function and its compiled gradients."
    arrays, ours, theirs = build(name, options)
    oracle.check(mx.compile(ours), theirs, arrays)
    c = oracle.draw(np.random.default_rng(1), ours(*arrays).shape)
    for i in range(3):
        oracle.check(mx.compile(our_gradient(lambda *a: ours(*a), i)), their_gradient(theirs, i),
                     [*arrays, c])


@pytest.mark.parametrize("name", NAMES)
def test_compile_with_changing_shapes(name):
    "One compiled function for several sizes, batches, channels and dtypes, back and forth."
    n, rng = int(name[-2]), np.random.default_rng(0)
    compiled = mx.compile(lambda x, w: getattr(F, name)(x, w, stride=2, padding=1))
    def theirs(x, w): return getattr(torch.nn.functional, name)(x, w, stride=2, padding=1)
    for size, batch, channels, dtype in [
            (6, 2, 3, mx.float32), (9, 2, 3, mx.float32), (6, 1, 3, mx.float32),
            (6, 2, 5, mx.float32), (6, 2, 3, mx.float16), (6, 2, 3, mx.float32)]:
        shapes = (batch, channels, *(size,) * n), (channels, channels, *(3,) * n)
        oracle.check(compiled, theirs, [oracle.draw(rng, shape, dtype) for shape in shapes])


@pytest.mark.parametrize("wrap", (mx.checkpoint, lambda f: mx.compile(mx.vmap(f)),
                                  lambda f: mx.vmap(mx.compile(f))),
                         ids=("checkpoint", "compile of vmap", "vmap of compile"))
@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_and_mixtures(name, wrap):
    "Checkpointing, and compilation around and inside vmap."
    arrays, ours, theirs = build(name, "all")
    if wrap is mx.checkpoint: oracle.check(wrap(ours), theirs, arrays)
    else: oracle.check(wrap(ours), looped(theirs, (0, 0, 0)), many(arrays, (0, 0, 0)))


@pytest.mark.parametrize("name", NAMES)
def test_streams(name):
    "Work on a stream of its own, with inputs from another one."
    arrays, ours, theirs = build(name, "all")
    arrays = [a + 0 for a in arrays]
    def on_a_new_stream(*a):
        with mx.stream(mx.new_stream(mx.default_device())): return ours(*a)
    oracle.check(on_a_new_stream, theirs, arrays)


# Models --------------------------------------------------------------------------------------

def networks():
    "The same small network in MLX and PyTorch, with the same weights; PyTorch's in float64."
    def layers(L, relu): return [
        L.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), relu(),
        L.Conv2d(8, 8, 3, 2, 1, groups=4), relu(),
        L.Conv2d(8, 6, 2, padding="same", dilation=2), relu(), L.ConvTranspose2d(6, 3, 3, 2, 1, 1)]
    theirs = torch.nn.Sequential(*layers(torch.nn, torch.nn.ReLU))
    ours = nn.Sequential(*layers(fc, nn.ReLU))
    ours.load_weights([("layers." + k, oracle.to_mlx(v)) for k, v in theirs.state_dict().items()])
    return ours, theirs.double()


OPTIMIZERS = {
    "SGD": (lambda: optim.SGD(0.3, momentum=0.9), lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)),
    "AdamW": (lambda: optim.AdamW(0.03, eps=1e-3, bias_correction=True),
              lambda p: torch.optim.AdamW(p, 0.03, eps=1e-3)),
}


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_gives_pytorchs_losses(optimizer, compiled):
    "Twelve steps of training: the loss falls, and is PyTorch's at every step."
    ours, theirs = networks()
    rng = np.random.default_rng(0)
    x, target = oracle.draw(rng, (4, 3, 8, 8)), oracle.draw(rng, (3, 1, 1)) + mx.zeros((4, 3, 8, 8))
    our_optimizer, their_optimizer = OPTIMIZERS[optimizer]
    mine, judge = our_optimizer(), their_optimizer(theirs.parameters())
    gradient = nn.value_and_grad(ours, lambda x, target: ((ours(x) - target) ** 2).mean())

    def step(x, target):
        loss, gradients = gradient(x, target)
        mine.update(ours, gradients)
        return loss
    state = [ours.state, mine.state]
    if compiled: step = mx.compile(step, inputs=state, outputs=state)

    losses = []
    for i in range(12):
        loss = step(x, target)
        mx.eval(ours.parameters(), mine.state)
        judge.zero_grad()
        judged = ((theirs(oracle.to_torch(x)) - oracle.to_torch(target)) ** 2).mean()
        judged.backward()
        judge.step()
        losses.append(loss.item())
        assert abs(losses[-1] - judged.item()) < 1e-4 * judged.item(), f"step {i}"
    assert losses[-1] < 0.95 * losses[0]


def test_freezing():
    "Frozen parameters get no gradient and do not move; unfrozen ones do again."
    model, _ = networks()
    x = oracle.draw(np.random.default_rng(0), (2, 3, 8, 8))
    model.layers[0].freeze()
    model.layers[6].freeze(keys="bias")
    everything = nn.utils.tree_flatten(model.parameters(), destination={})
    step = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())
    optimizer = optim.SGD(0.1)
    _, gradients = step(x)
    frozen = {"layers.0.weight", "layers.0.bias", "layers.6.bias"}
    assert nn.utils.tree_flatten(gradients, destination={}).keys() == everything.keys() - frozen
    optimizer.update(model, gradients)
    for k, v in nn.utils.tree_flatten(model.parameters()):
        assert mx.array_equal(v, everything[k]) == (k in frozen), k
    model.unfreeze()
    assert nn.utils.tree_flatten(step(x)[1], destination={}).keys() == everything.keys()


@pytest.mark.parametrize("suffix", ("safetensors", "npz"))
def test_saved_weights(suffix, tmp_path):
    "`save_weights` and `load_weights` of a model, strictly."
    model, twin = networks()[0], networks()[0]
    x = oracle.draw(np.random.default_rng(0), (2, 3, 8, 8))
    for layer in twin.layers:
        if "weight" in layer: layer.reset_parameters()
    assert not mx.allclose(model(x), twin(x))
    model.save_weights(str(tmp_path / f"w.{suffix}"))
    twin.load_weights(str(tmp_path / f"w.{suffix}"))
    assert mx.array_equal(model(x), twin(x))


def test_set_dtype():
    "A model cast to half precision computes in it, close to the full one."
    model, _ = networks()
    x = oracle.draw(np.random.default_rng(0), (2, 3, 8, 8))
    full = model(x)
    model.set_dtype(mx.float16)
    y = model(x.astype(mx.float16))
    assert y.dtype == mx.float16 and mx.abs(y - full).max() < 0.02


def test_quantization_passes_by():
    "`nn.quantize` takes the linear layers of a model and leaves ours."
    model = nn.Sequential(nn.Linear(64, 64), fc.Conv1d(8, 8, 1), fc.ConvTranspose1d(8, 8, 1))
    nn.quantize(model)
    assert [type(layer) for layer in model.layers] == [
        nn.QuantizedLinear, fc.Conv1d, fc.ConvTranspose1d]


def test_lists_among_the_attributes_are_not_parameters():
    "A list where PyTorch takes one changes the call, and nothing that is trained or saved."
    layer = fc.Conv2d(4, 4, 3)
    layer.stride, layer.dilation = [2, 2], [1, 1]
    assert set(dict(nn.utils.tree_flatten(layer.parameters()))) == {"weight", "bias"}
    assert layer(mx.zeros((1, 4, 9, 9))).shape == (1, 4, 4, 4)


# Laziness ------------------------------------------------------------------------------------

def test_nothing_is_computed_before_it_is_asked_for():
    "Graphs over inputs of a terabyte are built in no memory: functions, layers, gradients, vmap."
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kept = []
    for n, kind in product((1, 2, 3), ("Conv", "ConvTranspose")):
        x = mx.zeros((16, 2**8, *{1: (2**26,), 2: (2**13, 2**13), 3: (2**9, 2**9, 2**8)}[n]))
        for groups in (1, 2**8):
            layer = getattr(fc, f"{kind}{n}d")(2**8, 2**8, 3, padding=1, groups=groups)
            kept += [layer(x), mx.grad(lambda x: layer(x).sum())(x), layer]
    for mode in ("reflect", "replicate", "circular"):
        x = mx.zeros((16, 2**8, 2**13, 2**13))
        kept += [F.pad(x, (1, 2, 3, 4), mode)]
        kept += [fc.Conv2d(2**8, 2, 3, padding="same", padding_mode=mode)(x)]
    x, w = mx.zeros((2, 16, 2**8, 2**12, 2**12)), mx.zeros((2, 2**8, 2**8, 3, 3))
    kept += [mx.vmap(F.conv2d)(x, w)]
    assert len(kept) > 40 and max(mx.get_peak_memory(), mx.get_active_memory()) - before < 2**20


def test_no_call_evaluates(monkeypatch):
    "No `mx.eval` in layers, functions, lazy layers, `materialize` or state handling."
    def refuse(*_): raise AssertionError("mx.eval was called")
    for name in ("eval", "async_eval", "synchronize"): monkeypatch.setattr(mx, name, refuse)
    x = mx.ones((2, 4, 6, 6))
    for layer in (fc.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                  fc.ConvTranspose2d(4, 4, 3), fc.LazyConv2d(4, 3)):
        fc.materialize(layer, x)
        layer.load_state_dict(layer.state_dict())
        layer(x)
        mx.grad(lambda x: layer(x).sum())(x)
