"""The C++ kernels on their own, against PyTorch in float64: python tests/kernel_harness.py --cases 1000 --flags "-mavx2 -mfma" """
import argparse
import ctypes
import hashlib
import random
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "flashconv" / "kernels" / "cpp"
KINDS = ("forward", "input gradient", "weight gradient", "bias gradient")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Three = ctypes.c_int64 * 3


class Convolution(ctypes.Structure):
    "conv.h's, field by field."
    _fields_ = [("kind", ctypes.c_int32), ("dtype", ctypes.c_int32), ("channels_last", ctypes.c_int32),
                ("batch", ctypes.c_int64), ("groups", ctypes.c_int64),
                ("in_channels", ctypes.c_int64), ("out_channels", ctypes.c_int64),
                *((name, Three) for name in ("input", "kernel", "output", "stride", "dilation", "padding"))]


class Threads(ctypes.Structure):
    "conv.h's."
    _fields_ = [("count", ctypes.c_int64), ("run", ctypes.c_void_p)]


def build(name, sources, flags, compiler="g++"):
    "A shared library of these sources, kept until they or the flags change."
    texts = "".join(path.read_text() for path in sorted([*SOURCE.glob("*"), *sources]))
    key = hashlib.sha256(f"{texts}{flags}{compiler}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"flashconv-{name}-{key}.so"
    if not target.exists():
        command = [compiler, "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags.split(),
                   *map(str, sources), "-o", str(target), "-lpthread"]
        subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


class Kernels:
    "The library compiled with `flags`, and a pool of `threads`."
    def __init__(self, flags="-O3 -march=native", threads=2, compiler="g++"):
        flags += " -fvisibility=hidden"
        self.function = build("kernels", [SOURCE / "kernels.cpp"], flags, compiler).flashconv_run
        self.pool = build("threads", [HERE / "kernel_threads.cpp"], "-O2")
        self.threads = Threads()
        self.start(threads)

    def start(self, threads):
        self.pool.threads_start(ctypes.byref(self.threads), ctypes.c_int64(threads))

    def __call__(self, convolution, first, second, bias, result):
        pointers = [ctypes.c_void_p(a.data_ptr() if a is not None else None)
                    for a in (first, second, bias, result)]
        code = self.function(ctypes.byref(convolution), *pointers, ctypes.byref(self.threads))
        assert code == 0, "out of memory"


class Layer:
    "A convolution's sizes; the arrays of its three sides have PyTorch's shapes."
    def __init__(self, batch, groups, inputs, outputs, input, kernel, stride, dilation, before, after):
        self.batch, self.groups, self.inputs, self.outputs = batch, groups, inputs, outputs
        self.input, self.kernel, self.stride, self.dilation = input, kernel, stride, dilation
        self.before, self.after, self.axes = before, after, len(input)
        self.output = tuple((i + b + a - d * (k - 1) - 1) // s + 1 for i, k, s, d, b, a
                            in zip(input, kernel, stride, dilation, before, after))
        self.x_shape = (batch, groups * inputs, *input)
        self.y_shape = (batch, groups * outputs, *self.output)
        self.w_shape = (groups * outputs, inputs, *kernel)

    def __repr__(self):
        return (f"Layer({self.batch}, {self.groups}, {self.inputs}, {self.outputs}, {self.input}, {self.kernel}, "
                f"{self.stride}, {self.dilation}, {self.before}, {self.after})")

    def convolution(self, kind, dtype, channels_last):
        "As conv.h has it: three axes, the leading ones of length 1."
        three = lambda values, filler: Three(*[filler] * (3 - self.axes), *values)
        return Convolution(kind, DTYPES.index(dtype), channels_last, self.batch, self.groups, self.inputs,
                           self.outputs, three(self.input, 1), three(self.kernel, 1), three(self.output, 1),
                           three(self.stride, 1), three(self.dilation, 1), three(self.before, 0))

    def torch(self, x, w):
        "What PyTorch computes; the padding is applied by itself since it may differ before and after."
        pads = [p for pair in zip(reversed(self.before), reversed(self.after)) for p in pair]
        function = getattr(torch.nn.functional, f"conv{self.axes}d")
        return function(torch.nn.functional.pad(x, pads), w, None, self.stride, 0, self.dilation, self.groups)


def run(kernels, layer, kind, arrays, bias=None, channels_last=False):
    "One kind of a layer from arrays (x, y, w) in PyTorch's formats; the result in PyTorch's format."
    x, y, w = arrays
    to = lambda a: a.movedim(1, -1).contiguous() if channels_last else a.contiguous()
    back = lambda a: a.movedim(-1, 1) if channels_last else a
    dtype = w.dtype
    convolution = layer.convolution(kind, dtype, channels_last)
    if kind == 0: first, second, result = to(x), w, torch.full_like(to(y), 77)
    if kind == 1: first, second, result = w, to(y), torch.full_like(to(x), 77)
    if kind == 2: first, second, result = to(x), to(y), torch.full_like(w, 77)
    if kind == 3: first, second, result = to(y), None, torch.full((y.shape[1],), 77, dtype=dtype)
    kernels(convolution, first, second, bias, result)
    return back(result) if kind < 2 else result


def expected(layer, kind, arrays, bias=None):
    "PyTorch's result in float64, and that of the magnitudes, which bounds what rounding may do."
    def compute(x, y, w, b):
        if kind == 3: return y.sum(dim=[0, *range(2, y.ndim)])
        shape = (1, -1, *[1] * layer.axes)
        if kind == 0: return layer.torch(x, w) + (b.reshape(shape) if b is not None else 0)
        x, w = x.clone().requires_grad_(kind == 1), w.clone().requires_grad_(kind == 2)
        gradient, = torch.autograd.grad(layer.torch(x, w), x if kind == 1 else w, y)
        return gradient + (b.reshape(shape) if kind == 1 and b is not None else 0)
    arrays = [a.double() for a in arrays]
    bias = bias.double() if bias is not None else None
    return compute(*arrays, bias), compute(*(a.abs() for a in arrays), bias.abs() if bias is not None else None)


def check(kernels, layer, kind, dtype, channels_last, whole, has_bias, generator):
    "Raises with the layer when a result is off by more than rounding."
    def draw(shape):
        if whole: return torch.randint(-8, 9, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)
    arrays = draw(layer.x_shape), draw(layer.y_shape), draw(layer.w_shape)
    bias = None
    if has_bias and kind < 2: bias = draw((layer.y_shape[1] if kind == 0 else layer.x_shape[1],))
    result = run(kernels, layer, kind, arrays, bias, channels_last)
    exact, magnitude = expected(layer, kind, arrays, bias)
    assert result.shape == exact.shape
    error = (result.double() - exact).abs()
    rounding = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    limit = 64 * 2**-24 * magnitude + rounding * exact.abs() + (2**-24 if dtype == torch.float16 else 1e-40)
    if whole and dtype == torch.float32: limit = torch.zeros_like(magnitude)
    assert (error <= limit).all(), (f"{KINDS[kind]}, {dtype}, {channels_last=}, {whole=}, {has_bias=}: error "
                                    f"{error.max():.3g} of {exact.abs().max():.3g}, {layer}")


def random_layer(chance):
    "Any layer, small enough for PyTorch's float64."
    axes = chance.choice((1, 1, 2, 2, 2, 3))
    groups = chance.choice((1, 1, 1, 2, 3, 8, 19))
    inputs = chance.choice((1, 1, 2, 3, 4, 5, 16, 40))
    outputs = chance.choice((1, 1, 2, 4, 6, 7, 12, 17, 24))
    longest = {1: chance.choice((7, 7, 7, 300)), 2: chance.choice((5, 7, 20)), 3: 3}[axes]
    if longest > 7: inputs, outputs = min(inputs, 3), min(outputs, 4)
    kernel = tuple(chance.randint(1, longest) for _ in range(axes))
    dilation = tuple(chance.choice((1, 1, 2, 3, 9)) for _ in range(axes))
    stride = tuple(chance.choice((1, 1, 2, 3, 4, 7)) for _ in range(axes))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    before = tuple(chance.choice((0, chance.randint(0, span + 2))) for span in spans)
    after = tuple(chance.choice((b, chance.randint(0, span + 2))) for b, span in zip(before, spans))
    most = {1: chance.choice((30, 400)), 2: chance.choice((9, 40)), 3: 10}[axes]
    input = tuple(max(1, span - b - a) + chance.randint(0, most)
                  for span, b, a in zip(spans, before, after))
    return Layer(chance.randint(1, 3), groups, inputs, outputs, input, kernel, stride, dilation, before, after)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flags", default="-O3 -march=native")
    parser.add_argument("--compiler", default="g++")
    options = parser.parse_args()
    kernels = Kernels(options.flags, options.threads, options.compiler)
    chance, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    for _ in range(options.cases):
        layer = random_layer(chance)
        for kind in range(4):
            dtype = chance.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16))
            check(kernels, layer, kind, dtype, chance.random() < .5, chance.random() < .3, chance.random() < .5,
                  generator)
    print(f"{options.cases} layers as PyTorch computes them")


if __name__ == "__main__": main()
