"""Plain operations: exported, and compiled once for inputs of every size, judged by PyTorch."""
import itertools
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import flashconv as fc
from flashconv import functional

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")

EXAMPLE = {1: (2, 4, 11), 2: (2, 4, 8, 9), 3: (1, 4, 6, 7, 8)}
OTHERS = {1: [(2, 4, 12), (5, 4, 13), (1, 4, 22)],
          2: [(2, 4, 9, 8), (3, 4, 13, 11), (1, 4, 10, 10)],
          3: [(2, 4, 7, 6, 9), (1, 4, 8, 9, 7)]}


def plainly(f):
    "`f` among plain operations, traced whenever MLX wants to."
    def run(*arrays):
        with fc.plain_operations(): return f(*arrays)
    return run


def compiled(f, *example):
    "`f` compiled for all sizes, by an example of one."
    g = mx.compile(plainly(f), shapeless=True)
    mx.eval(g(*example))
    return g


def exported(f, tmp_path, *example):
    "The same, by way of a file."
    mx.export_function(str(tmp_path / "f.mlxfn"), plainly(f), *example, shapeless=True)
    imported = mx.import_function(str(tmp_path / "f.mlxfn"))
    return lambda *arrays: imported(*arrays)[0]


def pair(name, *args, dtype=mx.float32, **kw):
    "A layer and PyTorch's, with the same weights."
    ours, theirs = getattr(fc, name)(*args, **kw), getattr(torch.nn, name)(*args, **kw)
    ours.load_state_dict({k: mx.array(v.detach().numpy()) for k, v in theirs.state_dict().items()})
    ours.set_dtype(dtype)
    mx.eval(ours.parameters())
    return ours, theirs


def close(ours, theirs, bound=2e-5):
    "Shape and values, to rounding."
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    distance = np.abs(np.array(ours.astype(mx.float32)) - theirs).max()
    assert distance <= bound * (1 + np.abs(theirs).max())


def gradients(theirs, x):
    "PyTorch's output and gradient of the input, for the sum of squares."
    x = torch.tensor(np.array(x), requires_grad=True)
    y = theirs(x)
    (y**2).sum().backward()
    return y, x.grad


