"""Time whole networks in flashconv beside mlx.nn and PyTorch, all in one run: see README.md."""
import sys
import warnings
from copy import deepcopy
from typing import NamedTuple

import flashconv  # before mlx.core, so that a fast BLAS is under it
import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
import torch

import networks
import report
from competitors import Competitor
from timing import HERE, Suite, arguments, run

PASSES = {"inference": "inference", "training": "a training step"}
OURS = "flashconv channels_last"
RATE = 1e-3  # of learning: the weights stay what they were, but for a little
TOLERANCE = {"inference": 1e-3,
             "training": 0.1}  # norms of two small pictures: PyTorch in float32 is 3% off, too
LARGE_ACTIVATIONS = ("MobileNetV2", "ConvNeXt-T", "WaveNet",
                     "Whisper stem")  # MLX runs those on one thread, whatever convolves
BATCHES = {"U-Net": 1, "DCGAN generator": 16, "WaveNet": 1, "ResNet-18 3d": 1}  # or else 2


class Row(NamedTuple):
    "A network of `networks.NETWORKS`, and how much it is given."
    name: str
    shape: tuple  # of the input, without the batch
    batch: int  # of a training step; inference has 1


ROWS = tuple(Row(name, shape, BATCHES.get(name, 2))
             for name, (_, shape) in networks.NETWORKS.items())


class Data(NamedTuple):
    "A network of PyTorch's with random weights, an input, and a batch with what it should give."
    network: torch.nn.Module
    x: torch.Tensor
    batch: torch.Tensor
    target: torch.Tensor


def arrays(row):
    "Random numbers for a row, always the same ones."
    torch.manual_seed(0)
    network = networks.stir(networks.NETWORKS[row.name][0]())
    for layer in network.modules():
        if isinstance(layer, torch.nn.Dropout): layer.p = 0  # each library draws another mask
    x, batch = torch.randn(1, *row.shape), torch.randn(row.batch, *row.shape)
    with torch.no_grad(): outputs = network(x)
    return Data(network, x, batch, torch.randn(row.batch, *outputs.shape[1:]))


# Who is measured ------------------------------------------------------------------------------

class OnMLX:
    "A network of MLX's, channels last or first."

    def __init__(self, network, data, last=True):
        self.network, self.optimizer, self.last = network, mlx.optimizers.SGD(RATE), last
        self.x, self.batch, self.target = (
            mx.array((a.movedim(1, -1) if last else a).contiguous().numpy()) for a in data[1:])
        self._differentiated = mlx.nn.value_and_grad(network, self._loss)
        mx.eval(network.state, self.x, self.batch, self.target)

    def _loss(self, batch, target): return mx.square(self.network(batch) - target).mean()

    def inference(self):
        "The output."
        if self.network.training: self.network.eval()
        y = self.network(self.x)
        mx.eval(y)
        return [y]

    def training(self):
        "The loss and the gradients; changes the weights."
        if not self.network.training: self.network.train()
        loss, gradients = self._differentiated(self.batch, self.target)
        self.optimizer.update(self.network, gradients)
        mx.eval(loss, gradients, self.network.state, self.optimizer.state)
        return [loss, gradients]

    def numpy(self, outputs):
        "What `inference` or `training` gave, in PyTorch's layout, the gradients in a row."
        y, *gradients = outputs
        first = np.array(mx.moveaxis(y, -1, 1) if self.last and y.ndim > 2 else y)
        if not gradients: return [first]
        parameters = self.network.parameters()
        state = flashconv.to_torch_state(self.network.update(gradients[0]))
        self.network.update(parameters)
        names = sorted(name for name in state if not name.endswith(STATISTICS))
        return [first, np.concatenate([state[name].flatten().numpy() for name in names])]

    def workspace(self, run):
        "Bytes that a run holds at its peak beyond the network, its inputs and the target."
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        return mx.get_peak_memory() - before


STATISTICS = "running_mean", "running_var"


