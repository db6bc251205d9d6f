"""The choice of an algorithm: forced, explained, tuned."""
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import flashconv as fc
import flashconv.functional as F
from flashconv.algorithms import choice, tiles
from flashconv.algorithms.record import Call, as_on
from flashconv.geometry import conv_geometry

pytestmark = pytest.mark.usefixtures("without_kernels")  # test_kernels.py is about those

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
OTHERS = (mx.float64, mx.complex64)
NAMES = tuple(choice.ALGORITHMS)
fft = sys.modules["flashconv.algorithms.fft"]


@pytest.fixture(autouse=True)
def on_cpu():
    "What is chosen on a CPU; nothing tuned is left over."
    with mx.stream(mx.cpu): yield
    choice._tuned.clear()


def first(shape, weight, dtype=mx.float32, **kw):
    "The run of a convolution, transposed where `output_padding` is given."
    kind = "conv_transpose" if "output_padding" in kw else "conv"
    f = getattr(F, f"{kind}{len(shape) - 2}d")
    return fc.explain(partial(f, weight=mx.zeros(weight, dtype), **kw), shape, dtype)[0]


@pytest.mark.parametrize("name", ("winograd", "", None, 3, "FFT", "matmul "))
def test_unknown_algorithm(name):
    "An error that lists what there is, before the block is entered."
    with pytest.raises(ValueError, match="there are kernel, native, matmul") as caught:
        with fc.algorithm(name): raise AssertionError
    assert all(known in str(caught.value) for known in NAMES)


@pytest.mark.parametrize("dtype", (*FLOATS, *OTHERS, mx.int32), ids=str)
@pytest.mark.parametrize("kw", ({}, {"output_padding": 1, "stride": 2}), ids=("conv", "transposed"))
@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("name", NAMES)
def test_forced(name, n, kw, dtype):
    "It runs, or the error names those that would, and each of those does."
    shape, weight = (1, 2) + (5,) * n, (2, 2) + (3,) * n
    try:
        with fc.algorithm(name): run = first(shape, weight, dtype, **kw)
    except ValueError as error:
        possible = str(error).partition("possible: ")[2].split(", ")
        assert name not in possible and "taps" in possible
        for other in possible:
            with fc.algorithm(other): assert first(shape, weight, dtype, **kw).algorithm == other
    else: assert (run.algorithm, run.why) == (name, "forced")


def test_forced_ends_with_the_block():
    "Nested, and after an error."
    def name(): return first((1, 64, 9, 9), (64, 64, 3, 3)).algorithm
    before = name()
    with pytest.raises(KeyError), fc.algorithm("taps"):
        with fc.algorithm("taps"): assert name() == "taps"
        assert name() == "taps"
        raise KeyError
    assert name() == before


def test_failed_call_leaves_the_layer():
    "A forced algorithm that does not apply changes nothing."
    layer = fc.ConvTranspose2d(2, 3, 3, stride=2)
    before = dict(layer)
    with fc.algorithm("matmul"), pytest.raises(ValueError, match="not defined for this call"):
        layer(mx.zeros((1, 2, 5, 5)))
    assert dict(layer).keys() == before.keys() and layer(mx.zeros((1, 2, 5, 5))).shape[1] == 3


def test_gradients_take_what_is_defined():
    "The input gradient of a strided convolution is transposed, so no matrix product."
    with fc.algorithm("matmul"):
        runs = fc.explain(fc.Conv2d(3, 4, 3, stride=2), (1, 3, 9, 9))
    assert [run.part for run in runs] == ["forward", "input gradient", "weight gradient"]
    assert runs[0].algorithm == runs[2].algorithm == "matmul" != runs[1].algorithm


def test_explain_computes_nothing():
    "An input of a terabyte."
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    text = repr(fc.explain(fc.Conv2d(256, 256, 3), (16, 256, 2**13, 2**13)))
    assert mx.get_peak_memory() - before < 2**22
    assert text.count("\n") == 3 and "weight gradient" in text


