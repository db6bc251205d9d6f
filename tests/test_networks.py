"""Eleven networks, carried over from PyTorch through a file: outputs, gradients and training.

The judge is PyTorch in float64. Each of a network's L layers rounds, and independent roundings add
up like the root of their number. So a result may be off, relative to the judge's, by 4 sqrt(L) eps
and three times what PyTorch itself is off in the same dtype, in the Euclidean norm and in the
largest element. The second term stands for what a network makes of a rounding on its way: a norm
divides by small deviations, half precision loses most in the gradients.
"""
import io
import re
import sys
from collections import defaultdict
from copy import deepcopy
from math import sqrt
from pathlib import Path

import flashconv
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import networks as N

T = torch.nn
torch.set_num_threads(1)  # a process per core
# Full depth, and few channels where many would only take time.
CASES = {
    "ResNet-18": (lambda: N.resnet18(channels=16, classes=10), (1, 3, 64, 64)),
    "ResNet-50": (lambda: N.resnet50(channels=16, classes=10), (1, 3, 64, 64)),
    "ResNeXt-50": (lambda: N.resnet(N.bottleneck, (3, 4, 6, 3), channels=16, groups=8, width=2),
                   (1, 3, 64, 64)),
    "MobileNetV2": (lambda: N.mobilenet_v2(scale=2, classes=10), (1, 3, 64, 64)),
    "ConvNeXt-T": (lambda: N.convnext(channels=16, classes=10), (1, 3, 64, 64)),
    "U-Net": (lambda: N.unet(channels=(8, 16, 32, 64, 128)), (1, 1, 32, 48)),
    "ASPP": (lambda: N.aspp(64, 16), (1, 64, 33, 29)),
    "DCGAN": (lambda: N.dcgan(128), (2, 100, 1, 1)),
    "WaveNet": (lambda: N.WaveNet(2, 8, 16, 32, 24), (1, 24, 300)),
    "ResNet-18 3d": (lambda: N.r3d18(8, 10), (1, 3, 8, 32, 32)),
    "Whisper": (lambda: N.whisper_stem(80, 64), (2, 80, 101)),
}
FIRST = ("ResNet-18", "DCGAN", "WaveNet", "ResNet-18 3d", "Whisper")
EPS = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
PUBLISHED = {"ResNet-18": 11.69, "ResNet-50": 25.56, "ResNeXt-50 32x4d": 25.03,
             "MobileNetV2": 3.50, "ConvNeXt-T": 28.59, "U-Net": 31.03, "ResNet-18 3d": 33.37}


def network(name, smooth=False):
    """A network and an input, the same at each call.

    `smooth` replaces ReLU and max pooling: their gradients jump, and among millions of values there
    are some so near to the jump that a rounding decides.
    """
    make, shape = CASES[name]
    torch.manual_seed(0)
    theirs = N.stir(make())
    for module in theirs.modules() if smooth else ():
        for key, child in module.named_children():
            if isinstance(child, (T.ReLU, T.ReLU6)): setattr(module, key, T.ELU())
            if isinstance(child, T.MaxPool2d):
                setattr(module, key, T.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return theirs, torch.randn(shape)


def carried_over(theirs, file, data_format="channels_last"):
    "The network in MLX with other weights, into which `theirs` were read from a file."
    other = deepcopy(theirs)
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()): value.zero_()
    ours = flashconv.convert_model(other, data_format=data_format, modules=N.COUNTERPARTS)
    if file.suffix == ".pt": torch.save(theirs.state_dict(), file)
    else: save_file(theirs.state_dict(), file)
    assert flashconv.load_torch_state(ours, file) == ([], [])
    return ours


def to_mlx(tensor, dtype, last):
    if last and tensor.ndim > 2: tensor = tensor.movedim(1, -1)
    return mx.array(tensor.detach().contiguous().numpy()).astype(getattr(mx, dtype))


def to_torch(array, last):
    tensor = torch.from_numpy(np.array(array.astype(mx.float32)))
    return tensor.movedim(-1, 1) if last and tensor.ndim > 2 else tensor


