"""Who is measured: a layer of each framework, on arrays in the layout it likes.

PyTorch is imported where it is needed only: a layer's probe (see `timing.py`) does without.
"""
from functools import cached_property
from typing import NamedTuple

import flashconv
import mlx.core as mx
import mlx.nn
import numpy as np
from flashconv import blas, kernels

HAS_KERNELS = kernels.available()
FAST = blas.info().library if blas.fast() else None  # before anything is switched


def switch(which, in_kernels=True):
    "Have MLX multiply with the \"fast\" BLAS or the \"stock\" one; None leaves all alone."
    if which is None: return
    if HAS_KERNELS: kernels.use(in_kernels)
    if which == "fast" and FAST is None and blas.fast(): return  # macOS: nothing to replace
    if which == "fast" and FAST is None: raise ValueError("no fast BLAS was found")
    blas.use("off" if which == "stock" else FAST)


class Arrays(NamedTuple):
    "The input, the weight and the output's cotangent in PyTorch's layout, as NumPy arrays."
    x: np.ndarray
    w: np.ndarray
    cotangent: np.ndarray


def arrays(row):
    "Random numbers for a row, always the same ones; outputs are about 1."
    rng = np.random.default_rng(0)
    def draw(shape):
        a = rng.standard_normal(shape, np.float32)
        return a + 1j * rng.standard_normal(shape, np.float32) if "complex" in row.dtype else a
    spread = np.float32(np.prod(row.weight_shape[1:]) ** -0.5)
    return Arrays(draw(row.input_shape), draw(row.weight_shape) * spread, draw(row.output_shape))


def unpadded(row):
    "A layer's arguments where no layer pads in pairs: its input is padded before."
    sizes, options = row.arguments
    return sizes, {**options, "padding": 0} if row.pairs else options


class OnMLX:
    "A layer of flashconv or mlx.nn. A move is the (source, destination) of an axis of PyTorch's."

    def __init__(self, row, data, layer, move, move_weight, pairs=()):
        self.layer, self.moves, self.pairs = layer, (move, move, move_weight), pairs
        turn = zip((data.cotangent, data.x, data.w), self.moves)
        self.cotangent, self.x, self.w = (
            mx.array(np.ascontiguousarray(np.moveaxis(a, *m))).astype(getattr(mx, row.dtype))
            for a, m in turn)
        self.layer.weight = self.w
        mx.eval(self.cotangent, self.x, self.w)

    def _call(self, x, w):
        self.layer.weight = w
        return self._run(x)

    def _run(self, x):
        "The layer's output; with pairs, x is padded first, channels last."
        return self.layer(mx.pad(x, [(0, 0), *self.pairs, (0, 0)]) if self.pairs else x)

    def forward(self):
        "The output."
        y = self._run(self.x)
        mx.eval(y)
        return [y]

    def gradients(self):
        "The output and the gradients of the input and the weight."
        try: ys, gradients = mx.vjp(self._call, [self.x, self.w], [self.cotangent])
        finally: self.layer.weight = self.w
        mx.eval(ys, gradients)
        return [*ys, *gradients]

    def input_gradient(self):
        "That alone."
        gradients = mx.vjp(self._run, [self.x], [self.cotangent])[1]
        mx.eval(gradients)
        return gradients

    def weight_gradient(self):
        "That alone."
        try: gradients = mx.vjp(lambda w: self._call(self.x, w), [self.w], [self.cotangent])[1]
        finally: self.layer.weight = self.w
        mx.eval(gradients)
        return gradients

    def numpy(self, outputs):
        "What `forward` or `gradients` gave, in PyTorch's layout."
        wide = (a if a.dtype == mx.complex64 else a.astype(mx.float32) for a in outputs)
        return [np.moveaxis(np.array(a), to, of) for a, (of, to) in zip(wide, self.moves)]

    def workspace(self, run):
        "Bytes that a run holds at its peak beyond input, weight, cotangent and outputs."
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        outputs = run()
        return max(0, mx.get_peak_memory() - before - sum(a.nbytes for a in outputs))