@pytest.mark.parametrize("n", (1, 2, 3))
def test_transposed_without_a_stride_is_a_convolution(n):
    "Of a padded input, on GPUs; on CPUs no product meets padding."
    shape, weight = (8, 64) + (9,) * n, (64, 64) + (2,) * n
    assert first(shape, weight, output_padding=0).algorithm == "overlap_add"
    with as_on("metal"):
        assert first(shape, weight, output_padding=0).algorithm in ("native", "volume")


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("groups", (1, 2))
def test_flops(transposed, groups):
    "Two per product; what each input meets, or what each output sums."
    layer = (fc.ConvTranspose2d if transposed else fc.Conv2d)(4, 6, 3, stride=2, groups=groups)
    run = fc.explain(layer, (5, 4, 9, 9))[0]
    places = 9 * 9 if transposed else 4 * 4
    assert run.flops == 2 * 5 * places * 4 * 6 // groups * 9


def test_explain_raises_what_the_call_raises():
    "A wrong number of channels."
    with pytest.raises(RuntimeError, match="to have 4 channels"):
        fc.explain(fc.Conv2d(4, 6, 3), (1, 3, 9, 9))


def test_explain_raises_for_what_no_array_can_have():
    "A negative length."
    with pytest.raises(ValueError, match=r"input_shape must not be negative.*-9"):
        fc.explain(fc.Conv2d(4, 6, 3), (1, 4, -9, 9))


