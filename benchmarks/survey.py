"""Look for slow layers: random geometries beside mlx.nn's and PyTorch's, see README.md."""
import argparse

import flashconv  # noqa: F401, before mlx.core, so that a fast BLAS is under it
import mlx.core as mx
import numpy as np

from competitors import COMPETITORS, arrays
from rows import Row
from timing import Entry, cannot, interleave, prepare

PASSES = "forward", "input_gradient", "weight_gradient"
OURS = "flashconv", "flashconv channels_last"
RIVALS = {"mlx.nn, fast BLAS": "mlx.nn", "PyTorch": "PyTorch"}  # name there, name here
PRODUCTS = 2**20, 2**27  # of a layer: fewer are all overhead, more take mlx.nn minutes
CHANNELS = 1, 2, 3, 5, 7, 16, 21, 32, 48, 64, 96, 100, 128, 256
SLOW = 4  # seconds: what takes longer is timed once


# What is drawn --------------------------------------------------------------------------------

def draw(seed, number):
    "The case of a number: the same each time, whatever was drawn before it."
    rng = np.random.default_rng((seed, number))
    while True:
        row = _any(rng)
        if min(row.output_shape) > 0 and PRODUCTS[0] <= products(row) <= PRODUCTS[1]: return row


def products(row):
    places = row.input_shape if row.transposed else row.output_shape
    return int(np.prod(row.weight_shape) * places[0] * np.prod(places[2:]))


def _any(rng):
    "A layer of one of the kinds below, of any size; it may have no outputs."
    def one_of(*values): return values[rng.integers(len(values))]
    axes, kind = int(rng.integers(1, 4)), one_of(*KINDS)
    low, high, widest = ((50, 20_000, 12), (5, 120, 8), (3, 24, 5))[axes - 1]
    size = rng.integers(low, high, axes).tolist()
    kernel = rng.integers(1, widest, axes).tolist()
    case = {"in": one_of(*CHANNELS), "out": one_of(*CHANNELS), "kernel": kernel, "stride": 1,
            "dilation": 1, "groups": 1, "transposed": False}
    KINDS[kind](rng, one_of, case)
    span = max(case["dilation"] * (k - 1) + 1 for k in case["kernel"])
    return Row(kind, kind, (one_of(1, 1, 2, 4, 8, 16, 32), case["in"], *size), case["out"],
               tuple(case["kernel"]), case["stride"], one_of(0, span // 2), case["dilation"],
               case["groups"], case["transposed"])


def _dense(rng, one_of, case): pass
def _strided(rng, one_of, case): case.update(stride=one_of(2, 3, 4))
def _dilated(rng, one_of, case): case.update(dilation=one_of(2, 3, 6, 12))


def _pointwise(rng, one_of, case):
    case.update(kernel=[1] * len(case["kernel"]), stride=one_of(1, 1, 2))


def _grouped(rng, one_of, case):
    groups = one_of(2, 3, 4, 8, 32)
    case.update({"in": groups * one_of(1, 2, 4, 5, 16), "out": groups * one_of(1, 2, 4, 5, 16)},
                groups=groups, stride=one_of(1, 1, 2))


def _depthwise(rng, one_of, case):
    case.update(out=case["in"] * one_of(1, 1, 2), groups=case["in"], stride=one_of(1, 1, 2))


def _transposed(rng, one_of, case): case.update(transposed=True, stride=one_of(1, 2, 3))


def _upsampling(rng, one_of, case):
    stride = one_of(2, 4, 8, 16, 32) if len(case["kernel"]) < 3 else one_of(2, 4, 8)
    kernel = [stride * one_of(1, 2)] * len(case["kernel"])
    case.update(transposed=True, stride=stride, kernel=kernel)


def _patches(rng, one_of, case):
    stride = one_of(4, 8, 14, 16)
    case.update(stride=stride, kernel=[stride] * len(case["kernel"]))


def _long(rng, one_of, case):
    "A long kernel along the last axis, as filter banks have it."
    case.update(kernel=[1] * (len(case["kernel"]) - 1) + [one_of(65, 128, 257, 400, 512)],
                stride=one_of(1, 4, 16, 160) if len(case["kernel"]) == 1 else 1)


KINDS = {"dense": _dense, "1x1": _pointwise, "strided": _strided, "dilated": _dilated,
         "grouped": _grouped, "depthwise": _depthwise, "transposed": _transposed,
         "upsampling": _upsampling, "patches": _patches, "long": _long}


# What it takes --------------------------------------------------------------------------------

def times(row):
    "pass -> competitor -> milliseconds, the least of some rounds in turn; nan for who cannot."
    data, found = arrays(row), {}
    chosen = [c for c in COMPETITORS if c.name in (*OURS, *RIVALS)]
    runners = {c.name: prepare(c, row, data) for c in chosen}
    for which in PASSES:
        entries = [_tried(c, runners[c.name], which) for c in chosen]
        interleave([e for e in entries if not e.note], which, rounds=7, enough=0.3)
        found[which] = {e.competitor.name: 1e3 * min(e.samples, default=np.nan) for e in entries}
    mx.clear_cache()
    return found


def _tried(competitor, runner, which):
    "An entry after its first call, which compiles, and shows who cannot or takes too long."
    entry = Entry(competitor, runner)
    if isinstance(runner, Exception): entry.note = cannot(runner)
    else:
        try:
            interleave([entry], which, rounds=1, enough=0)
            if entry.samples[0] > SLOW: entry.note = "once"
        except Exception as error: entry.note = cannot(error)
    return entry


# The run --------------------------------------------------------------------------------------

def describe(row):
    "A geometry in a line."
    shape, kernel = ("x".join(map(str, sizes)) for sizes in (row.input_shape, row.kernel_size))
    more = [f"{name[0]}{value}" for name, value, usual in (
        ("stride", row.stride, 1), ("padding", row.padding, 0), ("dilation", row.dilation, 1),
        ("groups", row.groups, 1)) if value != usual]
    return " ".join([row.kind, shape, "->", str(row.out_channels), "kernel", kernel, *more])


def slow(found, limits):
    "(ratio, pass, who of us, milliseconds, whose) of all that is beyond a limit."
    for which, cells in found.items():
        for ours in OURS:
            for rival, limit in limits.items():
                ratio = cells[ours] / cells[rival]
                if ratio > limit: yield ratio, which, ours, cells[ours], rival


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", type=int, help="the number of a case, to look at it alone")
    parser.add_argument("--mlx", type=float, default=3, help="times mlx.nn's time")
    parser.add_argument("--torch", type=float, default=8, help="times PyTorch's")
    options = parser.parse_args()
    limits = dict(zip(RIVALS, (options.mlx, options.torch)))
    numbers = range(options.cases) if options.only is None else [options.only]
    listed = []
    for number in numbers:
        row = draw(options.seed, number)
        found = times(row)
        print(f"{number}: {describe(row)}", flush=True)
        if options.only is not None:
            for which, cells in found.items():
                print(f"  {which}:", ", ".join(f"{c} {ms:.2f} ms" for c, ms in cells.items()))
        for ratio, which, ours, ms, rival in slow(found, limits):
            line = f"{ratio:6.1f} x {RIVALS[rival]:8} {which:15} {ours}, {ms:.2f} ms"
            print("   ", line, flush=True)
            listed.append((ratio, f"{line}: {number}: {describe(row)}"))
    print(f"\n{len(listed)} ratios beyond the limits, of {len(numbers)} layers; the worst first")
    for _, line in sorted(listed, reverse=True): print(line)


if __name__ == "__main__": main()
