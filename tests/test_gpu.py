"""The rule for GPUs, on a machine without one: its numbers, computed on the CPU, and what it launches."""
import copy
import json
import pickle
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import flashconv as fc
import flashconv.functional as F
import flashconv.gpu
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flashconv.algorithms import choice, derivatives, gpu, native, record, weights
from flashconv.algorithms.native import as_convolution
from flashconv.algorithms.record import as_on
from flashconv.geometry import conv_geometry

BACKENDS = "metal", "cuda"


@pytest.fixture(autouse=True)
def winners_file(tmp_path, monkeypatch):
    "What the owner of this machine has measured does not count."
    file = tmp_path / "winners.json"
    for module in (gpu, flashconv.gpu): monkeypatch.setattr(module, "winners_file", lambda: file)
    choice._rule.cache_clear()
    yield file
    choice._rule.cache_clear()


@pytest.fixture(params=BACKENDS)
def backend(request):
    "The choice is made as on one of them."
    with mx.stream(mx.cpu), as_on(request.param): yield request.param


# Numbers ---------------------------------------------------------------------------------------

CASES, PARTS = 60, 3


@pytest.mark.parametrize("part", range(PARTS))
def test_cases(torch, backend, part):
    "Calls and layers at random, with gradients, vmap, jvp and compile: as PyTorch, see test_random.py."
    from fuzz import command, draw
    from judge import verdict
    for number in range(10_000 + part, 10_000 + CASES, PARTS):
        case = draw(1, number)
        _, failure = verdict({key: case[key] for key in case if key != "algorithm"})
        assert failure is None, f"{failure}\n{command(case)}"


@contextmanager
def watched():
    "The names of the algorithms that run in a block."
    seen, names = [], []
    token = choice.watchers.set((seen,))
    try: yield names
    finally:
        choice.watchers.reset(token)
        names += [name for name, *_ in seen]


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16), ids=str)
@pytest.mark.parametrize("stride, dilation, padding", (
    (2, 1, 0), (3, 2, 1), ((2, 1, 2), 1, 1), ((1, 2, 1), (2, 1, 1), 0)))
def test_transposed_volumes(torch, backend, stride, dilation, padding, dtype):
    "In both layouts, as PyTorch in float64."
    kw = {"stride": stride, "dilation": dilation, "padding": padding}
    x, w = (mx.random.normal(shape).astype(dtype) for shape in ((2, 3, 4, 5, 3), (3, 2, 3, 2, 4)))
    def theirs(*arrays):
        tensors = (torch.tensor(np.array(a)).double() for a in arrays)
        return torch.nn.functional.conv_transpose3d(*tensors, **kw).numpy()
    right, size = theirs(x, w), theirs(mx.abs(x), mx.abs(w))
    first = F.conv_transpose3d(x, w, **kw)
    last = F.conv_transpose3d(mx.moveaxis(x, 1, -1), w, **kw, data_format="channels_last")
    for y in (first, mx.moveaxis(last, -1, 1)):
        assert np.all(np.abs(np.array(y) - right) <= 64 * float(mx.finfo(dtype).eps) * size)


@pytest.fixture
def small_memory(monkeypatch):
    "As if all windows of any call would fill the memory."
    monkeypatch.setattr(weights, "whole_bytes", lambda: 0)


def test_cases_in_shares(torch, backend, small_memory):
    "The gradient of a weight without windows: random cases, as PyTorch."
    from fuzz import command, draw
    from judge import verdict
    for number in range(20_000, 20_040):
        case = draw(1, number)
        _, failure = verdict({key: case[key] for key in case if key != "algorithm"})
        assert failure is None, f"{failure}\n{command(case)}"


