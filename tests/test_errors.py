"""Mistakes: each is made in PyTorch and here, in one and the same expression.

The exception is of PyTorch's type (or a subtype) and carries the core of PyTorch's words. Nothing
ends the process, and a failed call changes no layer.
"""
import json
import re
import subprocess
import sys
import types

import mlx.core as mx
import numpy as np
import pytest

import flashconv
import flashconv.functional

torch = pytest.importorskip("torch", reason="PyTorch, the judge, is not installed")

THEIRS = types.SimpleNamespace(nn=torch.nn, F=torch.nn.functional, ones=lambda *s: torch.ones(*s),
                               half=torch.float16, int=torch.int32,
                               cast=lambda a, dtype: a.to(dtype))
OURS = types.SimpleNamespace(nn=flashconv, F=flashconv.functional, ones=lambda *s: mx.ones(s),
                             half=mx.float16, int=mx.int32, cast=mx.array.astype)


def assert_refused(mistake, error, words):
    "`mistake(library)` raises `error` in both libraries, with `words` in ours and in PyTorch's."
    with pytest.raises(error) as theirs: mistake(THEIRS)
    with pytest.raises(error) as ours: mistake(OURS)
    assert words in str(ours.value), f"{words!r} is not in {str(ours.value)!r}"
    assert words in str(theirs.value), f"PyTorch says {str(theirs.value)!r}"


CONSTRUCTION = [  # ValueError, in the order of the checks
    (lambda L: L.nn.Conv2d(4, 4, 3, groups=0), "groups must be a positive integer"),
    (lambda L: L.nn.Conv2d(4, 4, 3, groups=-2), "groups must be a positive integer"),
    (lambda L: L.nn.Conv2d(3, 4, 3, groups=2), "in_channels must be divisible by groups"),
    (lambda L: L.nn.Conv2d(4, 3, 3, groups=2), "out_channels must be divisible by groups"),
    (lambda L: L.nn.ConvTranspose1d(4, 3, 3, groups=2), "out_channels must be divisible by groups"),
    (lambda L: L.nn.LazyConv3d(4, 3, groups=0), "groups must be a positive integer"),
    (lambda L: L.nn.Conv1d(4, 4, 3, padding="foo"),
     "Invalid padding string 'foo', should be one of {"),
    (lambda L: L.nn.LazyConv1d(4, 3, padding="foo"),
     "Invalid padding string 'foo', should be one of {"),
    (lambda L: L.nn.Conv1d(4, 4, 3, 2, padding="same"),
     "padding='same' is not supported for strided convolutions"),
    (lambda L: L.nn.Conv3d(4, 4, 3, (1, 1, 2), "same"),
     "padding='same' is not supported for strided convolutions"),
    (lambda L: L.nn.Conv2d(4, 4, 3, padding_mode="xyz"), "padding_mode must be one of {"),
    (lambda L: L.nn.Conv2d(4, 4, 3, padding_mode="xyz"), "but got padding_mode='xyz'"),
    (lambda L: L.nn.ConvTranspose2d(4, 4, 3, padding_mode="circular"),
     'Only "zeros" padding mode is supported for ConvTranspose2d'),
    (lambda L: L.nn.LazyConvTranspose3d(4, 3, padding_mode="reflect"),
     'Only "zeros" padding mode is supported for LazyConvTranspose3d'),
    # Two mistakes at once: the first in the order is the one that is named.
    (lambda L: L.nn.Conv2d(3, 3, 3, groups=2, padding="foo"),
     "in_channels must be divisible by groups"),
    (lambda L: L.nn.Conv2d(4, 3, 3, groups=2, padding="foo"),
     "out_channels must be divisible by groups"),
    (lambda L: L.nn.Conv2d(4, 4, 3, 2, "foo", padding_mode="xyz"), "Invalid padding string 'foo'"),
    (lambda L: L.nn.Conv2d(4, 4, 3, 2, "same", padding_mode="xyz"),
     "padding='same' is not supported"),
    (lambda L: L.nn.ConvTranspose2d(4, 3, 3, groups=0, padding_mode="xyz"),
     'Only "zeros" padding mode'),
]