class OnTorch:
    "A layer of PyTorch, in one of its memory formats."

    def __init__(self, row, data, memory_format, dtype):
        import torch
        self.torch = torch
        if memory_format == "channels_last":
            if row.axes == 1: raise ValueError("PyTorch has no such format in 1d")
            memory_format += "_3d" if row.axes == 3 else ""
        def tensor(a):
            a = torch.from_numpy(np.ascontiguousarray(a)).to(getattr(torch, dtype))
            return a.contiguous(memory_format=getattr(torch, memory_format))
        sizes, options = unpadded(row)
        self.widths = [n for pair in reversed(row.pairs or ()) for n in pair]  # last axis first
        self.layer = getattr(torch.nn, row.layer)(*sizes, **options, dtype=getattr(torch, dtype))
        self.layer.weight = torch.nn.Parameter(tensor(data.w))
        self.x, self.cotangent = tensor(data.x).requires_grad_(), tensor(data.cotangent)

    def forward(self):
        "The output."
        with self.torch.no_grad(): return [self._run()]

    def _run(self):
        pad = self.torch.nn.functional.pad
        return self.layer(pad(self.x, self.widths) if self.widths else self.x)

    def gradients(self):
        "The output and the gradients of the input and the weight."
        y = self._run()
        return [y, *self.torch.autograd.grad(y, (self.x, self.layer.weight), self.cotangent)]

    @cached_property
    def _output(self): return self._run()

    def input_gradient(self):
        "That alone, after a forward pass that is made once."
        return self.torch.autograd.grad(self._output, self.x, self.cotangent, retain_graph=True)

    def weight_gradient(self):
        "The same for the weight."
        return self.torch.autograd.grad(
            self._output, self.layer.weight, self.cotangent, retain_graph=True)

    def numpy(self, outputs):
        "What `forward` or `gradients` gave."
        single = (self.torch.float16, self.torch.bfloat16)
        return [(a.float() if a.dtype in single else a).detach().resolve_conj().numpy()
                for a in outputs]

    def workspace(self, run):
        "PyTorch doesn't tell on CPUs."


def reference(row, data):
    "The output and both gradients, by PyTorch in twice the precision."
    dtype = "complex128" if "complex" in row.dtype else "float64"
    judge = OnTorch(row, data, "contiguous_format", dtype)
    return judge.numpy(judge.gradients())


def _flashconv(data_format):
    def make(row, data):
        sizes, options = row.arguments
        layer = getattr(flashconv, row.layer)(*sizes, **options, data_format=data_format)
        move = (1, -1) if data_format == "channels_last" else (0, 0)
        return OnMLX(row, data, layer, move, (0, 0))
    return make


def _mlx(row, data):
    sizes, options = unpadded(row)
    layer = getattr(mlx.nn, row.layer)(*sizes, **options)
    return OnMLX(row, data, layer, (1, -1), (0 if row.transposed else 1, -1), row.pairs or ())


def _torch(memory_format):
    return lambda row, data: OnTorch(row, data, memory_format, row.dtype)


class Competitor(NamedTuple):
    "A column: a name, how its layer for a row is made, and the BLAS that it needs under MLX."
    name: str
    make: object
    blas: str | None = None
    kernels: bool = True  # whether flashconv's layers run in them
    probed: bool = False  # may take seconds or end the process: tried in another one first


COMPETITORS = (
    Competitor("flashconv", _flashconv("channels_first"), "fast"),
    Competitor("flashconv channels_last", _flashconv("channels_last"), "fast"),
    Competitor("flashconv, no kernels", _flashconv("channels_first"), "fast", kernels=False),
    Competitor("mlx.nn, fast BLAS", _mlx, "fast", probed=True),
    Competitor("mlx.nn", _mlx, "stock", probed=True),
    Competitor("PyTorch", _torch("contiguous_format")),
    Competitor("PyTorch channels_last", _torch("channels_last")),
)