def test_tune_computes():
    "What it times is evaluated: there is room for input and output at some time."
    layer = fc.Conv1d(512, 512, 1, bias=False)
    mx.eval(layer.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fc.tune(layer, (1, 512, 64))
    assert mx.get_peak_memory() - before >= 2 * 512 * 64 * 4


@pytest.mark.parametrize("layer", (lambda: fc.Conv1d(2, 2, 3), lambda: fc.ConvTranspose1d(2, 2, 3, 2)))
def test_tune(layer):
    "Every possible algorithm is timed; that shape, and no other, runs the fastest afterwards."
    layer = layer()
    times = fc.tune(layer, (1, 2, 20))
    assert list(times.values()) == sorted(times.values())
    run = fc.explain(layer, (1, 2, 20))[0]
    assert (run.algorithm, run.why) == (next(iter(times)), "the fastest when tuned")
    assert "tuned" not in fc.explain(layer, (1, 2, 21))[0].why
    with fc.algorithm("taps"): assert fc.explain(layer, (1, 2, 20))[0].algorithm == "taps"


@pytest.mark.parametrize("last", (False, True))
def test_tune_gradients(torch, last):
    "What is kept is run, for that part only, and gives PyTorch's gradients."
    layer = fc.Conv2d(3, 5, 3, stride=2, data_format="channels_last" if last else "channels_first")
    shape = (2, 9, 8, 3) if last else (2, 3, 9, 8)
    before = fc.explain(layer, shape)
    by_part = {part: fc.tune(layer, shape, part=part) for part in ("input gradient", "weight gradient")}
    after = fc.explain(layer, shape)
    assert after[0] == before[0] and after[1].algorithm == next(iter(by_part["input gradient"]))
    best = next(iter(by_part["weight gradient"]))
    assert best == "convolution" or after[2].algorithm == best
    assert {"patches", "swapped", "convolution"} == set(by_part["weight gradient"])
    for name in by_part["weight gradient"]:
        (key,) = [key for key in choice._tuned if key[0] == "weight"]
        choice._tuned[key] = (name,)
        x = mx.random.normal(shape)
        dw = mx.grad(lambda w: (F.conv2d(x, w, stride=2, data_format=layer.data_format) ** 2).sum())(
            layer.weight)
        seen = np.array(mx.moveaxis(x, -1, 1) if last else x)
        w = torch.tensor(np.array(layer.weight), requires_grad=True)
        (torch.nn.functional.conv2d(torch.tensor(seen), w, stride=2) ** 2).sum().backward()
        assert np.allclose(np.array(dw), w.grad, atol=1e-3), name


@pytest.mark.parametrize("part", ("backward", None, "FORWARD"))
def test_tune_knows_its_parts(part):
    "Anything else is refused before anything is timed."
    with pytest.raises(ValueError, match="part must be one of forward, input gradient, weight grad"):
        fc.tune(fc.Conv1d(2, 2, 1), (1, 2, 5), part=part)


def test_tune_needs_one_convolution():
    "None, or two, and nothing is kept."
    layer = fc.Conv1d(2, 2, 1)
    for call, n in ((lambda x: x, 0), (lambda x: layer(layer(x)), 2)):
        with pytest.raises(ValueError, match=f"the call runs {n}"): fc.tune(call, (1, 2, 5))
    assert not choice._tuned


LONG = (1, 1, 8000), (1, 1, 101)  # input, weight: what FFT is faster for
FFT, DIRECT = {"fft"}, {*choice.ALGORITHMS, *choice.FOR_WEIGHTS} - {"fft"}


def ran(call, *args):
    "The names of all algorithms that a call runs, evaluated."
    token = choice_watchers.set((seen := [],))
    try: mx.eval(call(*args))
    finally: choice_watchers.reset(token)
    return {name for name, *_ in seen}


choice_watchers = choice.watchers


def long_arrays(): return (mx.random.normal(shape) for shape in LONG)


@pytest.fixture
def everywhere():
    "Whatever a test allows is taken back."
    yield fc.allow_fft_everywhere
    fc.allow_fft_everywhere(False)


def test_no_call_takes_fft_by_default():
    "Forward, gradients, and gradients of gradients of a long kernel."
    x, w = long_arrays()
    def loss(x, w): return (F.conv1d(x, w) ** 2).sum()
    def gradient(x, w): return mx.grad(loss, (0, 1))(x, w)
    assert ran(F.conv1d, x, w) <= DIRECT and ran(gradient, x, w) <= DIRECT
    assert ran(mx.grad(lambda x: gradient(x, w)[1].sum()), x) <= DIRECT


def test_a_block_allows_it():
    "In blocks that may lie in each other, until they end, and with an error too."
    x, w = long_arrays()
    with fc.allow_fft():
        assert ran(F.conv1d, x, w) == FFT
        with fc.allow_fft(False): assert ran(F.conv1d, x, w) <= DIRECT
        assert ran(F.conv1d, x, w) == FFT
    with pytest.raises(KeyError), fc.allow_fft(): raise KeyError
    assert ran(F.conv1d, x, w) <= DIRECT
    with fc.algorithm("fft"): assert ran(F.conv1d, x, w) == FFT
    with fc.allow_fft(), fc.algorithm("taps"): assert ran(F.conv1d, x, w) == {"taps"}


def test_it_is_allowed_everywhere(everywhere):
    "In threads as well, where no block says otherwise; a block is its thread's own."
    def here():
        x, w = long_arrays()
        with mx.stream(mx.new_stream(mx.cpu)): return ran(F.conv1d, x, w)
    def in_thread():
        with ThreadPoolExecutor(1) as pool: return pool.submit(here).result()
    with fc.allow_fft(): assert in_thread() <= DIRECT
    everywhere()
    assert here() == in_thread() == FFT
    with fc.allow_fft(False): assert here() <= DIRECT and in_thread() == FFT
    everywhere(False)
    assert here() <= DIRECT


@pytest.mark.parametrize("allow", (fc.allow_fft, fc.algorithm))
def test_gradients_of_a_call_are_allowed_what_it_was(allow):
    "The block is over when they are made; a call outside stays without, in the same gradient."
    x, w = long_arrays()
    def loss(x, w):
        with allow(*["fft"] * (allow is fc.algorithm)): y = F.conv1d(x, w)
        return (y * y).sum()
    def both(x, w): return loss(x, w) + F.conv1d(x[..., ::2], w).sum()
    assert ran(mx.grad(loss, (0, 1)), x, w) == FFT
    assert ran(mx.grad(lambda x: mx.grad(loss)(x, w).sum()), x) == FFT
    assert ran(mx.vmap(mx.grad(loss, (0, 1))), x[None], w[None]) == FFT
    seen = ran(mx.grad(both, (0, 1)), x, w)
    assert "fft" in seen and seen & DIRECT
    with fc.allow_fft():
        def without(x):
            with fc.allow_fft(False): return F.conv1d(x, w).sum()
        assert ran(mx.grad(without), x) <= DIRECT


def test_compiled_and_checkpointed():
    "A block inside the function counts at each trace, and for recomputing."
    x, w = long_arrays()
    def allowed(x):
        with fc.allow_fft(): return F.conv1d(x, w)
    assert ran(mx.compile(allowed), x) == FFT
    assert ran(mx.compile(lambda x: F.conv1d(x, w)), x) <= DIRECT
    assert ran(mx.grad(lambda x: mx.checkpoint(allowed)(x).sum()), x) == FFT
    def around(x):
        with fc.allow_fft(): y = mx.checkpoint(lambda x: F.conv1d(x, w))(x)
        return y.sum()
    right = mx.grad(lambda x: F.conv1d(x, w).sum())(x)
    assert mx.allclose(mx.grad(around)(x), right, atol=1e-4)


@pytest.mark.parametrize("wrong", (None, 1, "fft", mx.array(True)))
def test_allowed_is_a_bool(wrong):
    "Anything else is refused, and changes nothing."
    with pytest.raises(TypeError, match="allowed must be a bool"): fc.allow_fft_everywhere(wrong)
    with pytest.raises(TypeError, match="allowed must be a bool"):
        with fc.allow_fft(wrong): raise AssertionError
    assert not choice.fft_is_allowed()


def test_tune_ranks_what_is_allowed():
    "FFT is timed where it is allowed, and never in place where it isn't."
    f = partial(F.conv1d, weight=mx.random.normal((1, 1, 2000)))
    def runs(): return fc.explain(f, (1, 1, 8000))[0].algorithm
    assert "fft" not in fc.tune(f, (1, 1, 8000))
    with fc.allow_fft():
        assert runs() != "fft"  # it was not timed
        times = fc.tune(f, (1, 1, 8000))
        assert next(iter(times)) == "fft" == runs()
    assert runs() == list(times)[1]


def test_explain_says_what_fft_would_gain():
    "The operations of transforms, where they would be taken; by hand for one block of one signal."
    f = partial(F.conv1d, weight=mx.zeros(LONG[1]))
    forward, *_ = runs = fc.explain(f, LONG[0])
    rings, ring = -(-7900 // (432 - 100)), 432
    steps = 2.5 * ring * np.log2(ring) * (2 * rings + 1) + 4 * ring * rings
    assert forward.fft_flops == round(steps) < forward.flops / 3
    assert "by FFT" in repr(runs) and f"{steps / 1e6:.1f}" in repr(runs)
    with fc.allow_fft(): allowed = fc.explain(f, LONG[0])
    assert allowed[0].algorithm == "fft" and not allowed[0].fft_flops
    assert "by FFT" not in repr(allowed)
    with fc.algorithm("taps"): assert not fc.explain(f, LONG[0])[0].fft_flops
    assert "by FFT" not in repr(fc.explain(fc.Conv1d(1, 1, 3), (1, 1, 99)))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name):
    "A convolution is linear in each of its arrays; the derivative of a gradient is one, too."
    if name == "kernel": pytest.skip("test_kernels.py has its derivatives")
    transposed = name in ("overlap_add", "phases", "spread")
    more = (4,) * (name == "volume")  # which is for three axes
    f = getattr(F, f"conv{'_transpose' * transposed}{2 + len(more)}d")
    f = partial(f, stride=2)
    x, dx = (mx.random.normal((2, 3, 7, 6, *more)) for _ in "ab")
    w, dw = (mx.random.normal((3, 3, 3, 2, *more)) for _ in "ab")
    def gradient(x): return mx.grad(lambda x: (f(x, w) ** 2).sum())(x)
    with fc.algorithm(name):
        (y,), (change,) = mx.jvp(f, [x, w], [dx, dw])
        assert mx.allclose(y, f(x, w), atol=1e-5)
        assert mx.allclose(change, f(dx, w) + f(x, dw), atol=1e-4)
        for of, given, direction, expected in (
                (lambda x: f(x, w), x, dx, f(dx, w)), (lambda w: f(x, w), w, dw, f(x, dw)),
                (gradient, x, dx, gradient(dx))):
            (change,) = mx.jvp(of, [given], [direction])[1]
            assert mx.allclose(change, expected, atol=1e-3)


@pytest.mark.parametrize("name, shape, weight, kw", (
    ("matmul", (2, 16, 512, 512), (16, 16, 3, 3), {"padding": 1}),
    ("taps", (2, 64, 224, 224), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    ("overlap_add", (4, 32, 112, 112), (32, 16, 4, 4), {"stride": 2, "padding": 1})))
def test_workspace(name, shape, weight, kw):
    "At most 64 MiB beyond the arrays and the parts of the output, where columns would be 300 MB."
    f = F.conv_transpose2d if name == "overlap_add" else F.conv2d
    x, w = mx.random.normal(shape), mx.random.normal(weight)
    mx.eval(x, w)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with fc.algorithm(name): y = f(x, w, **kw)
    mx.eval(y)
    assert mx.get_peak_memory() - before - y.nbytes <= 2**26 + y.nbytes  # parts, put together


@pytest.mark.parametrize("shape, weight, stride", (
    ((1, 1026, 1000), (1026, 1, 1024), 256),  # spectra to sound
    ((1, 768, 7, 7), (768, 3, 32, 32), 32),  # tokens to patches
    ((1, 1, 25_000), (1, 1, 800), 400)))
def test_long_transposed_kernels_with_long_strides(shape, weight, stride):
    "Columns of the input with its zeros would be 1 TB, and asking for them ended the process."
    f = getattr(F, f"conv_transpose{len(shape) - 2}d")
    run = fc.explain(partial(f, weight=mx.zeros(weight), stride=stride), shape)[0]
    assert run.algorithm == "overlap_add"
    x, w = mx.random.normal(shape), mx.random.normal(weight)
    y = f(x, w, stride=stride)
    first = (x.reshape(*shape[:2], -1)[..., 0] @ w.reshape(weight[0], -1)).reshape(1, *weight[1:])
    corner = (..., *[slice(stride)] * (len(shape) - 2))
    assert mx.allclose(y[corner], first[corner], atol=1e-2)


@pytest.mark.parametrize("name", ("native", "matmul", "taps"))
def test_parts_of_nothing_but_padding(torch, monkeypatch, name):
    "Where it is longer than the kernel."
    monkeypatch.setattr(tiles, "WHOLE", 64)
    monkeypatch.setattr(tiles, "tile_bytes", lambda g: 16)
    x, w = mx.random.normal((1, 2, 5, 4)), mx.random.normal((3, 2, 2, 3))
    right = torch.nn.functional.conv2d(*(torch.tensor(np.array(a)) for a in (x, w)), padding=(9, 2))
    with fc.algorithm(name): y = F.conv2d(x, w, padding=(9, 2))
    assert np.allclose(y, right, atol=1e-5)


@pytest.mark.parametrize("n, kernel", (
    (1, (5,)), (2, (3, 3)), (2, (1, 4)), (2, (1, 1)), (3, (3, 3, 3)), (3, (2, 1, 3)), (3, (1, 1, 1))))
def test_weight_gradient_channels_last(torch, n, kernel):
    "Made of windows, or of the input itself, as they lie: PyTorch's."
    size = {1: (999,), 2: (33, 31), 3: (11, 9, 10)}[n]
    x, w = mx.random.normal((2, *size, 24)), mx.random.normal((20, 24, *kernel))
    kw = {"padding": tuple(k // 2 for k in kernel), "stride": (1,) * (n - 1) + (2,)}
    f = partial(getattr(F, f"conv{n}d"), data_format="channels_last", **kw)
    algorithm = "product" if max(kernel) == 1 else "patches"
    assert fc.explain(partial(f, weight=w), x.shape)[2].algorithm == algorithm
    theirs = torch.tensor(np.array(w), requires_grad=True)
    seen = torch.tensor(np.array(mx.moveaxis(x, -1, 1)))
    (getattr(torch.nn.functional, f"conv{n}d")(seen, theirs, **kw) ** 2).sum().backward()
    error = np.abs(np.array(mx.grad(lambda w: (f(x, w) ** 2).sum())(w)) - theirs.grad.numpy()).max()
    assert error <= 1e-4 * theirs.grad.abs().max()


@pytest.mark.parametrize("kw, shape, weight", (
    ({"stride": 160}, (1, 1, 10_000_000), (1, 1, 400)),
    ({"data_format": "channels_last"}, (1, 1024, 1024, 3), (8, 3, 3, 3)),
    ({"groups": 2, "padding": 1}, (2, 4, 512, 512), (4, 2, 3, 3))))
def test_native_in_parts(kw, shape, weight):
    "MLX writes all columns at once; cut, they give the same numbers in a part of the memory."
    f = getattr(F, f"conv{len(shape) - 2}d")
    x, w = mx.random.normal(shape), mx.random.normal(weight)
    with fc.algorithm("taps" if "groups" in kw else "matmul"): right = f(x, w, **kw)
    mx.eval(right, w)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with fc.algorithm("native"): y = f(x, w, **kw)
    mx.eval(y)
    assert mx.get_peak_memory() - before - y.nbytes <= 2**26 + 2**26 + y.nbytes
    assert mx.allclose(y, right, atol=1e-3)


def test_fft_is_not_cut_below_its_kernel():
    "A picture under a kernel of its size: one ring, not 64 nearly as large, which took 15 seconds."
    x, w = mx.random.normal((1, 1, 512, 1024)), mx.random.normal((1, 1, 512, 1024))
    seen, whole = [], fft._whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fft, "_whole", lambda *args: seen.append(args) or whole(*args))
        with fc.algorithm("fft"): mx.eval(F.conv2d(x, w, padding="same"))
    assert len(seen) <= 2


def test_few_windows_of_a_large_picture():
    "What a stride of 512 leaves out is not copied, as MLX's own convolution would: 192 MB here."
    x = mx.broadcast_to(mx.array(1.0), (1, 3, 2**16, 2**16))  # 52 GB, were it written out
    y = F.conv2d(x, mx.ones((8, 3, 3, 3)), stride=2**13, padding=0)
    assert y.shape == (1, 8, 8, 8) and mx.all(y == 27)


def ruled(size, weight, batch=1, groups=1, stride=1, dilation=1, dtype=mx.float32, gpu=False,
          blas=True, last=False, transposed=False, fft=True):
    "What runs for an input of `size` per axis on a machine that need not be this one, and why."
    n = len(size)
    channels = weight[0] if transposed else weight[1] * groups
    shape = (batch, *size, channels) if last else (batch, channels, *size)
    g = conv_geometry("conv", shape, weight, None, (stride,) * n, (0,) * n, (dilation,) * n, groups,
                      (0,) * n if transposed else None, last)
    return choice._rule(Call(g, weight, dtype, "metal" if gpu else "cpu", blas, False, fft))


BY_LAYOUT = "matmul", "native"  # channels first, channels last


@pytest.mark.parametrize("last", (False, True), ids=("channels first", "channels last"))
@pytest.mark.parametrize("name, why, size, weight, kw", (
    # Transforms, on both sides of their borders: taps, places, then work.
    ("fft", "a long kernel", (71,), (4, 8, 32), {"batch": 64}),
    ("native", "fewest copies", (71,), (4, 8, 31), {"batch": 64}),
    ("fft", "", (71,), (4, 8, 40), {"batch": 64}),
    ("native", "", (70,), (4, 8, 40), {"batch": 64}),
    ("fft", "", (19, 19), (2, 8, 10, 10), {"batch": 64}),
    ("native", "", (19, 19), (2, 8, 9, 11), {"batch": 64}),
    ("fft", "", (15, 15, 15), (2, 8, 5, 5, 5), {"batch": 64}),
    (BY_LAYOUT, "", (15, 15, 15), (2, 8, 4, 5, 5), {"batch": 64}),
    ("fft", "", (4096,), (64, 64, 33), {}), ("native", "", (1024,), (64, 64, 33), {}),
    ("fft", "", (66, 66), (64, 1, 11, 11), {"groups": 64}),
    ("native", "", (199,), (4, 8, 64), {"stride": 2, "batch": 64}),
    ("matmul", "", (199,), (4, 8, 64), {"dilation": 2, "batch": 64}),
    ("fft", "", (15, 15, 15), (16, 2, 6, 6, 6), {"blas": False}),
    # Fewer places than taps.
    ("native", "fewest copies", (5, 5), (8, 8, 4, 4), {}),
    ("matmul", "the windows", (67, 67), (64, 64, 65, 65), {}),
    # On GPUs.
    ("native", "MLX has a kernel", (600,), (5, 8, 256), {"gpu": True}),
    ("native", "MLX has a kernel", (63,), (4, 8, 32), {"gpu": True}),
    ("native", "MLX has a kernel", (9, 9), (64, 1, 3, 3), {"gpu": True, "groups": 64}),
    ("matmul", "", (9, 9), (4, 4, 3, 3), {"gpu": True, "dtype": mx.complex64}),
    # Transposed with a stride.
    ("overlap_add", "stamps", (9,), (4, 4, 256), {"transposed": True, "stride": 2}),
    ("overlap_add", "stamps", (9,), (4, 4, 257),
     {"transposed": True, "stride": 2, "dtype": mx.complex64}),
    ("taps", "a sum over taps", (9,), (4, 4, 3),
     {"transposed": True, "stride": 2, "dtype": mx.int32}),
    # One channel per group: few taps, rows long or short, then hundreds.
    ("taps", "a sum over taps", (56, 56), (128, 1, 3, 3), {"groups": 128, "fft": False}),
    ("taps", "", (56, 56), (96, 1, 7, 7), {"groups": 96, "fft": False}),
    ("taps", "", (8192,), (64, 1, 128), {"groups": 64, "fft": False}),
    ("taps", "", (86, 86), (64, 1, 31, 31), {"groups": 64, "fft": False}),
    ("matmul", "", (40,), (16, 1, 1), {"groups": 4}),
    # Groups, dilation, other dtypes, Netlib.
    ("taps", "", (9, 9), (4, 4, 3, 3), {"dtype": mx.int32}),
    ("matmul", "", (58, 58), (128, 4, 3, 3), {"groups": 32}),
    ("matmul", "", (9, 9), (8, 8, 2, 2), {"dilation": 2}),
    ("matmul", "", (9, 9), (8, 8, 3, 3), {"dtype": mx.complex64}),
    ("matmul", "", (45, 45), (256, 256, 3, 3), {"dilation": 6}),
    ("native", "", (9, 9), (8, 8, 3, 3), {"dtype": mx.bfloat16}),
    ("matmul", "", (16, 16), (64, 64, 1, 1), {}),
    ("matmul", "", (9,) * 3, (64, 64, 3, 3, 3), {"batch": 9, "dilation": 2}),
    ("matmul", "", (18, 18), (64, 64, 3, 3), {"blas": False}),
    ("native", "", (9, 9), (4, 4, 3, 3), {"blas": False}),
), ids=lambda v: str(v).replace(" ", "") if v != "" else "any")
def test_rule(name, why, size, weight, kw, last):
    "The rule at its borders, the same in both layouts."
    got, reason = ruled(size, weight, last=last, **kw)
    assert got == (name[last] if name is BY_LAYOUT else name) and why in reason


@pytest.mark.parametrize("size, weight, kw", (
    ((3000,), (384, 80, 3), {}),
    ((1500,), (512, 384, 3), {"stride": 2})))
def test_rule_that_tells_the_layouts_apart(size, weight, kw):
    "MLX's own convolution needs no transposes, channels last."
    assert ruled(size, weight, **kw)[0] == "matmul"
    assert ruled(size, weight, last=True, **kw)[0] == "native"


def test_a_new_algorithm_is_a_record_in_the_list(monkeypatch):
    "It can be forced, is chosen where it is the cheapest, and `explain` asks its record."
    best = choice.TAPS._replace(name="best", cost=lambda call: -1, held=lambda *_: 12, why="new")
    monkeypatch.setitem(choice.ALGORITHMS, "best", best)
    choice._rule.cache_clear()
    run = first((1, 2, 9, 9), (3, 2, 3, 3))
    assert (run.algorithm, run.why, run.workspace) == ("best", "new", 12)
    with fc.algorithm("best"): assert first((1, 2, 9, 9), (3, 2, 3, 3)).why == "forced"
    choice._rule.cache_clear()


def test_one_choice_for_a_call(monkeypatch):
    "Composed or not, it is chosen for once."
    asked = []
    rule = choice._rule
    monkeypatch.setattr(choice, "_rule", lambda call: asked.append(call) or rule(call))
    F.conv2d(mx.zeros((1, 2, 9, 9)), mx.zeros((3, 2, 3, 3)))
    F.conv_transpose2d(mx.zeros((1, 2, 9, 9)), mx.zeros((2, 3, 3, 3)))
    assert len(asked) == 2