CALL = [  # RuntimeError
    *((lambda L, kw=kw, f=f: getattr(L.F, f)(L.ones(1, 2, 4, 4), L.ones(2, 2, 2, 2), **kw), words)
      for f in ("conv2d", "conv_transpose2d") for kw, words in (
          ({"stride": 0}, "non-positive stride is not supported"),
          ({"stride": (1, -1)}, "non-positive stride is not supported"),
          ({"padding": -1}, "negative padding is not supported"),
          ({"padding": (0, -1)}, "negative padding is not supported"),
          ({"dilation": 0}, "dilation should be greater than zero"),
          ({"dilation": (1, -2)}, "dilation should be greater than zero"),
          ({"groups": 0}, "non-positive groups is not supported"),
          ({"groups": -1}, "non-positive groups is not supported"),
          ({"groups": 5}, "Given groups=5, expected weight to be at least 5 at dimension 0, but "
                          "got weight of size [2, 2, 2, 2] instead"),
          ({"stride": [1, 1, 1]},
           "expected stride to be a single integer value or a list of 2 values to match the "
           "convolution dimensions, but got stride=[1, 1, 1]"),
          ({"stride": []}, "but got stride=[]"),
          ({"padding": [1, 1, 1]},
           "expected padding to be a single integer value or a list of 2 values"),
          ({"dilation": [1, 1, 1]},
           "expected dilation to be a single integer value or a list of 2 values"),
      )),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(3, 1, 2, 2), groups=2),
     "Given groups=2, expected weight to be divisible by 2 at dimension 0, but got weight of size"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 3, 4, 4), L.ones(3, 1, 2, 2), groups=2),
     "Given groups=2, expected weight to be divisible by 2 at dimension 0, but got weight of size"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 4, 4), L.ones(2, 3, 2, 2), output_padding=-1),
     "negative output_padding is not supported"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 4, 4), L.ones(2, 3, 2, 2), output_padding=1),
     "output padding must be smaller than either stride or dilation, but got"),
    (lambda L: L.F.conv_transpose1d(L.ones(1, 2, 4), L.ones(2, 3, 2), stride=2, dilation=3,
                                    output_padding=3),
     "output padding must be smaller than either stride or dilation, but got"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 4, 4), L.ones(2, 3, 2, 2),
                                    output_padding=[0, 0, 0]),
     "expected output_padding to be a single integer value or a list of 2 values"),
    (lambda L: L.F.conv1d(L.ones(2, 3, 4), L.ones(4, 2, 2)),
     "Given groups=1, weight of size [4, 2, 2], expected input[2, 3, 4] to have 2 channels, but "
     "got 3 channels instead"),
    (lambda L: L.F.conv1d(L.ones(3, 4), L.ones(4, 2, 2)),
     "Given groups=1, weight of size [4, 2, 2], expected input[1, 3, 4] to have 2 channels, but "
     "got 3 channels instead"),
    (lambda L: L.F.conv2d(L.ones(1, 4, 4, 4), L.ones(4, 4, 2, 2), groups=2),
     "Given groups=2, weight of size [4, 4, 2, 2], expected input[1, 4, 4, 4] to have 8 channels, "
     "but got 4"),
    (lambda L: L.F.conv_transpose2d(L.ones(2, 3, 4, 4), L.ones(4, 2, 2, 2)),
     "Given transposed=1, weight of size [4, 2, 2, 2], expected input[2, 3, 4, 4] to have 4 "
     "channels, but got 3"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 4, 4), dilation=2),
     "Calculated padded input size per channel: (4 x 4). Kernel size: (7 x 7). Kernel size can't "
     "be "
     "greater than actual input size"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 2), L.ones(4, 2, 3, 5), padding=(0, 1)),
     "Calculated padded input size per channel: (4 x 4). Kernel size: (3 x 5)."),
    (lambda L: L.F.conv1d(L.ones(1, 2, 2), L.ones(4, 2, 3), padding="valid"),
     "Calculated padded input size per channel: (2). Kernel size: (3)."),
    (lambda L: L.F.conv2d(L.ones(1, 2), L.ones(4, 2, 4, 4)),
     "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: [1, 2]"),
    (lambda L: L.F.conv1d(L.ones(1, 2, 3, 4), L.ones(4, 2, 4)),
     "Expected 2D (unbatched) or 3D (batched) input to conv1d, but got input of size: [1, 2, 3, "
     "4]"),
    (lambda L: L.F.conv_transpose3d(L.ones(2, 3), L.ones(4, 2, 4, 4, 4)),
     "Expected 4D (unbatched) or 5D (batched) input to conv_transpose3d, but got input of size: "
     "[2, 3]"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), L.ones(3)),
     "Given weight of size [4, 2, 2, 2], expected bias to be 1-dimensional with 4 elements, but "
     "got bias "
     "of size [3] instead"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), L.ones(4, 1)),
     "expected bias to be 1-dimensional with 4 elements, but got bias of size [4, 1] instead"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 4, 4), L.ones(2, 4, 2, 2), L.ones(4), groups=2),
     "weight of size [2, 4, 2, 2], expected bias to be 1-dimensional with 8 elements, but got bias "
     "of size [4]"),
    (lambda L: L.F.conv2d(L.cast(L.ones(1, 2, 4, 4), L.half), L.ones(4, 2, 2, 2), L.ones(4)),
     "should be the same"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), L.cast(L.ones(4), L.half)),
     "Input type ("),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), L.cast(L.ones(4), L.half)),
     "and bias type ("),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), padding="foo"),
     "Invalid padding string: 'foo'"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), padding="same", stride=2),
     "padding='same' is not supported for strided convolutions"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 0, 4), L.ones(3, 2, 2, 2), padding=1),
     "Only zero batch or zero channel inputs are supported, but got input shape: [1, 2, 0, 4]"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 0, 4), L.ones(3, 2, 2, 2)),
     "Calculated padded input size per channel: (0 x 4)"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 0, 4), L.ones(2, 3, 2, 2)),
     "Only zero batch or zero channel inputs are supported, but got input shape: [1, 2, 0, 4]"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(3, 2, 0, 2)),
     "kernel size should be greater than zero"),
    (lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(0, 2, 2, 2)),
     "Given groups=1, expected weight to be at least 1 at dimension 0, but got weight of size [0, "
     "2, 2, 2]"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 0, 4, 4), L.ones(0, 2, 2, 2)),
     "Given groups=1, expected weight to be at least 1 at dimension 0, but got weight of size [0, "
     "2, 2, 2]"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 4, 4), L.ones(2, 0, 2, 2)), "non-empty"),
    (lambda L: L.F.conv_transpose2d(L.ones(1, 2, 1, 1), L.ones(2, 3, 2, 2), padding=1),
     "Given input size per channel: (1 x 1). Calculated output size per channel: (0 x 0). Output "
     "size is too small"),
    (lambda L: L.F.conv_transpose1d(L.ones(1, 2, 2), L.ones(2, 3, 2), padding=4),
     "Output size is too small"),
]

