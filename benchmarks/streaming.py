"""Time a step of a stream beside the same layer on a chunk with its history attached: see README.md.

It writes nothing, and prints ratios of minima.
"""
from typing import NamedTuple

import flashconv  # before mlx.core, so that a fast BLAS is under it
import mlx.core as mx
import numpy as np

from competitors import Competitor
from timing import Suite, arguments, run

MOST = 1.2  # a step's time over that of its convolution, history attached by hand


class Row(NamedTuple):
    "A causal layer without bias, and the chunks of its stream."
    name: str
    layer: str
    sizes: tuple  # in_channels, out_channels, kernel_size
    chunk: int  # samples
    options: dict  # of the layer, besides padding


ROWS = (
    Row("K=7, 64 ch, 320", "Conv1d", (64, 64, 7), 320, {}),
    Row("K=3 d9, 64 ch, 320", "Conv1d", (64, 64, 3), 320, {"dilation": 9}),
    Row("K=4 s2, 32->64, 320", "Conv1d", (32, 64, 4), 320, {"stride": 2}),
    Row("K=3, 256 ch, 40", "Conv1d", (256, 256, 3), 40, {}),
    Row("depthwise K=31, 256 ch, 40", "Conv1d", (256, 256, 31), 40, {"groups": 256}),
    Row("transposed k16 s8, 128->64, 10", "ConvTranspose1d", (128, 64, 16), 10, {"stride": 8}),
    Row("tiny: K=3, 16 ch, 1", "Conv1d", (16, 16, 3), 1, {}),
)


class Arrays(NamedTuple):
    "A layer, two chunks, and the state between them."
    layer: object
    before: mx.array
    chunk: mx.array
    state: mx.array


def arrays(row):
    "What both start with; all numbers are random."
    mx.random.seed(0)
    layer = getattr(flashconv, row.layer)(*row.sizes, padding="causal", bias=False, **row.options)
    before, chunk = mx.random.normal((2, 1, row.sizes[0], row.chunk))
    _, state = layer.step(before, layer.initial_state())
    mx.eval(layer.parameters(), before, chunk, state)
    return Arrays(layer, before, chunk, state)


class Step:
    "`layer.step`."

    def __init__(self, row, data):
        self.layer, _, self.chunk, self.state = data

    def step(self):
        "The outputs and the next state."
        found = self.layer.step(self.chunk, self.state)
        mx.eval(found)
        return found

    def numpy(self, outputs):
        "What `step` gave."
        return list(map(np.array, outputs))

    def workspace(self, run): "It isn't measured."


class ByHand(Step):
    "The history is put before the chunk, and cut off again for the next one."

    def __init__(self, row, data):
        super().__init__(row, data)
        padding = 0
        if row.layer == "ConvTranspose1d":  # cuts off what inputs outside contribute to as well
            stride = row.options["stride"]
            padding = ((data.state.shape[-1] * stride, row.sizes[2] - stride),)
        self.plain = getattr(flashconv, row.layer)(
            *row.sizes, padding=padding, bias=False, **row.options)
        self.plain.weight = self.layer.weight

    def step(self):
        "The same."
        joined = mx.concatenate([self.state, self.chunk], -1)
        found = self.plain(joined), joined[..., self.chunk.shape[-1]:]
        mx.eval(found)
        return found


def reference(row, data):
    "The last outputs of the layer on both chunks as one, and the inputs that are kept."
    whole = mx.concatenate([data.before, data.chunk], -1)
    y = data.layer(whole)
    kept = whole.shape[-1] - data.state.shape[-1]
    return {"step": [np.array(y[..., y.shape[-1] // 2:]), np.array(whole[..., kept:])]}


COMPETITORS = Competitor("by hand", ByHand, "fast"), Competitor("step", Step, "fast")
SUITE = Suite(
    module="streaming", rows=ROWS, competitors=COMPETITORS, passes=("step",), arrays=arrays,
    reference=reference, tolerance=lambda row, which: 1e-5, facts=lambda row: {}, slow=2, seconds=1)


def table(rows):
    "Each row's times and their ratio, and whether it is kept."
    lines = []
    for row in rows:
        by_hand, step = (row["passes"]["step"][competitor.name] for competitor in COMPETITORS)
        if note := by_hand["note"] or step["note"]:
            lines.append(f"{row['name']:32} {note}")
            continue
        ratio = step["min"] / by_hand["min"]
        lines.append(f"{row['name']:32} {1e3 * by_hand['min']:7.1f} us by hand "
                     f"{1e3 * step['min']:7.1f} us a step, {ratio:.2f} "
                     f"({'OK' if ratio <= MOST else 'missed'}: at most {MOST})")
    return "\n".join(lines)


def main():
    options = arguments(SUITE, __doc__, "tiny*")
    print(table(run(SUITE, options, lambda rows: (), lambda found: None)["rows"]))


if __name__ == "__main__": main()