SHARED = {  # sizes of input and weight, then numbers of the call
    "2d": ((6, 13, 9), (20, 6, 3, 3), {"padding": 1, "stride": 2}),
    "2d, long": ((3, 40, 4), (5, 3, 3, 2), {"padding": (2, 0), "dilation": (2, 1)}),
    "1d": ((6, 48), (8, 6, 5), {"padding": 2, "stride": 3}),
    "3d": ((4, 6, 5, 7), (18, 4, 3, 2, 2), {"padding": (1, 1, 0), "stride": (2, 1, 1)}),
    "grouped": ((6, 9, 8), (34, 3, 3, 3), {"groups": 2, "padding": 1}),
    "grouped 3d": ((4, 6, 5, 7), (6, 2, 3, 2, 2), {"groups": 2, "dilation": (1, 2, 1)}),
    "depthwise": ((6, 9, 8), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "transposed": ((6, 6, 5), (6, 3, 4, 4), {
        "groups": 2, "stride": 2, "padding": 1, "output_padding": (1, 0)}),
    "transposed 1d": ((6, 12), (6, 4, 6), {"stride": 3, "padding": 2, "output_padding": 2})}


def judged(torch, kind, x, cotangent, weight, kw):
    "The gradient of a weight in float64, and the sum of its terms' absolute values."
    def gradient(*arrays):
        x, c = (torch.tensor(np.array(a.astype(mx.float32))).double() for a in arrays)
        w = torch.zeros(weight, dtype=torch.float64, requires_grad=True)
        getattr(torch.nn.functional, kind)(x, w, **kw).backward(c)
        return w.grad.numpy()
    return gradient(x, cotangent), gradient(mx.abs(x), mx.abs(cotangent))


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("batch", (1, 3, 40, 150))
@pytest.mark.parametrize("name", SHARED)
def test_shares_of_batches(torch, backend, small_memory, name, batch, dtype):
    "Numbers of images that don't divide well, in both layouts: as PyTorch in float64."
    shape, weight, kw = SHARED[name]
    kind = f"{'conv_transpose' if 'transposed' in name else 'conv'}{len(shape) - 1}d"
    x, zeros = mx.random.normal((batch, *shape)).astype(dtype), mx.zeros(weight, dtype)
    cotangent = mx.random.normal(getattr(F, kind)(x, zeros, **kw).shape).astype(dtype)
    right, size = judged(torch, kind, x, cotangent, weight, kw)
    for last in (False, True):
        layout = {"data_format": "channels_last"} if last else {}
        given, c = (mx.moveaxis(a, 1, -1) if last else a for a in (x, cotangent))
        def run(w): return getattr(F, kind)(given, w, **kw, **layout)
        with watched() as seen: _, (ours,) = mx.vjp(run, [zeros], [c])
        assert "shares" in seen or backend == "cuda" and "swapped" in seen
        error = np.abs(np.array(ours.astype(mx.float32)) - right)
        assert np.all(error <= 64 * float(mx.finfo(dtype).eps) * size), last


@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("kernel", (1, 3))
def test_images_are_added_up_in_32_bits(backend, small_memory, kernel, last):
    "Sums of single images and shares overflow in 16 bits, that of all doesn't."
    sign = mx.array([1, -1] * 16).reshape(32, 1, 1, 1).astype(mx.float16)
    x, w = mx.full((32, 12, 12, 2), 200, mx.float16), mx.zeros((3, 2, kernel, kernel), mx.float16)
    layout = {"data_format": "channels_last"} if last else {}
    if not last: x = mx.moveaxis(x, -1, 1)
    def run(w): return F.conv2d(x, w, **layout)
    _, (gradient,) = mx.vjp(run, [w], [10 * sign * mx.ones_like(run(w))])
    assert mx.array_equal(gradient, w)


@pytest.mark.parametrize("batch", (1, 5, 70))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_shares_are_local(torch, backend, small_memory, value, batch):
    "What is not finite reaches the weights that see it, as in PyTorch, and no others."
    x, c = (mx.random.normal(shape) for shape in ((batch, 3, 14, 9), (batch, 20, 6, 4)))
    zeros = mx.zeros((20, 3, 3, 3))
    def run(x): return lambda w: F.conv2d(x, w, stride=2)
    for place in ((0, 1, 0, 0), (-1, 2, -1, -1), (0, 0, -1, 2), (-1, 1, 5, 3)):
        for arrays in ((changed(x, place, value), c), (x, changed(c, place, value))):
            _, (ours,) = mx.vjp(run(arrays[0]), [zeros], [arrays[1]])
            right, _ = judged(torch, "conv2d", *arrays, zeros.shape, {"stride": 2})
            assert np.array_equal(np.isfinite(np.array(ours)), np.isfinite(right)), place


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16), ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_shares_hold_what_explain_states(small_memory, name, dtype):
    "No more than that is allocated besides the arrays, on a CPU."
    shape, weight, kw = SHARED[name]
    kind = f"{'conv_transpose' if 'transposed' in name else 'conv'}{len(shape) - 1}d"
    x, w = mx.ones((200, *shape), dtype), mx.zeros(weight, dtype)
    def call(x): return getattr(F, kind)(x, w, **kw)
    with mx.stream(mx.cpu), as_on("metal"):
        (run,) = [run for run in fc.explain(call, x.shape, dtype) if run.part == "weight gradient"]
        (*_, g), = explained(call, x)
        cotangent = mx.ones(g.output_shape, dtype)
        mx.eval(x, w, cotangent)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(weights.shares(x, cotangent, g))
    assert run.algorithm == "shares" and mx.get_peak_memory() - before <= run.workspace


def explained(call, x):
    "The convolutions that a call runs."
    from flashconv.algorithms.explain import _watched
    return _watched(call, x)


def changed(a, place, value):
    "A copy with another value in one place."
    a = np.array(a)
    a[place] = value
    return mx.array(a)


def test_the_back_end_is_an_argument():
    "Nested, and over at the end of the block; the fast path of CPUs does not overlook it."
    def algorithm():
        run = fc.explain(fc.ConvTranspose2d(4, 4, 4, 2), (1, 4, 9, 9))[0]
        return run.algorithm
    with mx.stream(mx.cpu):
        before = algorithm()
        with as_on("metal"):
            assert algorithm() == "spread"
            with as_on("cpu"): assert algorithm() == before
        assert algorithm() == before
        with as_on("metal"):
            assert not choice.follows_rule()
            y = F.conv_transpose2d(mx.ones((1, 1, 2, 2)), mx.ones((1, 1, 2, 2)), stride=2)
    assert mx.all(y == 1)


# Counts ----------------------------------------------------------------------------------------