LAYER_CALL = [  # what construction lets pass: the error comes with the call
    (lambda L: L.nn.Conv2d(4, 4, 3, 0)(L.ones(1, 4, 8, 8)), "non-positive stride is not supported"),
    (lambda L: L.nn.Conv2d(4, 4, 3, padding=-1)(L.ones(1, 4, 8, 8)),
     "negative padding is not supported"),
    (lambda L: L.nn.Conv2d(4, 4, 3, dilation=0)(L.ones(1, 4, 8, 8)),
     "dilation should be greater than zero"),
    (lambda L: L.nn.Conv2d(4, 4, 3, (1, 1, 1))(L.ones(1, 4, 8, 8)),
     "expected stride to be a single integer value"),
    (lambda L: L.nn.Conv2d(4, 4, 0)(L.ones(1, 4, 8, 8)), "kernel size should be greater than zero"),
    (lambda L: L.nn.Conv2d(4, 4, 3, padding=8, padding_mode="reflect")(L.ones(1, 4, 8, 8)),
     "Argument #4: Padding size should be less than the corresponding input dimension"),
    (lambda L: L.nn.Conv2d(4, 4, 3, padding=9, padding_mode="circular")(L.ones(1, 4, 8, 8)),
     "Padding value causes wrapping around more than once."),
    (lambda L: L.nn.ConvTranspose2d(4, 4, 3, output_padding=1)(L.ones(1, 4, 8, 8)),
     "output padding must be smaller than either stride or dilation"),
    (lambda L: L.nn.ConvTranspose2d(4, 4, 3, output_padding=-1)(L.ones(1, 4, 8, 8)),
     "negative output_padding is not supported"),
    (lambda L: L.nn.Conv2d(4, 4, 3)(L.ones(1, 3, 8, 8)),
     "expected input[1, 3, 8, 8] to have 4 channels, but got 3"),
    (lambda L: L.nn.Conv2d(4, 4, 3)(L.ones(8, 8)),
     "Expected 3D (unbatched) or 4D (batched) input to conv2d"),
    (lambda L: L.nn.Conv3d(4, 4, 3)(L.ones(1, 4, 8, 2, 8)),
     "(8 x 2 x 8). Kernel size: (3 x 3 x 3)."),
    (lambda L: L.nn.ConvTranspose1d(4, 4, 3)(L.ones(1, 3, 8)),
     "Given transposed=1, weight of size [4, 4, 3]"),
    (lambda L: L.nn.Conv2d(4, 4, 3)(L.cast(L.ones(1, 4, 8, 8), L.half)), "should be the same"),
    (lambda L: L.nn.Conv2d(-4, 4, 3),
     "Trying to create tensor with negative dimension -4: [4, -4, 3, 3]"),
    (lambda L: L.nn.Conv2d(4, 4, -3),
     "Trying to create tensor with negative dimension -3: [4, 4, -3, -3]"),
    (lambda L: L.nn.Conv2d(4, 4, 3, dtype=L.int),
     "floating point and complex dtype can require gradients"),
]

PAD = [
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1,)),
     RuntimeError, "Padding length must be divisible by 2"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1,) * 10), RuntimeError,
     "Padding length should be less than or equal to two times the input dimension but got padding "
     "length 10 "
     "and input of dimension 4"),
    (lambda L: L.F.pad(L.ones(1, 2, 4), (4, 1), "reflect"), RuntimeError,
     "Argument #4: Padding size should be less than the corresponding input dimension, but got: "
     "padding (4, 1) "
     "at dimension 2 of input [1, 2, 4]"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (5, 1, 1, 1), "circular"), RuntimeError,
     "Padding value causes wrapping around more than once."),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1, 1), "foo"),
     NotImplementedError, "Unrecognised padding mode foo"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1, 1), "reflect"), NotImplementedError,
     "Padding size 2 is not supported for 4D input tensor."),
    (lambda L: L.F.pad(L.ones(4), (1, 1), "replicate"), NotImplementedError,
     "Padding size 2 is not supported for 1D input tensor."),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (), "circular"),
     NotImplementedError, "Padding size 0 is not supported"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1, 1, 1, 1), "reflect", 1.0), RuntimeError,
     'Padding mode "reflect" doesn\'t take in value argument'),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (-3, -2)), RuntimeError, ""),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (-3, -2, 0, 0), "reflect"), RuntimeError, ""),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (-3, -2, 0, 0), "replicate"), RuntimeError, ""),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (-3, -2, 0, 0), "circular"), RuntimeError, ""),
    (lambda L: L.F.pad(L.ones(1, 2, 0, 4), (1, 1, 1, 1), "replicate"), RuntimeError,
     "with possibly 0 batch size and other non-zero dimensions"),
    (lambda L: L.F.pad(L.ones(1, 2, 0, 4), (1, 1, 1, 1), "circular"),
     RuntimeError, "wrapping around more than once"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1.5, 1)), TypeError, "argument 'pad'"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), 1), TypeError, "argument 'pad'"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), None), TypeError, "argument 'pad'"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), "12"), TypeError, "argument 'pad'"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1, 1), "constant", "a"), TypeError, "argument 'value'"),
    (lambda L: L.F.pad(L.ones(1, 2, 4, 4), (1, 1), "constant", 1j), TypeError, "argument 'value'"),
    (lambda L: L.F.pad(None, (1, 1)), TypeError, "argument 'input'"),
]


def up(L, size, n=2): return L.nn.ConvTranspose2d(1, 1, 3, 2)(L.ones(*(1,) * n, 4, 4), size)


OUTPUT_SIZE = [
    (lambda L: up(L, (12, 12)),
     ValueError, "requested an output size of (12, 12), but valid sizes range from "
                                            "[9, 9] to [10, 10] (for an input of"),
    (lambda L: up(L, (8, 9)),
     ValueError, "requested an output size of (8, 9), but valid sizes range from [9, 9]"),
    (lambda L: up(L, (1, 1, 9, 11)), ValueError, "but valid sizes range from [9, 9] to [10, 10]"),
    (lambda L: up(L, (9, 9, 9)), ValueError,
     "ConvTranspose2D: for 4D input, output_size must have 2 or 4 elements (got 3)"),
    (lambda L: up(L, (9,)),
     ValueError, "for 4D input, output_size must have 2 or 4 elements (got 1)"),
    (lambda L: up(L, (1, 9, 9, 9), 1),
     ValueError, "for 3D input, output_size must have 2 or 3 elements (got 4)"),
    (lambda L: up(L, "a"), ValueError, "output_size must have 2 or 4 elements (got 1)"),
    (lambda L: L.nn.ConvTranspose2d(1, 1, 3, dilation=3)(L.ones(1, 1, 4, 4), (11, 11)), ValueError,
     "but valid sizes range from [10, 10] to [10, 10]"),
    (lambda L: up(L, 10), TypeError, ""),
    (lambda L: up(L, (9.5, 9)), TypeError, ""),
]

