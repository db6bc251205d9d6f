"""One to four processes on this machine: what they check together, and what becomes of the others."""
import os
import subprocess
import sys
from functools import lru_cache
from io import StringIO
from json import loads
from pathlib import Path

import flashconv as fc
import mlx.core as mx
import numpy as np
import pytest
from flashconv.distributed import SplitConv, SyncBatchNorm, launch, shard_conv
from flashconv.distributed.group import _ports

import together

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def norm(tmp_path_factory):
    "What PyTorch's BatchNorm2d gives for a batch of eight, in a file."
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3)
    with torch.no_grad(): norm.weight.normal_(), norm.bias.normal_()
    x = (100 + torch.randn(8, 3, 4, 5)).requires_grad_()  # a mean far from zero
    cotangent = torch.randn(8, 3, 4, 5)
    y = norm(x)
    y.backward(cotangent)
    path = tmp_path_factory.mktemp("norm") / "norm.npz"
    np.savez(path, x=x.detach(), cotangent=cotangent, y=y.detach(), gradient=x.grad,
             weight=norm.weight.detach(), bias=norm.bias.detach(), weight_gradient=norm.weight.grad,
             running_mean=norm.running_mean, running_var=norm.running_var)
    return str(path)


@lru_cache
def found(processes, norm):
    "What the processes have found, by rank. They run once for all tests."
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    printed = launch("import together; together.main()", processes, 90,
                     {"NORM": norm, "PYTHONPATH": path})
    return [loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.parametrize("processes, check", [
    (processes, check) for processes in (1, 2, 3, 4) for check in together.checks(processes)])
def test_together(processes, check, norm):
    "Each process agrees."
    for rank, problems in enumerate(found(processes, norm)):
        assert problems[check] is None, f"process {rank} of {processes}:\n{problems[check]}"


# One process ---------------------------------------------------------------------------------

def graph(y):
    "The operations that MLX would compute."
    file = StringIO()
    mx.export_to_dot(file, y)
    return [line.partition("label")[2] for line in file.getvalue().splitlines() if "label" in line]


def test_one_process_costs_nothing():
    "Where there is one process, the graph is the layer's."
    x, layer = mx.zeros((1, 4, 8, 8)), fc.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    plain = sorted(graph(layer(x)))
    for other in (SplitConv(layer), shard_conv(layer, "all-to-sharded"),
                  shard_conv(layer, "sharded-to-all")):
        assert sorted(graph(other(x))) == plain
        assert len(graph(mx.grad(lambda x: other(x).sum())(x))) == len(
            graph(mx.grad(lambda x: layer(x).sum())(x)))
    one, two = fc.convert.models.BatchNorm(4), SyncBatchNorm(4)
    x = mx.moveaxis(x, 1, -1)
    assert len(graph(one(x))) == len(graph(two(x)))


def test_convert_model_makes_sync_batch_norms():
    "PyTorch's becomes ours."
    T = pytest.importorskip("torch.nn")
    ours = fc.convert_model(T.Sequential(T.Conv2d(3, 4, 3), T.SyncBatchNorm(4)), data_format="channels_last")
    assert any(isinstance(module, SyncBatchNorm) for module in ours.modules())


# Processes that don't do what they should ----------------------------------------------------

MEET = "import mlx.core as mx\ngroup = mx.distributed.init()\n"


def children():
    "The processes that this one has started and that still run."
    done = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True,
                          text=True)
    return [line for line in done.stdout.splitlines() if "program.py" in line]


def test_a_process_that_fails():
    "The others are ended, and all that was printed is in the message."
    program = MEET + "if group.rank() == 1: raise SystemExit('I am out')\n" \
        "mx.eval(mx.distributed.all_sum(mx.ones(3)))\n"
    with pytest.raises(RuntimeError, match="I am out"): launch(program, 3, 30)
    assert not children()


def test_a_process_that_never_comes():
    "Whoever waits is ended when the time is over."
    program = MEET + "if group.rank() == 0: mx.eval(mx.distributed.all_sum(mx.ones(3)))\n" \
        "import time; time.sleep(60)\n"
    with pytest.raises(TimeoutError, match="longer than 2"): launch(program, 2, 2)
    assert not children()


def test_a_dead_neighbour():
    "What a user sees: MLX's error, in the process that waits."
    program = MEET + """
import os, time
x = mx.distributed.all_sum(mx.ones(3)); mx.eval(x)
if group.rank() == 1: os._exit(0)
try: mx.eval(mx.distributed.all_sum(mx.ones(3)))
except RuntimeError as error: print(error)
"""
    assert "[ring] connection to a peer was lost" in launch(program, 2, 30)[0]


# The demo ------------------------------------------------------------------------------------

def test_demo():
    "As the page starts it: through mlx.launch."
    launcher = "from mlx._distributed_utils.launch import main; main()"
    done = subprocess.run([sys.executable, "-c", launcher, "-n", "2", "-p", str(min(_ports(2))), "--",
                           sys.executable, "-m", "flashconv.distributed"],
                          capture_output=True, text=True, timeout=120, stdin=subprocess.PIPE)
    assert done.stdout.splitlines() == [
        "process 0 of 2: 600 of 1200 rows, 7.4 of 14.7 MB; sent 90112 bytes",
        "process 1 of 2: 600 of 1200 rows, 7.4 of 14.7 MB; sent 57344 bytes",
        "together (3, 1200, 1024): the same as in one process"], done.stderr