DENSE = {  # channels in and out, size, kernel, then numbers of the call
    "1x1": (64, 32, (20, 20), (1, 1), {}),
    "1x1 strided": (64, 32, (20, 20), (1, 1), {"stride": 2}),
    "3x3": (64, 32, (20, 20), (3, 3), {"padding": 1}),
    "3x3 strided": (64, 32, (20, 20), (3, 3), {"padding": 1, "stride": 2}),
    "3x3 dilated": (64, 32, (20, 20), (3, 3), {"padding": 2, "dilation": 2}),
    "stem": (3, 64, (56, 56), (7, 7), {"padding": 3, "stride": 2}),
    "1d": (64, 32, (100,), (5,), {"padding": 2}),
    "1d strided": (64, 32, (100,), (5,), {"padding": 2, "stride": 4}),
    "one place": (64, 96, (5, 4), (5, 4), {}),
    "transposed k4 s2": (64, 32, (20, 20), (4, 4), {"padding": 1, "stride": 2, "transposed": True}),
    "transposed k3 s2 and more": (64, 32, (20, 20), (3, 3), {
        "padding": 1, "stride": 2, "transposed": True, "output_padding": 1}),
    "transposed k2 s2": (64, 32, (20, 20), (2, 2), {"stride": 2, "transposed": True}),
    "transposed 3x3": (64, 32, (20, 20), (3, 3), {"padding": 1, "transposed": True}),
    "transposed 1d": (64, 32, (100,), (16,), {"padding": 4, "stride": 8, "transposed": True})}

GROUPED = {
    "grouped": (64, 32, (20, 20), (3, 3), {"padding": 1, "stride": 2, "groups": 4}),
    "grouped 1d": (64, 32, (100,), (5,), {"padding": 2, "groups": 4}),
    "depthwise": (64, 64, (20, 20), (3, 3), {"padding": 1, "groups": 64}),
    "depthwise 1d": (64, 64, (100,), (31,), {"padding": 15, "groups": 64}),
    "grouped, transposed": (64, 32, (20, 20), (4, 4), {
        "padding": 1, "stride": 2, "transposed": True, "groups": 4})}
VOLUMES = {
    "3d": (32, 48, (5, 9, 9), (3, 3, 3), {"padding": 1, "stride": 2}),
    "grouped 3d": (64, 32, (5, 9, 9), (3, 3, 3), {"padding": 1, "groups": 4}),
    "transposed 3d": (32, 16, (4, 7, 7), (2, 2, 2), {"stride": 2, "transposed": True})}


def geometry(row, batch, last, groups=1):
    "Input, weight and geometry of a row."
    channels, outputs, size, kernel, kw = row
    ones = (1,) * len(size)
    def each(name, default): return tuple(n * kw.get(name, default) for n in ones)
    transposed = kw.get("transposed", False)
    first, second = (channels, outputs) if transposed else (outputs, channels)
    shape = (batch, *size, channels) if last else (batch, channels, *size)
    weight = (first, second // groups, *kernel)
    g = conv_geometry("conv", shape, weight, None, each("stride", 1), each("padding", 0),
                      each("dilation", 1), groups, each("output_padding", 0) if transposed else None,
                      last)
    return mx.zeros(shape), mx.zeros(weight), g


def launched(x, w, g):
    "What a convolution launches and copies, and the form that it has."
    if g.transposed and max(g.stride) == 1:
        plain = as_convolution(x, w, g)[2]
        name, _ = choice.choose(plain, as_convolution(x, w, g)[1].shape, x.dtype)
        def run(x, w): return choice.ALGORITHMS[name].run(*as_convolution(x, w, g))
    else:
        name, _ = choice.choose(g, w.shape, x.dtype)
        def run(x, w): return choice.ALGORITHMS[name].run(x, w, g)
    return gpu.counted(run, x, w), name


def launched_for_weight(x, w, g):
    "The same for the gradient of its weight."
    name, _ = choice.choose_for_weight(g, w.shape, x.dtype)
    def run(x, c): return choice.FOR_WEIGHTS[name].run(x, c, g)
    return gpu.counted(run, x, mx.zeros(g.output_shape, x.dtype)), name


@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("name", DENSE)
def test_one_launch(backend, name, last):
    """Forward and input gradient of each layer in one group, in one or two axes.

    Channels first two copies, of input and weight; channels last no copy of a feature map.
    """
    x, w, g = geometry(DENSE[name], 8, last)
    back = derivatives._back(g, x.shape)
    for arrays in ((x, w, g), (mx.zeros(g.output_shape), w, back)):
        counts, form = launched(*arrays)
        assert counts.kernels == 1, (form, counts)
        if last: assert counts.nbytes <= w.nbytes, (form, counts)
        else: assert counts.copies <= 2, (form, counts)


@pytest.mark.parametrize("batch", (1, 32))
@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("name", DENSE)
def test_a_dozen_launches_for_a_weight(backend, name, last, batch):
    "At any batch size, copies included; each array is copied twice at most, or a window of it once."
    x, w, g = geometry(DENSE[name], batch, last)
    counts, form = launched_for_weight(x, w, g)
    assert counts.kernels + counts.copies <= 12, (form, counts)


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("name", {**DENSE, **GROUPED, **VOLUMES})
def test_a_dozen_launches_for_huge_batches(backend, name, last, dtype, monkeypatch):
    "Where all windows would fill the memory, too."
    row = {**DENSE, **GROUPED, **VOLUMES}[name]
    monkeypatch.setattr(weights, "whole_bytes", lambda: 2**20)
    for batch in (128, 256, 1024 if dtype == mx.float32 else 512):
        x, w, g = geometry(row, batch, last, row[-1].get("groups", 1))
        counts, form = launched_for_weight(x.astype(dtype), w, g)
        assert counts.kernels + counts.copies <= 12, (batch, form, counts)
        is_bounded = form != "patches" or not weights.fills_memory(choice.call_of(g, w.shape, dtype))
        assert is_bounded, batch


def test_a_dozen_launches_for_thousands_of_images(backend):
    "As it is, without a bound that a test sets."
    for batch, size in ((256, 56), (1024, 28), (4096, 14)):
        x, w, g = geometry((64, 64, (size, size), (3, 3), {"padding": 1}), batch, True)
        counts, form = launched_for_weight(x, w, g)
        assert form == {"metal": "shares", "cuda": "swapped"}[backend]
        assert counts.kernels + counts.copies <= 12, (batch, counts)


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16), ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
def test_a_dozen_launches_where_cuda_is_cut(last, dtype):
    "Windows that 31 bits don't count, in parts of the batch."
    x, w, g = geometry((64, 64, (56, 56), (3, 3), {"padding": 1}), 4096, last)
    with as_on("cuda"): counts, form = launched_for_weight(x.astype(dtype), w, g)
    assert form == "swapped" and 1 + 4 < counts.kernels + counts.copies <= 12, counts
    assert counts.nbytes < 2.1 * x.nbytes