class OnTorch:
    "A network of PyTorch's, in one of its memory formats."

    def __init__(self, data, memory_format, dtype=torch.float32):
        axes = len(data.x.shape) - 2
        if memory_format == "channels_last":
            if axes == 1: raise ValueError("PyTorch has no such format in 1d")
            memory_format += "_3d" if axes == 3 else ""
        layout = getattr(torch, memory_format)
        self.network = deepcopy(data.network).to(dtype, memory_format=layout)
        self.x, self.batch = (a.to(dtype, memory_format=layout) for a in (data.x, data.batch))
        self.target = data.target.to(dtype)
        self.optimizer = torch.optim.SGD(self.network.parameters(), RATE)

    def inference(self):
        "The output."
        if self.network.training: self.network.eval()
        with torch.inference_mode(): return [self.network(self.x)]

    def training(self):
        "The loss and the gradients; changes the weights."
        if not self.network.training: self.network.train()
        self.optimizer.zero_grad()
        loss = (self.network(self.batch) - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        return [loss.detach(), {k: torch.zeros_like(p) if p.grad is None else p.grad
                                for k, p in self.network.named_parameters()}]

    def numpy(self, outputs):
        "What `inference` or `training` gave, the gradients in a row."
        first, *gradients = outputs
        if not gradients: return [first.numpy()]
        flat = [a.flatten().numpy() for _, a in sorted(gradients[0].items())]
        return [first.numpy(), np.concatenate(flat)]

    def workspace(self, run):
        "PyTorch doesn't tell on CPUs."


def reference(row, data):
    "What each pass gives in PyTorch, in twice the precision."
    judge = OnTorch(data, "contiguous_format", torch.float64)
    return {which: judge.numpy(getattr(judge, which)()) for which in PASSES}


def ours(row, data):
    "The network in flashconv's layers."
    return OnMLX(flashconv.convert_model(data.network, data_format="channels_last",
                                         modules=networks.COUNTERPARTS), data)


def native(row, data):
    "The same with mlx.nn's convolutions; an error where it has none."
    runner = ours(row, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        flashconv.downgrade(runner.network)
    return runner


def theirs(memory_format): return lambda row, data: OnTorch(data, memory_format)


COMPETITORS = (
    Competitor(OURS, ours, "fast"),
    Competitor(report.NATIVE_FAST, native, "fast", probed=True),
    Competitor(report.NATIVE, native, "stock", probed=True),
    Competitor("PyTorch", theirs("contiguous_format")),
    Competitor("PyTorch channels_last", theirs("channels_last")),
)

SUITE = Suite(
    module="models", rows=ROWS, competitors=COMPETITORS, passes=tuple(PASSES), arrays=arrays,
    reference=reference, tolerance=lambda row, which: TOLERANCE[which],
    facts=lambda row: {}, slow=5, seconds=3)


# What was found -------------------------------------------------------------------------------

def floors(rows):
    "All floors, on the rows there are."
    for which, name in PASSES.items():
        same = report.ratios(rows, which, [report.NATIVE_FAST], [OURS])
        start = f"{name}: flashconv's speed over mlx.nn's, same BLAS"
        yield report.mean(start, same, 5, True)
        yield report.worst(start, same, 1, True)
        some = [row for row in rows if row["name"] not in LARGE_ACTIVATIONS]
        found = report.ratios(some, which, [OURS], report.TORCH)
        start = f"{name}: flashconv's time over PyTorch's better format"
        yield report.worst(f"{start}, but for large activations", found, 1.3, False)


RATIOS = (  # heading, time of, over time of
    ("mlx.nn, fast BLAS / flashconv", [report.NATIVE_FAST], [OURS]),
    ("mlx.nn / flashconv", [report.NATIVE], [OURS]),
    ("flashconv / PyTorch's better format", [OURS], report.TORCH))


def markdown(found):
    "Where it ran, the times, their ratios, the memory and the floors."
    rows = found["rows"]
    parts = ["# Times of whole networks", *report.where(found)]
    for which, name in PASSES.items():
        parts += [f"## {name.capitalize()}", report.grid(rows, which, report.cell_time),
                  ratios(rows, which)]
    parts += ["## Memory", "MiB at the peak beyond the network and its input; PyTorch doesn't "
              "tell. Inference / a training step:", report.grid(rows, None, report.cell_sizes)]
    parts += ["## Floors", report.summary(found)]
    return "\n\n".join(parts) + "\n"


def ratios(rows, which):
    "A Markdown table of rows by `RATIOS`, each a ratio of minima; a training step's batch too."
    columns = [report.ratios(rows, which, above, below) for _, above, below in RATIOS]
    lines = [["", "batch", *(heading for heading, _, _ in RATIOS)], ["---", *["---:"] * 4]]
    lines += [[row["name"], str(row["batch"] if which == "training" else 1),
               *(report.number(c[row["name"]]) if row["name"] in c else "" for c in columns)]
              for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    options = arguments(SUITE, __doc__, "ResNet*")
    folder = options.out or HERE
    def write(found):
        report.write(found, folder / "models.json", folder / "models.md", markdown(found))
    found = run(SUITE, options, floors, write)
    print(report.summary(found))
    print(f"wrote {folder}/models.json and models.md")
    wrong = [f"{row['name']}, {which}, {name}: {cell['note']}" for row in found["rows"]
             for which, cells in row["passes"].items() for name, cell in cells.items()
             if cell["note"].startswith("wrong")]
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__": main()