CONV = [dict(zip(("kernel_size", "stride", "padding", "dilation", "groups"), of)) for of in [
    (1, 1, 0, 1, 1), (3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (2, 3, 0, 1, 1), (3, 1, 0, 2, 1),
    (3, 2, 3, 2, 1), (1, 3, 0, 1, 1), (1, 2, 2, 5, 1), (2, 5, 1, 3, 1), (3, 1, 1, 1, 2),
    (3, 2, 1, 1, 4), (2, 1, "same", 1, 1), (3, 1, "same", 2, 2), (4, 1, "valid", 1, 1),
    (3, 50, 1, 1, 1), (2, 1, 9, 1, 1)]]
TRANSPOSED = [dict(zip(("kernel_size", "stride", "padding", "output_padding", "groups", "dilation"),
                       of)) for of in [
    (1, 1, 0, 0, 1, 1), (3, 1, 1, 0, 1, 1), (4, 2, 1, 0, 1, 1), (3, 2, 1, 1, 1, 1),
    (3, 2, 0, 1, 1, 1), (2, 3, 0, 2, 1, 1), (3, 1, 1, 1, 1, 2), (3, 2, 2, 1, 1, 1),
    (1, 2, 1, 0, 1, 1), (1, 2, 1, 1, 1, 1), (2, 3, 3, 2, 1, 1), (1, 3, 2, 0, 1, 1),
    (3, 2, 4, 1, 1, 2), (3, 2, 1, 1, 2, 1), (2, 2, 0, 0, 4, 1),
    (2, 2, 2, 1, 2, 1), (1, 1, 2, 0, 1, 1), (2, 4, 0, 3, 1, 1)]]


def layers():
    for kind, n, kw in [*(("", n, kw) for n in (1, 2, 3) for kw in CONV),
                        *(("Transpose", n, kw) for n in (1, 2, 3) for kw in TRANSPOSED)]:
        if n == 3 and (kw["groups"] > 1 or kw["kernel_size"] == 1): continue  # refused; as in 2d
        yield pytest.param(f"Conv{kind}{n}d", kw, id=f"{kind}{n}-{kw}")


@pytest.mark.parametrize("name, kw", list(layers()))
def test_layers_compiled_for_all_sizes(name, kw):
    "Outputs and gradients of the input are PyTorch's, for other lengths and batches."
    n = int(name[-2])
    ours, theirs = pair(name, 4, 8, **kw)
    example = mx.random.normal(EXAMPLE[n])
    forward = compiled(ours, example)
    backward = compiled(mx.grad(lambda x: (ours(x)**2).sum()), example)
    for shape in [EXAMPLE[n], *OTHERS[n]]:
        x = mx.random.normal(shape)
        y, dx = gradients(theirs, x)
        close(forward(x), y)
        close(backward(x), dx)


@pytest.mark.parametrize("name, kw", list(layers())[::3])
def test_layers_exported_for_all_sizes(tmp_path, name, kw):
    "The same from a file."
    n = int(name[-2])
    ours, theirs = pair(name, 4, 8, **kw)
    run = exported(ours, tmp_path, mx.random.normal(EXAMPLE[n]))
    for shape in [EXAMPLE[n], *OTHERS[n]]:
        x = mx.random.normal(shape)
        close(run(x), theirs(torch.tensor(np.array(x))))


@pytest.mark.parametrize("name, kw", list(layers()))
def test_gradients_of_parameters(name, kw):
    "For one size they are there, and PyTorch's."
    n = int(name[-2])
    ours, theirs = pair(name, 4, 8, **kw)
    x = mx.random.normal(OTHERS[n][0])
    loss = plainly(nn.value_and_grad(ours, lambda x: (ours(x)**2).sum()))
    _, found = loss(x)
    gradients(theirs, x)
    for key, parameter in theirs.named_parameters():
        close(found[key], parameter.grad, {"weight": 1e-4, "bias": 1e-3}[key])  # MLX sums in a row


@pytest.mark.parametrize("mode", ("reflect", "replicate", "circular"))
@pytest.mark.parametrize("name", ("Conv1d", "Conv2d", "Conv3d"))
@pytest.mark.parametrize("kw", ({"padding": 2}, {"padding": 1, "stride": 2},
                                {"padding": "same", "dilation": 2}), ids=str)
def test_padding_modes(tmp_path, mode, name, kw):
    "They mirror, stop and go round at the border of each input, not at the example's."
    n = int(name[-2])
    ours, theirs = pair(name, 4, 3, 3, padding_mode=mode, **kw)
    example = mx.random.normal(EXAMPLE[n])
    forward, saved = compiled(ours, example), exported(ours, tmp_path, example)
    backward = compiled(mx.grad(lambda x: (ours(x)**2).sum()), example)
    for shape in OTHERS[n]:
        x = mx.random.normal(shape)
        y, dx = gradients(theirs, x)
        close(forward(x), y)
        close(saved(x), y)
        close(backward(x), dx)


@pytest.mark.parametrize("name, kw", [
    ("Conv1d", {}), ("Conv1d", {"stride": 2, "padding": 2}), ("Conv2d", {"padding": 5}),
    ("Conv1d", {"padding_mode": "circular", "padding": 1}),
    ("Conv2d", {"stride": 2, "padding": 1, "padding_mode": "replicate"}),
    ("ConvTranspose1d", {"stride": 3}), ("ConvTranspose2d", {"stride": 2, "output_padding": 1})],
    ids=str)
def test_an_example_of_single_values(tmp_path, name, kw):
    "One image of one channel, where sums and axes of one entry could be taken for none at all."
    n = int(name[-2])
    ours, theirs = pair(name, 1, 1, 1 if "Transpose" in name or not kw else 2, **kw)
    example = mx.random.normal((1, 1, *(1,) * n))
    runs = compiled(ours, example), exported(ours, tmp_path, example)
    backward = compiled(mx.grad(lambda x: (ours(x)**2).sum()), example)
    for shape in ((1, 1, 7), (3, 1, 4)):
        x = mx.random.normal(shape + (5,) * (n - 1))
        y, dx = gradients(theirs, x)
        for run in runs: close(run(x), y)
        close(backward(x), dx)


@pytest.mark.parametrize("mode", ("constant", "reflect", "replicate", "circular"))
@pytest.mark.parametrize("pad", ((2, 3), (0, 1), (-2, 1), (3, -1), (-1, -2), (2, 0, -1, 3)),
                         ids=str)
def test_pad(mode, pad):
    "PyTorch's, in every mode and direction."
    example = mx.random.normal((2, 3, 7, 8) if len(pad) > 2 else (2, 3, 7))
    f = compiled(lambda x: functional.pad(x, pad, mode), example)
    for longer in ((3, 2, 11, 9), (1, 5, 6, 6)):
        x = mx.random.normal(longer if len(pad) > 2 else longer[:3])
        close(f(x), torch.nn.functional.pad(torch.tensor(np.array(x)), pad, mode), 0)


@pytest.mark.parametrize("dtype", (mx.bool_, mx.int32, mx.uint8, mx.float16, mx.complex64), ids=str)
def test_pad_takes_every_dtype(dtype):
    "A row of ones between zeros, of any length."
    f = compiled(lambda x: functional.pad(x, (1, 2)), mx.ones((1, 3)).astype(dtype))
    found = f(mx.ones((2, 4)).astype(dtype))
    assert found.dtype == dtype and np.array(found).tolist() == [[0, 1, 1, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize("data_format", ("channels_first", "channels_last"))
@pytest.mark.parametrize("batched", (True, False))
@pytest.mark.parametrize("name", ("Conv2d", "ConvTranspose2d"))
def test_layouts(name, data_format, batched):
    "Channels last and without a batch."
    ours, theirs = pair(name, 4, 6, 3, 2, 1)
    ours.data_format = data_format
    last = data_format == "channels_last"
    def arranged(x): return mx.moveaxis(x, -3, -1) if last else x
    shapes = [shape if batched else shape[1:] for shape in (EXAMPLE[2], *OTHERS[2])]
    f = compiled(ours, arranged(mx.random.normal(shapes[0])))
    for shape in shapes:
        x = mx.random.normal(shape)
        y = f(arranged(x))
        close(mx.moveaxis(y, -1, -3) if last else y, theirs(torch.tensor(np.array(x))))


@pytest.mark.parametrize("dtype, bound", ((mx.float16, 4e-3), (mx.bfloat16, 3e-2)), ids=str)
@pytest.mark.parametrize("name", ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d",
                                  "ConvTranspose2d", "ConvTranspose3d"))
def test_half_precision(name, dtype, bound):
    "Rounded once, from sums in float32: many equal terms would show a sum in 16 bits."
    n = int(name[-2])
    ours, theirs = pair(name, 512, 2, 3, dtype=dtype)
    ours.weight = mx.full(ours.weight.shape, 2**-6, dtype)
    with torch.no_grad(): theirs.weight.fill_(2**-6)
    f = compiled(ours, mx.ones((1, 512, *(4,) * n), dtype))
    x = mx.ones((2, 512, *(5,) * n), dtype)
    assert f(x).dtype == dtype
    close(f(x), theirs(torch.tensor(np.array(x.astype(mx.float32)))), bound)


def test_a_value_is_seen_where_it_is_seen():
    "A NaN and an infinity reach what sees them, and nothing else."
    for ours, theirs in (pair("Conv1d", 1, 1, 2, 3), pair("ConvTranspose1d", 1, 1, 1, 2, 1),
                         pair("Conv1d", 1, 1, 3, 2, 2, padding_mode="reflect"),
                         pair("ConvTranspose1d", 1, 1, 3, 2, 0, 1)):
        f = compiled(ours, mx.zeros((1, 1, 9)))
        for bad, place in itertools.product((np.nan, np.inf), range(10)):
            x = np.ones((1, 1, 10), np.float32)
            x[0, 0, place] = bad
            expected = theirs(torch.tensor(x)).detach().numpy()
            assert (np.isfinite(np.array(f(mx.array(x)))) == np.isfinite(expected)).all()


def test_whole_models():
    "A model of both kinds of layers, lazy ones included, and a subclass with its own weight."
    class Standardised(fc.Conv2d):
        def __call__(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
    model = nn.Sequential(fc.LazyConv2d(8, 3, padding=1), nn.ReLU(),
                          Standardised(8, 8, 3, stride=2), nn.ReLU(),
                          fc.ConvTranspose2d(8, 2, 4, 2, 1))
    fc.materialize(model, mx.zeros((1, 3, 16, 16)))
    mx.eval(model.parameters())
    f = compiled(model, mx.random.normal((1, 3, 16, 16)))
    for shape in ((1, 3, 16, 16), (4, 3, 21, 18)):
        x = mx.random.normal(shape)
        assert mx.allclose(f(x), model(x), atol=1e-4)


@pytest.mark.parametrize("name", ("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"))
def test_wherever_mlx_compiles_we_do(name):
    "`upgrade` of a layer of mlx.nn, which compiles for all sizes itself."
    n = int(name[-2])
    theirs = getattr(nn, name)(4, 6, 3, stride=2, padding=1)
    ours = fc.upgrade(nn.Sequential(theirs))
    mx.eval(ours.parameters())
    example, other = mx.random.normal((1, *(9,) * n, 4)), mx.random.normal((3, *(12,) * n, 4))
    f, g = compiled(ours, example), mx.compile(theirs, shapeless=True)
    mx.eval(g(example))
    assert mx.allclose(f(other), g(other), atol=1e-5)


@pytest.mark.parametrize("kind", ("Conv2d", "ConvTranspose2d"))
def test_weights_with_other_strides(tmp_path, kind):
    "MLX writes the memory of constants as it lies; what came from `mlx.nn` lies channels last."
    model = fc.upgrade(nn.Sequential(getattr(nn, kind)(3, 4, 3)))
    x = mx.random.normal((2, 9, 8, 3))
    y = model(x)
    mx.eval(y)
    assert mx.allclose(exported(model, tmp_path, x)(x), y, atol=1e-5)
    each = mx.vmap(plainly(lambda x: model(x[None])[0]))
    for traced in (mx.compile(plainly(model)), each): assert mx.allclose(traced(x), y, atol=1e-5)
    def loss(w): return functional.conv2d(mx.ones((1, 4, 5, 5)), w).sum()
    gradient = mx.grad(plainly(loss))(mx.moveaxis(mx.ones((4, 3, 3, 4)), -1, 1))
    assert gradient.shape == (4, 4, 3, 3) and mx.all(gradient == 9)


def test_a_device_of_its_own(tmp_path):
    "The layer's device is no obstacle."
    layer = fc.Conv1d(2, 3, 3, device=mx.Device(mx.cpu))
    mx.eval(layer.parameters())
    x = mx.random.normal((2, 2, 9))
    assert mx.allclose(exported(layer, tmp_path, x[:1])(x), layer(x), atol=1e-5)


REFUSED = [
    (lambda: functional.conv1d(*(mx.ones((1, 1, 3)).astype(mx.complex64),) * 2), "complex64"),
    (lambda: functional.conv1d(*(mx.ones((1, 1, 3)).astype(mx.int32),) * 2), "int32"),
    (lambda: fc.Conv3d(2, 2, 1, groups=2)(mx.ones((1, 2, 1, 1, 1))), "groups=2 in 3d"),
    (lambda: fc.ConvTranspose3d(2, 2, 1, groups=2)(mx.ones((1, 2, 1, 1, 1))), "groups=2 in 3d"),
    (lambda: fc.ConvTranspose1d(2, 2, 3, 2)(mx.ones((1, 2, 4)), (10,)), r"output_size=\(10,\)"),
    (lambda: fc.Conv1d(2, 2, 3)(mx.ones((0, 2, 4))), r"size \[0, 2, 4\]"),
    (lambda: fc.Conv1d(0, 2, 3)(mx.ones((1, 0, 4))), r"size \[1, 0, 4\]"),
    (lambda: functional.pad(mx.ones((0, 2, 4)), (1, 1)), r"size \[0, 2, 4\]"),
    (lambda: fc.Conv1d(2, 2, 3, stride=2**40)(mx.ones((1, 2, 4))), "32 bits"),
    (lambda: fc.Conv1d(2, 2, 1, dilation=2**40, stride=2**31)(mx.ones((1, 2, 4))), "32 bits"),
]


@pytest.mark.parametrize("call, words", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(call, words):
    "By a NotImplementedError that names the mode and the value; outside the block it works."
    with pytest.raises(NotImplementedError, match=rf"plain_operations\(\) can't do .*{words}"):
        plainly(call)()
    call()


@pytest.mark.parametrize("mode, shortest", (("reflect", 4), ("circular", 3)))
def test_shorter_inputs_than_padding_needs(tmp_path, mode, shortest):
    "PyTorch refuses them at the call; here MLX does, whatever the example was."
    f = exported(lambda x: functional.pad(x, (3, 2), mode), tmp_path, mx.ones((1, 1, 9)))
    x = mx.arange(float(shortest))[None, None]
    close(f(x), torch.nn.functional.pad(torch.tensor(np.array(x)), (3, 2), mode), 0)
    with pytest.raises(ValueError, match="smaller than weight"): f(x[..., 1:])


def test_the_mode_ends_with_its_block_and_stays_in_its_thread(tmp_path):
    "Also after an exception."
    layer, x = fc.Conv1d(1, 1, 1), mx.ones((1, 1, 3))
    mx.eval(layer.parameters())
    def fails():
        try: mx.export_function(str(tmp_path / "layer.mlxfn"), layer, x)
        except (RuntimeError, ValueError): return True
    seen = []
    with pytest.raises(KeyError):
        with fc.plain_operations():
            thread = threading.Thread(target=lambda: seen.append(fails()))
            thread.start()
            thread.join()
            raise KeyError
    assert fails() and seen == [True]