LAZY = [
    (lambda L: L.nn.LazyConv2d(4, 3)(L.ones(3, 4)), RuntimeError,
     "Expected 3D (unbatched) or 4D (batched) input to LazyConv2d, but got input of size:"),
    (lambda L: L.nn.LazyConvTranspose1d(4, 3)(L.ones(3)), RuntimeError,
     "Expected 2D (unbatched) or 3D (batched) input to LazyConvTranspose1d, but got input of "
     "size:"),
    (lambda L: L.nn.LazyConv2d(4, 3, groups=2)(L.ones(1, 3, 8, 8)),
     ValueError, "in_channels must be divisible by groups"),
    (lambda L: L.nn.LazyConv2d(3, 3, groups=2)(L.ones(1, 4, 8, 8)), RuntimeError,
     "Given groups=2, expected weight to be divisible by 2 at dimension 0"),
    (lambda L: L.nn.LazyConvTranspose2d(3, 3, groups=2)(L.ones(1, 4, 8, 8)), RuntimeError,
     "expected bias to be 1-dimensional with 2 elements, but got bias of size [3] instead"),
    (lambda L: L.nn.LazyConv2d(4, 3).weight.shape,
     RuntimeError, "Can't access the shape of an uninitialized parameter"),
    (lambda L: L.nn.LazyConv2d(4, 3).weight + 1,
     ValueError, "Attempted to use an uninitialized parameter"),
    (lambda L: L.nn.Conv2d(3, 4, 3).load_state_dict(L.nn.LazyConv2d(4, 3).state_dict()),
     RuntimeError, "uninitialized parameter"),
]


def numbered(cases):
    return [pytest.param(*case, id=f"{i}-{case[-1][:50]}") for i, case in enumerate(cases)]


@pytest.mark.parametrize("mistake, words", numbered(CONSTRUCTION))
def test_construction(mistake, words):
    "Mistakes that construction finds."
    assert_refused(mistake, ValueError, words)


@pytest.mark.parametrize("mistake, words", numbered(CALL))
def test_call(mistake, words):
    "Shapes and numbers that the functions refuse."
    assert_refused(mistake, RuntimeError, words)


@pytest.mark.parametrize("mistake, words", numbered(LAYER_CALL))
def test_layer_call(mistake, words):
    "The same through layers, which PyTorch lets one construct."
    assert_refused(mistake, RuntimeError, words)


@pytest.mark.parametrize("mistake, error, words", numbered(PAD + OUTPUT_SIZE + LAZY))
def test_padding_output_size_and_lazy_layers(mistake, error, words):
    "Mistakes with `pad`, `output_size` and lazy layers."
    assert_refused(mistake, error, words)


@pytest.mark.parametrize("what", ("weight", "bias"))
def test_mixed_dtypes_name_both(what):
    "No silent promotion; the message names the two dtypes."
    x, w, b = mx.ones((1, 2, 4)), mx.ones((3, 2, 2)), mx.ones((3,))
    if what == "weight": w = w.astype(mx.float16)
    else: b = b.astype(mx.float16)
    words = rf"Input type \(float32\) and {what} type \(float16\) should be the same"
    with pytest.raises(RuntimeError, match=words):
        flashconv.functional.conv1d(x, w, b)


@pytest.mark.parametrize("dtype", (mx.bool_, mx.uint16, mx.uint32), ids=str)
def test_dtypes_that_are_not_served(dtype):
    "NotImplementedError (which is a RuntimeError), as in PyTorch."
    theirs = getattr(torch, str(dtype).rpartition(".")[2].rstrip("_"))
    for L, kind in ((THEIRS, theirs), (OURS, dtype)):
        with pytest.raises(NotImplementedError, match="not implemented for"):
            L.F.conv2d(L.cast(L.ones(1, 2, 4, 4), kind), L.cast(L.ones(3, 2, 2, 2), kind))


@pytest.mark.parametrize("batch", (0, 1))
def test_an_empty_batch_is_checked_like_any_other(batch):
    "PyTorch lets these two pass where the batch is empty."
    x, w = mx.ones((batch, 2, 4)), mx.ones((2, 3, 2))
    with pytest.raises(RuntimeError, match="output padding must be smaller"):
        flashconv.functional.conv_transpose1d(x, w, output_padding=1)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        flashconv.functional.conv_transpose1d(x, w, padding=4)


@pytest.mark.parametrize("data_format", ("NCHW", None, 1, "channels"), ids=repr)
def test_data_format(data_format):
    "ValueError that lists what there is, from functions, layers and lazy layers."
    F, x, kw = flashconv.functional, mx.ones((1, 1, 4)), {"data_format": data_format}
    for mistake in (lambda: F.conv1d(x, mx.ones((1, 1, 1)), **kw), lambda: F.pad(x, (1, 1), **kw),
                    lambda: flashconv.Conv1d(1, 1, 1, **kw),
                    lambda: flashconv.LazyConv1d(1, 1, **kw)):
        with pytest.raises(ValueError, match="channels_first.*channels_last"): mistake()


# Letters -------------------------------------------------------------------------------------

