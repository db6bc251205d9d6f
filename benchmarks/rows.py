"""What is measured: one row a layer, as data."""
from math import prod
from typing import NamedTuple


class Row(NamedTuple):
    "A convolution without bias, and the input it is given."
    name: str
    kind: str  # the class that a floor may be set for, see report.py
    input_shape: tuple  # (N, in_channels, *spatial)
    out_channels: int
    kernel_size: tuple
    stride: int | tuple = 1
    padding: int | tuple | str = 0  # a number, one per axis, pairs (before, after), or 'causal'
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    dtype: str = "float32"

    @property
    def axes(self):
        "How many axes the kernel slides over."
        return len(self.kernel_size)

    @property
    def layer(self):
        "The layer's name, the same in PyTorch, mlx.nn and flashconv."
        return f"Conv{'Transpose' if self.transposed else ''}{self.axes}d"

    @property
    def arguments(self):
        "What the layer is built with; dilation and groups only where they are not 1."
        options = {"stride": self.stride, "padding": self.padding, "bias": False}
        if self.dilation > 1: options["dilation"] = self.dilation
        if self.groups > 1: options["groups"] = self.groups
        kernel_size = self.kernel_size if self.axes > 1 else self.kernel_size[0]
        return (self.input_shape[1], self.out_channels, kernel_size), options

    @property
    def pairs(self):
        "Zeros (before, after) per axis where the two may differ; None for other paddings."
        if self.padding == "causal": return ((self.dilation * (self.kernel_size[0] - 1), 0),)
        is_paired = isinstance(self.padding, tuple) and isinstance(self.padding[0], tuple)
        return self.padding if is_paired else None

    @property
    def weight_shape(self):
        "PyTorch's."
        first, second = self.input_shape[1], self.out_channels
        if not self.transposed: first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @property
    def output_shape(self):
        "PyTorch's."
        padded = map(sum, self.pairs or zip(*[self._per_axis(self.padding)] * 2))
        axes = zip(self.input_shape[2:], self.kernel_size, self._per_axis(self.stride), padded)
        return (self.input_shape[0], self.out_channels, *(self._length(*axis) for axis in axes))

    @property
    def products(self):
        "Multiplications that the definition of a forward pass has."
        places = self.input_shape if self.transposed else self.output_shape
        return places[0] * prod(places[2:]) * prod(self.weight_shape)

    def _per_axis(self, value):
        return value if isinstance(value, tuple) else (value,) * self.axes

    def _length(self, i, k, stride, padded):
        span = self.dilation * (k - 1) + 1
        if self.transposed: return (i - 1) * stride - padded + span
        return (i + padded - span) // stride + 1


