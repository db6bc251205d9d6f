"""The public arithmetic: sizes against a count of windows, and what is no number of anything."""
from itertools import product
from types import SimpleNamespace

import pytest

from flashconv.arithmetic import (
    ReceptiveField, effective_kernel_size, output_padding_for, output_size, receptive_field,
    same_padding, transposed_output_size)

ARGUMENTS = {
    effective_kernel_size: ("kernel_size", "dilation"), same_padding: ("kernel_size", "dilation"),
    output_size: ("input_size", "kernel_size", "stride", "padding", "dilation"),
    transposed_output_size: ("input_size", "kernel_size", "stride", "padding", "output_padding",
                             "dilation"),
    output_padding_for: ("output_size", "input_size", "kernel_size", "stride", "padding",
                         "dilation")}
LEGAL = {"input_size": 8, "output_size": 10, "kernel_size": 3, "stride": 1, "padding": 0,
         "output_padding": 0, "dilation": 1}
POSITIVE = "kernel_size", "stride", "dilation"
PLACES = [(f, name) for f, names in ARGUMENTS.items() for name in names]
GRID = list(product(range(1, 9), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2)))


def call(f, **changed): return f(**{name: LEGAL[name] for name in ARGUMENTS[f]} | changed)


def windows(i, k, s, p, d):
    "How many windows of k taps start at a multiple of s and end inside the padded input."
    return sum(start + d * (k - 1) < i + 2 * p for start in range(0, i + 2 * p, s))


@pytest.mark.parametrize("f, name", PLACES, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("value", (2.0, True, False, "1", None, [1], (1, 2.0), (1, True)), ids=repr)
def test_whole_numbers_only(f, name, value):
    "Neither a float nor a bool passes for a number, alone or in a tuple."
    with pytest.raises(TypeError, match=f"argument '{name}' must be int or tuple of ints, not "):
        call(f, **{name: value})


@pytest.mark.parametrize("value", (0, -1, (1, 0)), ids=repr)
@pytest.mark.parametrize("f, name", [(f, name) for f, name in PLACES if name in POSITIVE],
                         ids=lambda v: getattr(v, "__name__", v))
def test_at_least_one(f, name, value):
    "Taps, steps and distances are positive."
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but got"):
        call(f, **{name: value})


@pytest.mark.parametrize("f", ARGUMENTS, ids=lambda f: f.__name__)
def test_one_value_per_axis(f):
    "A tuple anywhere gives a tuple, and numbers beside it count for each axis; lengths agree."
    one = call(f)
    assert call(f, kernel_size=(3, 3), dilation=(1, 1)) == (one, one)
    with pytest.raises(ValueError, match="tuples must be of one length"):
        call(f, kernel_size=(3, 3), dilation=(1, 1, 1))


@pytest.mark.parametrize("i, k, s, p, d", GRID)
def test_sizes(i, k, s, p, d):
    "As many outputs as windows, and back to each of the sizes that have as many."
    count = windows(i, k, s, p, d)
    if not count:
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input"):
            output_size(i, k, s, p, d)
        return
    assert output_size(i, k, s, p, d) == count
    if p == 0: assert output_size(i, k, s, "valid", d) == count
    rest = output_padding_for(i, count, k, s, p, d)
    assert 0 <= rest < s and transposed_output_size(count, k, s, p, rest, d) == i
    for size in (i - rest - 1, i - rest + s):
        with pytest.raises(ValueError, match="valid sizes range from"):
            output_padding_for(size, count, k, s, p, d)


@pytest.mark.parametrize("k, d", list(product(range(1, 6), (1, 2, 3))))
def test_same(k, d):
    "'same' keeps the size; the odd zero goes to the right. A step is refused."
    left, right = same_padding(k, d)
    assert left + right == effective_kernel_size(k, d) - 1 and right - left in (0, 1)
    assert output_size(9, k, 1, "same", d) == 9
    with pytest.raises(ValueError, match="needs stride 1, but got 2"):
        output_size(9, k, 2, "same", d)


def test_receptive_field_of_what_says_little():
    "A layer is asked for `kernel_size` alone: step 1, no padding and no dilation are understood."
    three, pool = SimpleNamespace(kernel_size=3), SimpleNamespace(kernel_size=2, stride=2)
    assert receptive_field(three) == ReceptiveField(size=3, jump=1, start=0)
    assert receptive_field(three, pool, three) == ReceptiveField(size=8, jump=2, start=0)


def test_receptive_field_along_an_axis():
    "Tuples and lists are read at `axis`, numbers and strings serve every axis."
    layer = SimpleNamespace(kernel_size=[3, 5], stride=(1, 2), padding=(0, 1), dilation=2)
    assert receptive_field(layer) == (5, 1, 0)
    assert receptive_field(layer, axis=1) == (9, 2, -1)
    even = SimpleNamespace(kernel_size=(4, 2), padding="same", stride=2)
    assert receptive_field(even) == (4, 2, -1) and receptive_field(even, axis=1) == (2, 2, 0)
    valid = SimpleNamespace(kernel_size=4, padding="valid")
    assert receptive_field(valid, valid) == (7, 1, 0)