def changed(name, attribute, value, *shape, **kw):
    "A call of a layer of which an attribute was changed."
    def call(L):
        layer = getattr(L.nn, name)(*(4,) * ("Lazy" not in name), 4, 3, **kw)
        setattr(layer, attribute, value)
        return layer(L.ones(*shape))
    return call


LETTERS = [  # ours begins with the whole of PyTorch's message
    *(lambda L, mode=mode: L.nn.Conv2d(4, 4, 3, padding_mode=mode)
      for mode in (3, None, ("zeros",), "a'b", "xyz")),
    lambda L: L.nn.LazyConv1d(4, 3, padding_mode=3),
    lambda L: L.nn.ConvTranspose2d(4, 4, 3, padding_mode=3),
    changed("ConvTranspose1d", "padding_mode", "reflect", 1, 4, 8),
    changed("ConvTranspose2d", "padding_mode", "circular", 1, 4, 8, 8),
    changed("ConvTranspose3d", "padding_mode", 3, 1, 4, 8, 8, 8),
    changed("LazyConvTranspose2d", "padding_mode", "reflect", 1, 4, 8, 8),
    changed("Conv2d", "padding_mode", "foo", 1, 4, 8, 8),
    changed("Conv2d", "padding", "foo", 1, 4, 8, 8),
    changed("Conv2d", "dilation", 0, 1, 4, 8, 8),
    changed("Conv2d", "groups", 2, 1, 4, 8, 8),
    *(lambda L, size=size: up(L, size) for size in ((12, 12), [12, 12], (1, 1, 8, 9), [9, 9, 9])),
    lambda L: L.nn.ConvTranspose1d(1, 1, 3, 2)(L.ones(1, 1, 4), [12]),
    lambda L: L.nn.ConvTranspose3d(1, 1, 3, 2)(L.ones(1, 1, 4, 4, 4), (9, 9, 12)),
    lambda L: L.F.conv_transpose2d(L.ones(1, 1, 4, 4), L.ones(1, 1, 3, 3), output_padding=(0, 2)),
    lambda L: L.F.conv_transpose3d(L.ones(1, 1, 4, 4, 4), L.ones(1, 1, 3, 3, 3), None, (1, 2, 1),
                                   output_padding=2),
    lambda L: L.nn.LazyConv2d(4, 3)(L.ones(3, 4)),
    *(lambda L, pad=pad: L.F.pad(L.ones(1, 2, 4, 4), pad)
      for pad in ((-3, -2), (-5, 0), (0, 0, -5, 1), (0, 0, 0, 0, -3, 0), (1,), (1,) * 10, 1, None)),
    *(lambda L, pad=pad: L.F.pad(L.ones(1, 2, 4, 4), pad, "circular")
      for pad in ((-3, -2, 0, 0), (0, 0, -5, 0), (5, 0, 0, 0), (1, 1))),
    *(lambda L, pad=pad, mode=mode: L.F.pad(L.ones(1, 2, 4, 4), pad, mode)
      for mode in ("reflect", "replicate")
      for pad in ((-5, 0, -4, 0), (-2, -2, -4, 0), (1, 1), (1,) * 10)),
    *(lambda L, pad=pad, mode=mode: L.F.pad(L.ones(1, 2, 4), pad, mode)
      for mode in ("reflect", "replicate") for pad in ((-4, 0), (-3, -2), (-5, 1), (1,) * 6)),
    *(lambda L, pad=pad: L.F.pad(L.ones(1, 2, 4, 4, 4), pad, "reflect")
      for pad in ((4, 0, 0, 0, 0, 0), (0, 0, 0, 4, 0, 0), (0, 0, 0, 0, 5, 0), (-4, 0) * 3)),
    lambda L: L.F.pad(L.ones(1, 2, 3, 4, 5), (-5, 0, -5, 0, -5, 0), "replicate"),
    *(lambda L, shape=shape, mode=mode: L.F.pad(L.ones(*shape), (1, 1) * (len(shape) - 2), mode)
      for mode in ("reflect", "replicate")
      for shape in ((1, 2, 0), (1, 0, 4), (1, 2, 0, 4), (0, 0, 4, 4), (1, 2, 4, 4, 0))),
    lambda L: L.F.pad(L.ones(1, 2, 4), (1, 1), 3),
    lambda L: L.F.pad(L.ones(1, 2, 4), (1, 1), "constant", "a"),
]


def letters(error):
    "A message without what Python's sets and PyTorch's sizes put into it."
    text = re.sub(r"torch\.Size\((\[.*?\])\)", r"\1", str(error)).replace("W: 4 )", "W: 4)")
    text = re.sub(r"\{'.*?'\}", lambda found: str(sorted(eval(found[0]))), text)
    return text.replace("[[", "[").replace("]]", "]").rstrip(".")


@pytest.mark.parametrize("mistake", LETTERS, ids=range(len(LETTERS)))
def test_letter_by_letter(mistake):
    "The same type, and the whole of PyTorch's message at the start of ours."
    with pytest.raises(Exception) as theirs: mistake(THEIRS)
    with pytest.raises(type(theirs.value)) as ours: mistake(OURS)
    assert letters(ours.value).startswith(letters(theirs.value))


# Types ---------------------------------------------------------------------------------------

NOT_ARRAYS = {"numpy": np.ones((2, 2, 4), np.float32), "list": [[[1.0]]], "None": None,
              "torch": torch.ones(2, 2, 4), "bool": True, "float": 1.0, "str": "x", "int": 1}
NOT_INTS = {"numpy": np.ones(2), "None": None, "torch": torch.ones(2), "bool": True, "float": 1.0,
            "str": "1", "floats": (1.0,), "bools": [True], "strings": ["1"], "nested": [[1]],
            "dict": {1: 1}, "complex": 1j}