def by_torch(theirs, x, cotangent, dtype):
    "Output, gradient of the input and gradients of the parameters, by name."
    theirs, dtype = deepcopy(theirs).to(getattr(torch, dtype)), getattr(torch, dtype)
    x = x.detach().to(dtype).requires_grad_()
    y = theirs(x)
    if cotangent is None: return {"output": y.detach()}
    y.backward(cotangent.to(dtype))
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad
                 for name, p in theirs.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **gradients}


def by_mlx(ours, x, cotangent, dtype, last):
    "The same by a converted network."
    ours.set_dtype(getattr(mx, dtype))
    x = to_mlx(x, dtype, last)
    if cotangent is None: return {"output": to_torch(ours(x), last)}
    parameters = ours.trainable_parameters()
    def call(parameters, x): return ours.update(parameters)(x)
    def loss(parameters, x): return (call(parameters, x) * to_mlx(cotangent, dtype, last)).sum()
    _, (gradients, toward_x) = mx.value_and_grad(loss, argnums=(0, 1))(parameters, x)
    y = call(parameters, x)
    named = flashconv.to_torch_state(ours.update(gradients))
    return {"output": to_torch(y, last), "input": to_torch(toward_x, last), **named}


def assert_close(ours, theirs, exact, layers, eps):
    for name, right in exact.items():
        for order in (2, float("inf")):
            size = right.norm(order)
            off, allowed = ((a[name].double() - right).norm(order) for a in (ours, theirs))
            allowed = 3 * allowed + 4 * sqrt(layers) * eps * size
            assert ours[name].shape == right.shape and off <= allowed, (
                f"{name}: {off / size:.2e} of the largest, {allowed / size:.2e} allowed")


def compare(name, file, dtypes, gradients, data_format="channels_last"):
    theirs, x = network(name, smooth=gradients)
    layers = sum(not list(module.children()) for module in theirs.modules())
    cotangent, last = None, data_format == "channels_last"
    if gradients:
        with torch.no_grad(): cotangent = torch.randn_like(theirs(x))
    exact = by_torch(theirs, x, cotangent, "float64")
    if gradients:  # scaled, as one does in half precision, so that small ones are not lost
        largest = max(value.abs().max() for key, value in exact.items() if key != "output")
        cotangent = cotangent * 2 ** torch.floor(torch.log2(2**10 / largest)).item()
        exact = by_torch(theirs, x, cotangent, "float64")
    for dtype in dtypes:
        results = by_mlx(carried_over(theirs, file, data_format), x, cotangent, dtype, last)
        assert_close(results, by_torch(theirs, x, cotangent, dtype), exact, layers, EPS[dtype])


@pytest.mark.parametrize("name", CASES)
def test_outputs(name, tmp_path): compare(name, tmp_path / "a.safetensors", EPS, False)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, tmp_path): compare(name, tmp_path / "a.pt", EPS, True)


@pytest.mark.parametrize("name", FIRST)
def test_channels_first(name, tmp_path):
    "Counterparts that name no axis serve channels first as well."
    compare(name, tmp_path / "a.safetensors", ("float32",), True, "channels_first")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    "The parameters that the papers, and everybody since, count."
    with torch.device("meta"): theirs = N.NETWORKS[name][0]()
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6, 2) == PUBLISHED[name]


@pytest.mark.parametrize("name", N.NETWORKS)
def test_full_size_converts(name, tmp_path):
    "Every network of the page, as large as it is, goes through a file bit for bit."
    theirs = N.NETWORKS[name][0]()
    ours = flashconv.convert_model(theirs, data_format="channels_last", modules=N.COUNTERPARTS)
    flashconv.save_torch_state(ours, tmp_path / "a.safetensors")
    before = deepcopy(theirs.state_dict())
    with torch.no_grad():
        for value in (*theirs.parameters(), *theirs.buffers()): value.zero_()
    theirs.load_state_dict(load_file(tmp_path / "a.safetensors"))
    for key, value in theirs.state_dict().items(): assert torch.equal(value, before[key]), key