@pytest.mark.parametrize("name", ("3x3", "stem", "1d", "transposed k4 s2", "transposed 1d"))
def test_cuda_knows_the_gradient_of_a_weight(name):
    "By strides, so that channels last nothing is copied."
    x, w, g = geometry(DENSE[name], 8, True)
    with as_on("cuda"): assert launched_for_weight(x, w, g) == ((1, 0, 0), "swapped")


@pytest.mark.parametrize("kernel, padding", (((3, 3), 1), ((7, 7), 3)))
def test_grouped_weights(backend, kernel, padding):
    "Depthwise: slices are views, and one array holds them all."
    x, w, g = geometry((32, 32, (28, 28), kernel, {"padding": padding}), 4, False, groups=32)
    counts, form = launched_for_weight(x, w, g)
    assert form == "patches" and counts.kernels + counts.copies <= 12, counts


@pytest.mark.parametrize("groups", (1, 2))
def test_volumes(backend, groups):
    "One launch, halves too, or one for each tap of the depth where there are groups."
    x, w, g = geometry((4, 6, (5, 9, 9), (3, 3, 3), {"padding": 1}), 2, True, groups)
    counts, form = launched(x, w, g)
    assert (form, counts.kernels) == (("volume", 1) if groups == 1 else ("native", 3 + 2))
    assert choice.choose(g, w.shape, mx.float16)[0] == ("volume" if groups == 1 else "matmul")


def test_transposed_volumes_and_groups(backend):
    "What Metal has a kernel for in two axes only, and what neither has one for."
    for taps, kernels in ((3, 3 + 1), (4, 4 + 2)):  # convolutions, and sums of planes
        x, w, g = geometry((4, 6, (5, 5, 5), (taps,) * 3, {"stride": 2, "transposed": True}), 2, True)
        counts, form = launched(x, w, g)
        assert (form, counts.kernels) == ("spread", kernels if backend == "metal" else 1)
    x, w, g = geometry((4, 6, (5, 5, 5), (2,) * 3, {"stride": 2, "transposed": True}), 2, True)
    counts, form = launched(x, w, g)
    assert (form, counts.kernels) == ("overlap_add" if backend == "metal" else "spread", 1)
    x, w, g = geometry((4, 6, (9, 9), (3,) * 2, {"stride": 2, "transposed": True}), 2, False, 2)
    counts, form = launched(x, w, g)
    assert form == "phases" and counts.kernels == 1 + 4 + 4  # zeros; for a phase a convolution, and its place


def test_depthwise_rows_are_padded_first():
    "Metal's kernel for them takes no padding."
    x, w, g = geometry((16, 16, (100,), (31,), {"padding": 15}), 2, True, groups=16)
    graph = []
    with as_on("metal"):
        mx.export_function(graph.append, lambda x, w: native.native(x, w, g), x, w)
    (convolution,) = (step for step in graph if step.get("name") == "Convolution")
    assert convolution["arguments"][1:3] == [[0], [0]]
    assert [step["name"] for step in graph if step.get("name") == "Pad"] == ["Pad"]


def test_a_chain_keeps_its_layout(backend):
    "Channels first, with a bias and an activation between: the weights are copied, no feature map."
    w, bias, g = mx.zeros((64, 64, 3, 3)), mx.zeros(64), geometry(DENSE["3x3"], 8, False)[2]
    def chain(x):
        x = mx.moveaxis(x, -1, 1)  # as another layer left it
        for _ in range(2):
            x = derivatives.add_bias(native.native(x, w, g), bias, False)
            x = mx.maximum(x, 0)
        return x
    counts = gpu.counted(chain, mx.zeros((8, 20, 20, 64)))
    assert counts.copies == 2 and counts.nbytes == 2 * w.nbytes


# Weights in order -------------------------------------------------------------------------------

IN_EVALUATION = {
    **{name: DENSE[name] for name in DENSE if name not in ("1x1 strided", "transposed 3x3")},
    **{name: GROUPED[name] for name in ("grouped", "grouped 1d", "depthwise")},
    "3d": VOLUMES["3d"]}