@pytest.mark.parametrize("argument, kind", [
    (argument, kind) for argument in ("input", "weight", "bias") for kind in NOT_ARRAYS
    if (argument, kind) != ("bias", "None")])
@pytest.mark.parametrize("name", ("conv1d", "conv_transpose1d"))
def test_what_is_not_an_array(name, argument, kind):
    "TypeError that names the argument and the type."
    arguments = {"input": mx.ones((2, 2, 4)), "weight": mx.ones((2, 2, 4)), "bias": mx.ones((2,))}
    arguments[argument] = NOT_ARRAYS[kind]
    with pytest.raises(TypeError, match=f"argument '{argument}' must be mlx.core.array, not"):
        getattr(flashconv.functional, name)(**arguments)


INT_ARGUMENTS = {"conv1d": ("stride", "padding", "dilation", "groups"),
                 "conv_transpose1d": ("stride", "padding", "dilation", "groups", "output_padding")}


@pytest.mark.parametrize("name, argument, kind", [
    (name, argument, kind) for name, arguments in INT_ARGUMENTS.items()
    for argument in arguments for kind in NOT_INTS
    if (name, argument, kind) != ("conv1d", "padding", "str")])
def test_what_is_not_an_int(name, argument, kind):
    "TypeError, in PyTorch as well."
    for library in (THEIRS, OURS):
        x, w = library.ones(2, 2, 4), library.ones(2, 2, 2)
        with pytest.raises(TypeError): getattr(library.F, name)(x, w, **{argument: NOT_INTS[kind]})


@pytest.mark.parametrize("value", ((1,), [1], (1, 1)), ids=str)
def test_groups_is_one_number(value):
    "A tuple is a TypeError, in PyTorch as well."
    for library in (THEIRS, OURS):
        with pytest.raises(TypeError):
            library.F.conv1d(library.ones(2, 2, 4), library.ones(2, 2, 2), groups=value)


