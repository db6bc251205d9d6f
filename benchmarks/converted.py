"""Time networks that an example has converted beside those written by hand: see README.md.

Inference only. It writes nothing, and prints ratios of minima, all to the one by hand, channels last.
"""
import flashconv  # before mlx.core, so that a fast BLAS is under it
import torch

import networks
from competitors import Competitor
from models import ROWS, TOLERANCE, OnMLX, OnTorch, arrays
from timing import Suite, arguments, run

WRITTEN = "by hand, channels last"


def written(data_format, fold=False):
    "The network made of classes of `networks.COUNTERPARTS`."
    def make(row, data):
        network = flashconv.convert_model(data.network.eval(), data_format=data_format,
                                          modules=networks.COUNTERPARTS)
        runner = OnMLX(network, data, data_format == "channels_last")
        if fold: flashconv.fold_batch_norm(network, runner.x)
        return runner
    return make


def converted(fold=False):
    "The network made of PyTorch's program, which is channels first."
    def make(row, data):
        network = flashconv.convert_model(data.network.eval(), (data.x,), fold=fold)
        return OnMLX(network, data, last=False)
    return make


def reference(row, data):
    "What PyTorch gives, in twice the precision."
    judge = OnTorch(data, "contiguous_format", torch.float64)
    return {"inference": judge.numpy(judge.inference())}


COMPETITORS = (
    Competitor(WRITTEN, written("channels_last"), "fast"),
    Competitor("by hand, channels first", written("channels_first"), "fast"),
    Competitor("converted", converted(), "fast"),
    Competitor("by hand, folded", written("channels_last", fold=True), "fast"),
    Competitor("converted, folded", converted(fold=True), "fast"),
)

SUITE = Suite(
    module="converted", rows=ROWS, competitors=COMPETITORS, passes=("inference",), arrays=arrays,
    reference=reference, tolerance=lambda row, which: TOLERANCE[which],
    facts=lambda row: {}, slow=5, seconds=3)


def table(rows):
    "Each network's time by hand, and the others as multiples of it."
    names = [competitor.name for competitor in COMPETITORS]
    lines = [f"{'':20}" + "".join(f"{name:>26}" for name in names)]
    for row in rows:
        cells = row["passes"]["inference"]
        least = [cells[name].get("min") for name in names]
        shown = [cells[name]["note"][:25] if time is None else f"{time:.1f} ms" if not i
                 else f"{time / least[0]:.2f}" for i, (name, time) in enumerate(zip(names, least))]
        lines.append(f"{row['name']:20}" + "".join(f"{text:>26}" for text in shown))
    return "\n".join(lines)


def main():
    options = arguments(SUITE, __doc__, "ResNet*")
    print(table(run(SUITE, options, lambda rows: (), lambda found: None)["rows"]))


if __name__ == "__main__": main()