def layer_of(row, last=False, dtype=mx.float32):
    "A layer, and an input for it."
    channels, outputs, size, kernel, kw = row
    kw = dict(kw, dtype=dtype, data_format=("channels_first", "channels_last")[last])
    kind = "ConvTranspose" if kw.pop("transposed", False) else "Conv"
    layer = getattr(fc, f"{kind}{len(size)}d")(channels, outputs, kernel, **kw)
    mx.eval(layer.parameters())
    return layer, mx.random.normal((8, *size, channels) if last else (8, channels, *size), dtype)


def before_and_after(layer, x):
    "What a layer launches and copies in training and in evaluation."
    before = gpu.counted(layer, x)
    mx.eval(layer.eval().parameters())
    after = gpu.counted(layer, x)
    assert after.kernels == before.kernels
    return before, after


def strides(array): return gpu._as_it_lies(array).strides


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("name", IN_EVALUATION)
def test_evaluation_copies_no_weight(backend, name, last, dtype):
    "Channels last nothing is copied, and channels first the input at most."
    layer, x = layer_of(IN_EVALUATION[name], last, dtype)
    before, after = before_and_after(layer, x)
    assert (after.copies, after.nbytes) == ((1, x.nbytes) if before.copies and not last else (0, 0))


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16), ids=str)
def test_grouped_volumes_copy_no_weight(backend, dtype):
    "Plane by plane, or with all windows in halves."
    layer, x = layer_of(VOLUMES["grouped 3d"], True, dtype)
    before, after = before_and_after(layer, x)
    assert before.nbytes - after.nbytes == layer.weight.nbytes


def test_weights_that_are_copied_all_the_same(backend):
    "A kernel that is flipped, and one of which each phase takes some taps."
    flipped, x = layer_of(DENSE["transposed 3x3"], True)
    before, after = before_and_after(flipped, x)
    assert before == after and after.nbytes == flipped.weight.nbytes
    phases, x = layer_of((64, 32, (9, 9), (4, 4), {"stride": 2, "transposed": True, "groups": 4}))
    weight = phases.weight
    before, after = before_and_after(phases, x)
    assert before == after and phases.weight is weight


@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("name", {**DENSE, **IN_EVALUATION})
def test_the_workspace_that_explain_states(backend, name, last):
    "At least what is copied, and at most some copies of the arrays where MLX has a kernel."
    layer, x = layer_of({**DENSE, **IN_EVALUATION}[name], last)
    copied = gpu.counted(layer, x).nbytes
    run = fc.explain(layer, x.shape)[0]
    assert run.workspace >= copied
    if run.algorithm != "matmul": assert run.workspace <= run.bytes + layer.weight.nbytes


def test_channels_that_metal_has_no_kernel_for():
    "It writes columns, and so does Winograd's transform."
    def stated(*args, **kw): return fc.explain(fc.Conv2d(*args, 3, **kw), (1, args[0], 66, 66))[0]
    with as_on("metal"):
        for channels, groups, is_even in ((64, 4, True), (24, 4, False), (96, 48, True)):
            run = stated(channels, channels, groups=groups)
            columns = channels * 9 * 64 * 64 * 4
            assert (run.workspace < columns) is is_even
        assert stated(128, 128).workspace > 2 * stated(128, 128).bytes > stated(96, 96).workspace
    with as_on("cuda"): assert stated(24, 24, groups=4).workspace < stated(24, 24, groups=4).bytes


@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
def test_a_network_copies_its_input(backend, last):
    "Convolutions and activations, one after the other, in evaluation."
    layout = {"data_format": "channels_last"} if last else {}
    model = nn.Sequential(fc.Conv2d(16, 32, 3, padding=1, **layout), nn.ReLU(),
                          fc.Conv2d(32, 32, 3, 2, groups=4, **layout), nn.ReLU(),
                          fc.ConvTranspose2d(32, 16, 4, 2, **layout), nn.ReLU(),
                          fc.Conv2d(16, 8, 3, **layout))
    mx.eval(model.eval().parameters())
    x = mx.zeros((8, 20, 20, 16) if last else (8, 16, 20, 20))
    counts = gpu.counted(model, x)
    assert (counts.copies, counts.nbytes) == ((0, 0) if last else (1, x.nbytes))