@pytest.mark.parametrize("mistake", [
    lambda L: L.nn.Conv2d(4, 4, 3.0), lambda L: L.nn.Conv2d(4, 4, "3"),
    lambda L: L.nn.Conv2d(4, 4, None),
    lambda L: L.nn.Conv2d(4, 4, (3.0, 3)), lambda L: L.nn.Conv2d(4.0, 4, 3),
    lambda L: L.nn.Conv2d(4, 4.0, 3),
    lambda L: L.nn.Conv2d("4", 4, 3), lambda L: L.nn.Conv2d(None, 4, 3),
    lambda L: L.nn.Conv2d(4, None, 3),
    lambda L: L.nn.Conv2d(4, 4, 3, groups="1"), lambda L: L.nn.Conv2d(4, 4, 3, groups=None),
    lambda L: L.nn.Conv2d(4, 4), lambda L: L.nn.Conv2d(4, 4, 3, foo=1),
    lambda L: L.nn.Conv2d(4, 4, 3, dtype="float32"),
    lambda L: L.nn.Conv2d(4, 4, 3, dtype=1), lambda L: L.nn.LazyConv2d(4, 3.0),
    lambda L: L.nn.ConvTranspose2d(4, 4, 3.0),
    lambda L: L.nn.Conv2d(4, 4, 3, 1.5)(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.Conv2d(4, 4, 3, None)(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.Conv2d(4, 4, 3, padding=None)(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.Conv2d(4, 4, 3, padding=1.5)(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.Conv2d(4, 4, 3, dilation="a")(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.Conv2d(4, 4, 3, padding=1.5, padding_mode="reflect")(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.ConvTranspose2d(4, 4, 3, padding="same")(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.ConvTranspose2d(4, 4, 3, output_padding=0.5)(L.ones(1, 4, 8, 8)),
    lambda L: L.nn.Conv2d(4, 4, 3)(None), lambda L: L.nn.Conv2d(4, 4, 3)([[[[1.0]]]]),
    lambda L: L.nn.Conv2d(4, 4, 3)(1.0),
    lambda L: L.nn.Conv2d(4, 4, 3)(), lambda L: L.nn.Conv2d(4, 4, 3)(L.ones(1, 4, 8, 8), (6, 6)),
    lambda L: L.nn.Conv2d(4, 4, 3)(np.ones((1, 4, 8, 8), np.float32)),
    lambda L: L.nn.Conv2d(4, 4, 3)((torch if L is OURS else mx).ones((1, 4, 8, 8))),
    lambda L: L.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")(None),
    lambda L: L.F.conv_transpose2d(L.ones(1, 2, 4, 4), L.ones(2, 2, 2, 2), padding="same"),
    lambda L: L.F.conv2d(L.ones(1, 2, 4, 4)),
    lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), foo=1),
    lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), None, 1, 0, 1, 1, 1),
    lambda L: L.F.conv2d(L.ones(1, 2, 4, 4), L.ones(4, 2, 2, 2), stride=[1, 1.5]),
    lambda L: L.nn.Conv1d(1, 1, 1, bias=torch.nn.Parameter, device=object()),
], ids=lambda f: str(f.__code__.co_firstlineno))
def test_type_errors(mistake):
    "Wrong types and unknown keywords, in both libraries."
    assert_refused(mistake, TypeError, "")


# Aftermath -----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (8, 8), (1, 4, 2, 2), (1, 4, 0, 8),
                                   (1, 1, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("name", ("Conv2d", "ConvTranspose2d"))
def test_a_failed_call_leaves_the_layer_as_it_was(name, shape):
    "The same arrays and attributes, and the next good call works."
    layer = getattr(flashconv, name)(4, 4, 3, padding=(4 if "Transpose" in name else 0))
    x = mx.ones((1, 4, 12, 12))
    y, arrays, attributes = layer(x), dict(layer), dict(layer.__dict__)
    with pytest.raises(RuntimeError): layer(mx.ones(shape))
    assert dict(layer).keys() == arrays.keys() and all(layer[k] is v for k, v in arrays.items())
    assert layer.__dict__ == attributes
    assert mx.array_equal(layer(x), y)


CHILD = """
import json, sys, mlx.core as mx, flashconv as nn, flashconv.functional as F

def o(*shape): return mx.ones(shape)
def g(f, *a): return mx.grad(lambda *a: f(*a).sum(), argnums=tuple(range(len(a))))(*a)
H, M = 2**40, 2**70

for text in json.load(sys.stdin):
    try:
        value = eval(text)
        values = value if isinstance(value, tuple) else [value]
        arrays = [a for a in values if isinstance(a, mx.array)]
        if sum(a.size for a in arrays) < 10**7: mx.eval(arrays)
        outcome = [list(a.shape) for a in arrays]
    except Exception as error: outcome = type(error).__name__
    print(json.dumps(outcome), flush=True)
"""

# One expression a line: zeros, then giants.
EXTREME = """
F.conv2d(o(1, 0, 4, 4), o(3, 0, 2, 2), o(3))
g(F.conv2d, o(1, 0, 4, 4), o(3, 0, 2, 2))
F.conv1d(o(1, 0, 4), o(3, 0, 2), groups=3)
F.conv3d(o(1, 0, 4, 4, 4), o(2, 0, 2, 2, 2), groups=2)
F.conv2d(o(0, 0, 4, 4), o(3, 0, 2, 2))
F.conv2d(o(1, 4, 4, 0), o(3, 0, 2, 2), data_format='channels_last')
F.conv2d(o(1, 2, 4, 4), o(0, 2, 2, 2))
F.conv2d(o(1, 0, 4, 4), o(0, 0, 2, 2))
F.conv_transpose2d(o(1, 0, 4, 4), o(0, 3, 2, 2))
F.conv_transpose2d(o(1, 2, 4, 4), o(2, 0, 2, 2))
F.conv1d(o(1, 0, 4).astype(mx.int32), o(3, 0, 2).astype(mx.int32))
F.conv1d(o(1, 0, 4).astype(mx.complex64), o(3, 0, 2).astype(mx.complex64))
mx.vmap(F.conv1d, (0, None))(o(2, 1, 0, 4), o(3, 0, 2))
mx.vmap(F.conv1d)(o(2, 1, 0, 4), o(2, 3, 0, 2))
mx.vmap(F.conv1d, (0, None))(o(0, 1, 2, 4), o(3, 2, 2))
mx.vmap(F.conv1d, (None, 0))(o(1, 2, 4), o(0, 3, 2, 2))
mx.vmap(F.conv1d, (None, 0))(o(0, 2, 4), o(2, 3, 2, 2))
nn.Conv2d(0, 4, 3)(o(1, 0, 8, 8))
nn.Conv2d(4, 0, 3)(o(1, 4, 8, 8))
nn.Conv2d(0, 0, 3)(o(1, 0, 8, 8))
nn.ConvTranspose2d(0, 4, 3)(o(1, 0, 8, 8))
nn.ConvTranspose2d(4, 0, 3)(o(1, 4, 8, 8))
nn.LazyConv2d(4, 3)(o(1, 0, 8, 8))
nn.LazyConv2d(0, 3)(o(1, 4, 8, 8))
nn.LazyConvTranspose2d(4, 3)(o(1, 0, 8, 8))
F.conv2d(o(1, 2, 4, 4), o(3, 2, 0, 2))
F.conv_transpose2d(o(1, 2, 4, 4), o(2, 3, 0, 2))
F.conv2d(o(1, 2, 4, 4), o(3, 2, 0, 2), padding='same')
nn.Conv2d(4, 3, 0)(o(1, 4, 8, 8))
F.conv2d(o(1, 2, 0, 4), o(3, 2, 2, 2))
F.conv2d(o(1, 2, 0, 4), o(3, 2, 2, 2), padding=2)
F.conv2d(o(0, 2, 0, 4), o(3, 2, 2, 2), padding=2)
F.conv2d(o(1, 2, 0, 4), o(3, 2, 1, 1))
F.conv_transpose2d(o(1, 2, 0, 4), o(2, 3, 2, 2))
F.conv_transpose2d(o(1, 2, 0, 4), o(2, 3, 9, 9), stride=2)
g(F.conv2d, o(0, 2, 4, 4), o(3, 2, 2, 2))
g(F.conv_transpose3d, o(0, 2, 4, 4, 4), o(2, 3, 2, 2, 2))
nn.Conv1d(2, 3, 2, padding=1, padding_mode='circular')(o(1, 2, 0))
nn.Conv1d(2, 3, 2, padding=1, padding_mode='reflect')(o(1, 2, 0))
nn.Conv1d(2, 3, 2, padding=1, padding_mode='replicate')(o(1, 2, 0))
F.conv2d(o(1, 2, 4, 4), o(2, 2, 1, 1), dilation=H)
F.conv2d(o(1, 2, 4, 4), o(2, 2, 1, 1), stride=H, dilation=M)
F.conv_transpose2d(o(1, 2, 1, 1), o(2, 2, 1, 1), stride=H)
F.conv_transpose1d(o(1, 1, 2), o(1, 1, 1), stride=2**31)
F.conv_transpose1d(o(1, 1, 4), o(1, 1, 2), stride=2**31 - 1)
F.conv_transpose2d(o(1, 2, 4, 4), o(2, 2, 1, 1), dilation=H)
F.conv_transpose2d(o(1, 2, 4, 4), o(2, 2, 2, 2), stride=H, output_padding=H - 1)
F.conv_transpose1d(o(1, 2, 4), o(2, 2, 2), stride=2**29, padding=2**29)
F.conv1d(o(1, 1, 4), o(1, 1, 2), padding=2**31 - 1)
F.conv1d(o(1, 1, 4), o(1, 1, 2), padding=2**30, stride=2**30)
F.conv1d(o(1, 1, 4), o(1, 1, 3), padding='same', dilation=H)
F.conv1d(o(1, 1, 4), o(1, 1, 3), padding=H, dilation=H)
F.conv1d(o(1, 1, 4), o(1, 1, 2), dilation=2**62)
F.conv1d(o(1, 1, 4), o(1, 1, 2), padding=(H,))
g(lambda x, w: F.conv1d(x, w, stride=H), o(1, 1, 4), o(1, 1, 2))
g(lambda x, w: F.conv2d(x, w, dilation=H), o(1, 1, 4, 4), o(1, 1, 1, 1))
g(lambda x, w: F.conv_transpose1d(x, w, stride=H), o(1, 1, 1), o(1, 1, 2))
nn.Conv2d(H, 2, 3)
nn.Conv2d(2, H, 3)
nn.Conv2d(2, 2, H)
nn.Conv2d(H, H, H)
nn.Conv2d(M, M, 3)
nn.Conv2d(H, H, 3, groups=H)
nn.Conv2d(2**31, 1, 1)
nn.Conv2d(2**31 - 1, 2**31 - 1, 2**10)
nn.Conv2d(-H, -H, -H)
nn.ConvTranspose1d(H, H, 3)
nn.LazyConv2d(H, 3)
nn.LazyConv2d(2, H)
nn.LazyConv2d(H, 3)(o(1, 2, 8, 8))
nn.LazyConv2d(2, H)(o(1, 2, 8, 8))
nn.LazyConvTranspose2d(M, 3)(o(1, 2, 8, 8))
nn.Conv2d(2, 2, 3, padding=H, padding_mode='replicate')(o(1, 2, 8, 8))
nn.Conv2d(2, 2, 3, padding=H, padding_mode='reflect')(o(1, 2, 8, 8))
nn.Conv2d(2, 2, 3, padding=H, padding_mode='circular')(o(1, 2, 8, 8))
nn.ConvTranspose1d(1, 1, 3)(o(1, 1, 8), output_size=(H,))
nn.ConvTranspose1d(1, 1, 3, H)(o(1, 1, 8), output_size=(H,))
F.pad(o(0, 2, 4), (H, H))
F.pad(o(1, 2, 0), (1, 1), 'constant')
F.pad(mx.array(1.0), ())
F.pad(mx.array(1.0), (1, 1))
""".strip().splitlines() + [
    f"F.{f}(o(1, 2, 4, 4), o(2, 2, 2, 2), {k}={v})" for f in ("conv2d", "conv_transpose2d")
    for k in ("stride", "padding", "dilation", "groups") for v in ("H", "-H", "M")] + [
    f"nn.{cls}(2, 2, 3, {k}={v})(o(1, 2, 8, 8))" for cls in ("Conv2d", "ConvTranspose2d")
    for k in ("stride", "padding", "dilation", "groups") for v in ("H", "-H", "M")] + [
    f"F.pad(o(1, 2, 4), {amounts}, '{mode}')"
    for mode in ("constant", "reflect", "replicate", "circular")
    for amounts in ("(H, 0)", "(0, M)", "(-H, 0)", "(-M, M)", "(H, -H)", "(2**31 - 4, 0)")]


@pytest.fixture(scope="module")
def extremes():
    "Expression -> the shapes it gave, its exception's name, or how it ended the child process."
    outcomes, rest = {}, EXTREME
    while rest:
        child = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(rest),
                               capture_output=True, text=True, timeout=300)
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        if len(lines) < len(rest): lines.append(f"ended with {child.returncode}: {child.stderr}")
        outcomes.update(zip(rest, lines))
        rest = rest[len(lines):]
    return outcomes


@pytest.mark.parametrize("text", EXTREME)
def test_extremes_end_in_a_result_or_an_ordinary_error(extremes, text):
    "Zeros and giants in every place: never a crash, nor an accident further inside."
    assert isinstance(extremes[text], list) or extremes[text] in ("RuntimeError", "ValueError")


@pytest.mark.parametrize("text, shapes", [
    ("F.conv2d(o(1, 0, 4, 4), o(3, 0, 2, 2), o(3))", [[1, 0, 3, 3]]),
    ("nn.Conv2d(0, 4, 3)(o(1, 0, 8, 8))", [[1, 0, 6, 6]]),
    ("g(F.conv2d, o(1, 0, 4, 4), o(3, 0, 2, 2))", [[1, 0, 4, 4], [3, 0, 2, 2]]),
    ("F.conv2d(o(1, 2, 4, 4), o(2, 2, 2, 2), stride=H)", [[1, 2, 1, 1]]),
    ("F.conv2d(o(1, 2, 4, 4), o(2, 2, 1, 1), dilation=H)", [[1, 2, 4, 4]]),
    ("F.conv_transpose2d(o(1, 2, 1, 1), o(2, 2, 1, 1), stride=H)", [[1, 2, 1, 1]]),
    ("g(lambda x, w: F.conv1d(x, w, stride=H), o(1, 1, 4), o(1, 1, 2))", [[1, 1, 4], [1, 1, 2]]),
])
def test_extremes_that_have_a_result(extremes, text, shapes):
    "A giant step over a single window and zero channels are legal, as in PyTorch."
    assert extremes[text] == shapes


@pytest.mark.parametrize("name", ("ConvTranspose2d", "LazyConv2d", "LazyConvTranspose1d"))
def test_no_array_names_the_layer(name):
    "Layers that look at their input before any function does say whose argument is wrong."
    layer = getattr(flashconv, name)(*(2,) * ("Lazy" not in name), 2, 3)
    with pytest.raises(TypeError, match=rf"^{name}\(\): argument 'input' must be mlx.core.array"):
        layer([[[1.0]]])