ROWS = (
    Row("7x7 s2, 3->64 @224", "strided", (1, 3, 224, 224), 64, (7, 7), stride=2, padding=3),
    Row("3x3, 64 @56", "dense", (1, 64, 56, 56), 64, (3, 3), padding=1),
    Row("3x3, 64 @56, N=4", "dense", (4, 64, 56, 56), 64, (3, 3), padding=1),
    Row("3x3 s2, 64->128 @56", "strided", (1, 64, 56, 56), 128, (3, 3), stride=2, padding=1),
    Row("1x1, 256->64 @56", "dense", (1, 256, 56, 56), 64, (1, 1)),
    Row("3x3, 512 @7", "dense", (1, 512, 7, 7), 512, (3, 3), padding=1),
    Row("7x7, 32 @56", "dense", (1, 32, 56, 56), 32, (7, 7), padding=3),
    Row("1d K=3, 80->384, L=3000", "dense", (1, 80, 3000), 384, (3,), padding=1),
    Row("3x3, 256 @14, N=32", "dense", (32, 256, 14, 14), 256, (3, 3), padding=1),
    Row("1x1, 2048->512 @7, N=8", "dense", (8, 2048, 7, 7), 512, (1, 1)),
    Row("3x3, 17->7 @40, N=3", "dense", (3, 17, 40, 40), 7, (3, 3), padding=1),
    Row("5x5, 3->17 @96", "dense", (1, 3, 96, 96), 17, (5, 5), padding=2),
    Row("1d K=64, 64 ch, L=8192", "dense", (1, 64, 8192), 64, (64,), padding=32),
    Row("3x3x3, 32 @8x28x28", "dense", (1, 32, 8, 28, 28), 32, (3, 3, 3), padding=1),
    Row("1d K=257 s4, 1->64, L=48,000", "strided", (1, 1, 48000), 64, (257,), stride=4),
    Row("1d K=10 s5, 1->512, L=16,000", "strided", (1, 1, 16000), 512, (10,), stride=5),
    Row("3x7x7 s1,2,2, 3->64 @8x112x112", "strided", (1, 3, 8, 112, 112), 64, (3, 7, 7),
        stride=(1, 2, 2), padding=(1, 3, 3)),
    Row("3x3 d2, 64 @56", "dilated", (1, 64, 56, 56), 64, (3, 3), padding=2, dilation=2),
    Row("3x3 d6, 128 @33", "dilated", (1, 128, 33, 33), 128, (3, 3), padding=6, dilation=6),
    # Padded on one side: PyTorch and mlx.nn pad first, as their users have to.
    Row("1d K=7 d9 causal, 64 ch, L=8192", "one side", (1, 64, 8192), 64, (7,), padding="causal",
        dilation=9),
    Row("3x3 s2 (0, 1), 32->64 @112", "one side", (1, 32, 112, 112), 64, (3, 3), stride=2,
        padding=((0, 1), (0, 1))),
    Row("3x3x3 (2, 0) in time, 32 @8x28x28", "one side", (1, 32, 8, 28, 28), 32, (3, 3, 3),
        padding=((2, 0), (1, 1), (1, 1))),
    Row("transposed k2 s2, 128->64 @28", "transposed", (1, 128, 28, 28), 64, (2, 2), stride=2,
        transposed=True),
    Row("transposed k4 s2, 256->128 @8, N=4", "transposed", (4, 256, 8, 8), 128, (4, 4), stride=2,
        padding=1, transposed=True),
    Row("transposed k64 s32, 21 @10x15", "transposed", (1, 21, 10, 15), 21, (64, 64), stride=32,
        padding=16, transposed=True),
    Row("transposed k16 s8, 21 @40x60", "transposed", (1, 21, 40, 60), 21, (16, 16), stride=8,
        padding=4, transposed=True),
    Row("transposed 1d k16 s8, 256->128, L=200", "transposed", (1, 256, 200), 128, (16,),
        stride=8, padding=4, transposed=True),
    Row("3x3 g32, 128 @56", "grouped", (1, 128, 56, 56), 128, (3, 3), padding=1, groups=32),
    Row("depthwise 3x3, 128 @56", "few taps", (1, 128, 56, 56), 128, (3, 3), padding=1,
        groups=128),
    Row("depthwise 3x3, 128 @56, N=8", "few taps", (8, 128, 56, 56), 128, (3, 3), padding=1,
        groups=128),
    Row("depthwise 3x3 s2, 128 @56", "few taps", (1, 128, 56, 56), 128, (3, 3), stride=2,
        padding=1, groups=128),
    Row("depthwise 3x3x3, 32 @8x28x28", "few taps", (1, 32, 8, 28, 28), 32, (3, 3, 3), padding=1,
        groups=32),
    Row("depthwise 7x7, 96 @56", "many taps", (1, 96, 56, 56), 96, (7, 7), padding=3, groups=96),
    Row("depthwise 31x31, 32 @56", "many taps", (1, 32, 56, 56), 32, (31, 31), padding=15,
        groups=32),
    Row("depthwise 1d K=128, 64 ch, L=8192", "long", (1, 64, 8192), 64, (128,), padding=64,
        groups=64),
    Row("depthwise 1d K=1024, 64 ch, L=8192", "long", (1, 64, 8192), 64, (1024,), padding=512,
        groups=64),
    # As long as the input, and padded for causality: a framework's user cuts the second half off.
    Row("depthwise 1d K=8192, 16 ch, L=8192", "long", (1, 16, 8192), 16, (8192,), padding=8191,
        groups=16),
    *(Row(f"3x3, 64 @56, {dtype}", "dense", (1, 64, 56, 56), 64, (3, 3), padding=1, dtype=dtype)
      for dtype in ("float16", "bfloat16", "complex64")),
    Row("depthwise 3x3, 128 @56, float16", "few taps", (1, 128, 56, 56), 128, (3, 3), padding=1,
        groups=128, dtype="float16"),
    Row("tiny: 3x3, 8 @8", "tiny", (1, 8, 8, 8), 8, (3, 3), padding=1),
)