@pytest.mark.parametrize("name", ("3x3", "transposed k4 s2", "grouped 1d", "3d"))
def test_a_weight_in_order_is_the_same_weight(backend, name, tmp_path):
    "Values, gradients, files, copies, pickles, other dtypes, compiled calls."
    layer, x = layer_of(IN_EVALUATION[name])
    weight, y = layer.weight, layer(x)
    def loss(layer): return layer(x).square().sum()
    gradient = nn.value_and_grad(layer, loss)(layer)[1]["weight"]
    layer.eval()
    assert mx.array_equal(layer.weight, weight) and strides(layer.weight) != strides(weight)
    assert mx.allclose(layer(x), y, atol=1e-5)
    assert mx.allclose(nn.value_and_grad(layer, loss)(layer)[1]["weight"], gradient, rtol=1e-3)
    assert mx.allclose(mx.compile(layer)(x), y, atol=1e-5)
    layer.save_weights(str(tmp_path / "layer.safetensors"))
    assert mx.array_equal(mx.load(str(tmp_path / "layer.safetensors"))["weight"], weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)).eval()):
        assert mx.array_equal(twin.weight, weight) and strides(twin.weight) == strides(layer.weight)
    assert np.array_equal(flashconv.to_torch_state(layer)["weight"], np.array(weight))
    before = strides(layer.weight)
    layer.set_dtype(mx.float16)
    assert strides(layer.weight) == tuple(n // 2 for n in before)
    assert mx.array_equal(layer.weight, weight.astype(mx.float16))


def test_a_weight_in_order_can_be_exported(backend, tmp_path):
    "Whether it is computed yet or not."
    layer, x = layer_of(DENSE["3x3"])
    y, file = layer(x), str(tmp_path / "layer.mlxfn")
    for _ in range(2):
        with fc.plain_operations(): mx.export_function(file, lambda x: layer.eval()(x), x)
        assert mx.allclose(mx.import_function(file)(x)[0], y, atol=1e-5)
        mx.eval(layer.parameters())


def test_evaluation_twice_copies_once(backend):
    "What lies in order stays where it is, in training as well."
    layer = layer_of(DENSE["3x3"])[0].eval()
    address = gpu._as_it_lies(layer.weight).ctypes.data
    layer.train().eval()
    assert gpu._as_it_lies(layer.weight).ctypes.data == address


def test_states_loaded_in_evaluation(backend, tmp_path):
    "flashconv's functions put them in order, and so does `eval()` after MLX's."
    layer, other = layer_of(DENSE["3x3"])[0].eval(), layer_of(DENSE["3x3"])[0]
    lies = strides(layer.weight)
    layer.load_state_dict(other.state_dict())
    assert strides(layer.weight) == lies and mx.array_equal(layer.weight, other.weight)
    flashconv.load_torch_state(nn.Sequential(layer), {"0.weight": other.weight, "0.bias": other.bias})
    assert strides(layer.weight) == lies
    layer.load_weights([("weight", other.weight), ("bias", other.bias)])
    assert strides(layer.weight) != lies
    layer.eval()
    assert strides(layer.weight) == lies


def test_layers_whose_weight_comes_later(backend):
    "Lazy ones wait, and those with a norm compute it; both may lie in order afterwards."
    lazy = fc.LazyConv2d(8, 3).eval()
    lazy(mx.zeros((1, 4, 5, 5)))
    assert strides(lazy.eval().weight) == (4 * 36, 4, 4 * 12, 4 * 4)
    normed = flashconv.weight_norm(fc.Conv2d(4, 8, 3)).eval()
    assert normed(mx.zeros((1, 4, 5, 5))).shape == (1, 8, 3, 3)
    assert strides(flashconv.fold_weight_norm(normed).weight) == strides(lazy.weight)
    model = nn.Sequential(fc.Conv2d(4, 8, 3, data_format="channels_last"), nn.BatchNorm(8)).eval()
    model = flashconv.fold_batch_norm(model)
    assert strides(model.layers[0].weight) == strides(lazy.weight)


@pytest.mark.parametrize("dtype", (mx.complex64, mx.float64))
def test_weights_that_mlx_does_not_convolve(backend, dtype):
    "They stay as they are."
    with mx.stream(mx.cpu): layer = fc.Conv2d(2, 2, 3, dtype=dtype)
    weight = layer.weight
    assert layer.eval().weight is weight


def test_weights_on_a_cpu():
    "They stay as they are, also where the layer is on the CPU and the model isn't."
    with mx.stream(mx.cpu): layer = fc.Conv2d(2, 2, 3)
    weight = layer.weight
    with mx.stream(mx.cpu): assert layer.eval().weight is weight


# Hazards ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.bfloat16), ids=str)
@pytest.mark.parametrize("size, kernel, avoided", (
    ((64, 64), 3, True), ((63, 63), 3, False), ((64, 64), 5, False)))
def test_winograd_is_avoided_in_halves(size, kernel, avoided, dtype):
    "On Metal, where MLX would take it, and with the same numbers."
    padding = {"padding": kernel // 2}
    x, w, g = geometry((128, 128, size, (kernel, kernel), padding), 1, True)
    graph = []
    with as_on("metal"):
        mx.export_function(graph.append, lambda x, w: native.native(x, w, g), x.astype(dtype),
                           w.astype(dtype))
    (convolution,) = (step for step in graph if step.get("name") == "Convolution")
    assert convolution["arguments"][-1] is (avoided and dtype != mx.float32)


def test_a_flipped_kernel_gives_the_same():
    "Turned around, and said to be."
    x, w, g = geometry((128, 128, (64, 64), (3, 3), {"padding": 1}), 1, True)
    x, w = (mx.random.normal(a.shape).astype(mx.float16) * 0.1 for a in (x, w))
    right = native.native(x, w, g)
    with as_on("metal"): flipped = native.native(x, w, g)
    assert mx.allclose(flipped, right, atol=1e-2)


def test_what_32_bits_do_not_count():
    "MLX's convolution would read elsewhere, so it isn't asked."
    one = mx.broadcast_to(mx.array(1.0), (1, 1, 2**17, 2**15))
    for name in BACKENDS:
        with as_on(name):
            runs = fc.explain(lambda x: F.conv2d(one, mx.ones((1, 1, 3, 3)), stride=4096), (1,))
        assert [run.algorithm for run in runs] == ["matmul", "overlap_add", "patches"]


@pytest.mark.parametrize("batch", (1, 7))
@pytest.mark.parametrize("name", SHARED)
def test_what_cuda_could_not_unfold_is_cut(torch, monkeypatch, name, batch):
    "No call has more values in all its windows than can be counted, here a few; as PyTorch."
    (shape, weight, kw), bound, unfolded = SHARED[name], 15_000, []
    kind = f"{'conv_transpose' if 'transposed' in name else 'conv'}{len(shape) - 1}d"
    for module in (native, gpu, weights):
        monkeypatch.setattr(module, "most_unfolded", lambda name: bound if name == "cuda" else 2**63)
    def seen(x, w, *args, by_mlx=mx.conv_general, **kw):
        y = by_mlx(x, w, *args, **kw)
        unfolded.append(y.size // len(w) * x.shape[-1] * np.prod(w.shape[1:-1]))
        return y
    monkeypatch.setattr(mx, "conv_general", seen)
    choice._rule.cache_clear()
    arrays = mx.random.normal((batch, *shape)), mx.random.normal(weight)
    def run(x, w): return getattr(F, kind)(x, w, **kw)
    with mx.stream(mx.cpu), as_on("cuda"):
        cotangent = mx.random.normal(run(*arrays).shape)
        (y,), ours = mx.vjp(run, arrays, [cotangent])
    theirs = [torch.tensor(np.array(a)).double().requires_grad_() for a in arrays]
    out = getattr(torch.nn.functional, kind)(*theirs, **kw)
    out.backward(torch.tensor(np.array(cotangent)).double())
    for mine, right in zip((y, *ours), (out.detach(), *(each.grad for each in theirs))):
        assert np.allclose(np.array(mine), right.numpy(), atol=1e-3)
    assert max(unfolded, default=0) <= bound


def test_two_strides_in_one_process():
    "CUDA's graphs are looked up without the stride: the second one does not share the first one's."
    x, w = mx.random.normal((1, 3, 7, 7)), mx.random.normal((3, 2, 4, 4))
    with mx.stream(mx.cpu), ExitStack() as stack:
        stack.enter_context(as_on("cuda"))
        graphs = []
        for stride in (2, 3, 2):
            def run(x, w): return gpu.spread(x, w, conv_geometry(
                "t", x.shape, w.shape, None, (stride,) * 2, (1, 1), (1, 1), 1, (0, 0)))
            mx.export_function(graphs.append, run, x, w)
    spreads = [step["arguments"][4] for step in graphs if step.get("name") == "Convolution"]
    assert spreads == [[2, 2], [2, 2]]  # the one between is composed of products


def mended(monkeypatch, name):
    "As if the installed MLX had mended a trap."
    monkeypatch.setitem(record.TRAPS, name, record.TRAPS[name]._replace(until=mx.__version__))
    choice._rule.cache_clear()


@pytest.mark.parametrize("installed, since, until, holds", (
    ("0.32.4", "0.30.0", None, True), ("0.32.4", "0.32.4", None, True),
    ("0.32.4", "0.33", None, False), ("0.32.4", "0.9.0", "0.32.5", True),
    ("0.32.4", "0.9.0", "0.32.4", False), ("0.100.0", "0.9.0", "0.99", False),
    ("1.0.0", "0.9.0", None, True), ("0.33.0.dev20261128+abc1234", "0.9.0", "0.33.0", False)))
def test_versions_of_a_trap(monkeypatch, installed, since, until, holds):
    "A version that nobody has read is assumed to have it."
    monkeypatch.setattr(mx, "__version__", installed)
    assert record.Trap("all", "", "", since, until).holds() is holds


def test_what_is_left_to_a_newer_mlx_is_mended():
    "A trap that nothing is done about."
    assert not record.TRAPS["rows"].holds()


def test_traps_that_a_cpu_shows():
    "Once one of these fails, the version of MLX that mends it belongs into `TRAPS`."
    with mx.stream(mx.cpu):
        cropped = mx.conv_general(mx.ones((1, 4, 1)), mx.ones((1, 1, 1)), padding=([-1], [-1]),
                                  input_dilation=2, flip=True)
        assert (cropped.shape != (1, 5, 1)) is record.TRAPS["negative padding"].holds()
        try: mx.conv3d(mx.ones((1, 3, 3, 3, 4)), mx.ones((4, 3, 3, 3, 2)), groups=2)
        except ValueError: is_refused = True
        else: is_refused = False
        assert is_refused is record.TRAPS["groups"].holds()


def test_nothing_is_avoided_that_is_mended(monkeypatch):
    "Each condition asks whether its trap holds."
    x, w, g = geometry((128, 128, (64, 64), (3, 3), {"padding": 1}), 1, True)
    def avoids(dtype): return native.loses_digits_by_winograd(g, (128, 3, 3, 128), 1, dtype)
    with as_on("metal"):
        monkeypatch.setattr(native, "has_tensor_products", lambda: True)
        assert avoids(mx.float32) and avoids(mx.float16)
        mended(monkeypatch, "winograd in halves")
        assert avoids(mx.float32) and not avoids(mx.float16)
        mended(monkeypatch, "winograd in float32")
        assert not avoids(mx.float32)
        _, weight, g = geometry((4, 6, (5, 9, 9), (3, 3, 3), {"padding": 1}), 2, True, groups=2)
        assert choice.choose(g, weight.shape, mx.float32)[0] == "native"
        mended(monkeypatch, "groups")
        assert choice.choose(g, weight.shape, mx.float32)[0] == "volume"
        ordered = gpu.in_mlx_order(mx.ones((4, 2, 3, 3, 3)), False, 2)
        assert strides(ordered) == strides(gpu.in_mlx_order(mx.ones((4, 2, 3, 3, 3)), False, 1))
    shape, weight = (1, 3, 61, 67), (3, 2, 4, 4)  # of no other test
    first, second = (conv_geometry("t", shape, weight, None, (stride,) * 2, (1, 1), (1, 1), 1, (0, 0))
                     for stride in (2, 3))
    assert gpu._has_graph_to_itself(shape, weight, mx.float32, first)
    assert not gpu._has_graph_to_itself(shape, weight, mx.float32, second)
    mended(monkeypatch, "graphs")
    assert gpu._has_graph_to_itself(shape, weight, mx.float32, second)
    large = record.Call(replace(first, output_shape=(1, 2, 2**16, 2**16)), weight, mx.float32)
    assert not large.can_be_counted
    mended(monkeypatch, "counts")
    assert large.can_be_counted


# Measured --------------------------------------------------------------------------------------

def test_the_command_runs_on_a_cpu(capsys, winners_file):
    "It checks, times and prints a block. What a CPU is fast at is not kept for GPUs."
    assert flashconv.gpu.main(["--device", "cpu", "--seconds", "0.1", "--layers", "one place"]) == 0
    out, bar = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("flashconv.gpu: ") and len(lines) == 1 + 16 + 1 and "WRONG" not in out
    assert "[####" in bar and lines[-1].startswith("Nothing is kept")
    assert not winners_file.exists()


def test_winners_are_kept_and_read(winners_file):
    "As on a GPU: the choice follows them."
    (layer,) = [each for each in flashconv.gpu.LAYERS if "one place" in each.name]
    cases = [(layer, batch, True, mx.float32, for_weight) for batch in (1, 2) for for_weight in (False, True)]
    with mx.stream(mx.cpu), as_on("metal"): flashconv.gpu._measured(cases, 0.1, is_kept=True)
    kept = json.loads(winners_file.read_text())
    assert len(kept) == 4 and set(kept.values()) <= {*choice.ALGORITHMS, *choice.FOR_WEIGHTS}
    _, weight, g = flashconv.gpu.geometry_of(layer, 1, True)
    with mx.stream(mx.cpu), as_on("metal"):
        kind = gpu.kind_of(choice.call_of(g, weight, mx.float32))
        for name in ("matmul", "taps"):
            winners_file.write_text(json.dumps(kept | {kind: name}))
            gpu._winners.cache_clear()
            choice._rule.cache_clear()
            assert choice.choose(g, weight, mx.float32) == (name, "the fastest when measured here")


@pytest.mark.parametrize("text", ("", "[]", "{\"a\": 1}", "not json", None))
def test_a_file_of_winners_that_is_none(winners_file, text):
    "The rule decides."
    if text is not None: winners_file.write_text(text)
    gpu._winners.cache_clear()
    x, w, g = geometry(DENSE["transposed k4 s2"], 1, False)
    with as_on("metal"): assert choice.choose(g, w.shape, x.dtype)[0] == "spread"


def test_winners_that_are_not_defined(winners_file):
    "A name that there is not, or that is not for the call."
    x, w, g = geometry(DENSE["transposed k4 s2"], 1, False)
    for name in ("winograd", "matmul", ["spread"], None):
        with as_on("metal"):
            kind = gpu.kind_of(choice.call_of(g, w.shape, x.dtype))
            winners_file.write_text(json.dumps({kind: name}))
            gpu._winners.cache_clear()
            choice._rule.cache_clear()
            assert choice.choose(g, w.shape, x.dtype)[0] == "spread"


def test_what_is_wrong_wins_nothing(monkeypatch):
    "It is reported with its error."
    wrong = choice.ALGORITHMS["spread"]._replace(run=lambda x, w, g: 1.01 * gpu.spread(x, w, g))
    monkeypatch.setitem(choice.ALGORITHMS, "spread", wrong)
    layer = flashconv.gpu.Layer("t", (4, 6), (7, 7), (4, 4), 2, 1, 1, True)
    with mx.stream(mx.cpu), as_on("metal"):
        found = flashconv.gpu.measure((layer, 2, True, mx.float32, False), 0.01)
    assert set(found.wrong) == {"spread"} and found.wrong["spread"] > 1
    assert "spread" not in found.times and "WRONG: spread (" in flashconv.gpu.report([found])


def test_every_layer_stands_for_a_kind():
    "All of them can be measured, and each form that the rule takes is among the rivals."
    with as_on("metal"):
        for layer in flashconv.gpu.LAYERS:
            for case in ((1, False, mx.float32, False), (1, True, mx.float16, True)):
                _, today, runs, *_ = flashconv.gpu.rivals(layer, *case)
                assert today in runs, (layer.name, today)


def test_without_a_gpu_it_says_so():
    "And what can be done; a layer that there is not ends it, too."
    if not mx.is_available(mx.gpu): assert "MLX has no GPU here" in flashconv.gpu.main([])
    assert "no layer is called" in flashconv.gpu.main(["--device", "cpu", "--layers", "5d"])