def losses_of_torch(theirs, x, target, steps):
    optimizer = torch.optim.SGD(theirs.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        loss = (theirs(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def losses_of_mlx(ours, x, target, steps):
    optimizer = mlx.optimizers.SGD(0.01, momentum=0.9, weight_decay=1e-3)
    step = nn.value_and_grad(ours, lambda x: (ours(x) - target).square().mean())
    for _ in range(steps):
        loss, gradients = step(x)
        optimizer.update(ours, gradients)
        yield loss.item()


@pytest.mark.parametrize("name", ("ResNet-18", "U-Net", "WaveNet"))
def test_fine_tuning(name, tmp_path):
    """Six steps in training mode: the losses are PyTorch's, and so are the statistics after them.

    With these pictures no value of ResNet-18's lies so near the kink of a ReLU that rounding takes
    it across. One that does moves a loss by 0.3%, whichever algorithm runs.
    """
    theirs, x = network(name)
    torch.manual_seed(1)
    x = torch.randn_like(x)
    x = torch.cat([x, x.flip(-1), -x])
    ours = carried_over(theirs, tmp_path / "a.safetensors").train()
    with torch.no_grad(): target = torch.tanh(torch.randn_like(theirs(x)))
    theirs.train()
    right = list(losses_of_torch(theirs, x, target, 6))
    assert right[-1] < 0.99 * right[0]
    losses = list(losses_of_mlx(ours, to_mlx(x, "float32", True), to_mlx(target, "float32", True), 6))
    np.testing.assert_allclose(losses, right, 1e-3)
    for key, value in flashconv.to_torch_state(ours).items():
        if "running" in key:
            torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-2, atol=1e-3)


def transposes(model, x):
    "How many transposes lie on the ways from `x` to the output of a call."
    mx.eval(model.parameters(), x)
    mx.export_to_dot(text := io.StringIO(), model(x), x=x)
    label = dict(re.findall(r'\{ (\d+) \[label ="(\w+)"', text.getvalue()))
    after, reached, ahead = defaultdict(list), set(), ["x"]
    for a, b in re.findall(r'^"?(\w+)"? -> "?(\w+)"?$', text.getvalue(), re.M): after[a].append(b)
    while ahead:
        node = ahead.pop()
        if node in reached: continue
        reached.add(node)
        ahead += after[node]
    return sum(label.get(node) == "Transpose" for node in reached)


def test_nothing_is_transposed_between_layers():
    "Channels last, convolution, norm, activation, pooling and addition leave the order as it is."
    theirs = T.Sequential(
        N.unit(16, 16, 3), T.MaxPool2d(2), T.Dropout2d(0.1), N.unit(16, 16, 3, groups=16),
        T.GroupNorm(4, 16), N.Residual(N.unit(16, 16, 1, act=None)), T.AvgPool2d(2),
        T.Upsample(scale_factor=2), T.Conv2d(16, 32, 3, 1, 1), T.PixelShuffle(2), T.ReflectionPad2d(1),
        T.AdaptiveAvgPool2d(2))
    last = flashconv.convert_model(theirs, data_format="channels_last", modules=N.COUNTERPARTS)
    alone, x = 0, mx.zeros((1, 32, 32, 16))
    for layer in last.layers:
        alone += transposes(layer, x)
        x = layer(x)
    assert transposes(last, mx.zeros((1, 32, 32, 16))) <= alone
    first = flashconv.convert_model(theirs, modules=N.COUNTERPARTS)
    assert transposes(first, mx.zeros((1, 16, 32, 32))) > alone + 5


@pytest.mark.parametrize("layer", (
    T.Conv2d(16, 16, 3, padding=1), T.Conv2d(16, 16, 3, padding=1, groups=16), T.BatchNorm2d(16),
    T.ReLU(), T.MaxPool2d(3, 2, 1), T.AvgPool2d(3, 2, 1), T.Dropout2d(0.5),
    T.Upsample(scale_factor=2), T.AdaptiveAvgPool2d(1), T.ReplicationPad2d(2)), ids=repr)
def test_no_layer_transposes(layer):
    "Nor do those that networks are made of inside, on pictures of some size."
    ours = flashconv.convert_model(layer, data_format="channels_last")
    assert transposes(ours, mx.zeros((1, 64, 64, 16))) == 0
