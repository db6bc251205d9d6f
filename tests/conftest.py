"""One seed for every test, and full float32 products on GPUs.

`FLASHCONV_DEVICE` (cpu or gpu) replaces MLX's default device. float64 is always worked on the CPU.
"""
import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import pytest
from flashconv import kernels

if "FLASHCONV_DEVICE" in os.environ:
    mx.set_default_device(getattr(mx, os.environ["FLASHCONV_DEVICE"]))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")


@pytest.fixture(scope="session")
def torch():
    "PyTorch, for the tests that need it in a file where others don't."
    return pytest.importorskip("oracle").torch


@pytest.fixture
def without_kernels():
    "What runs on a GPU, and on a CPU without a compiler."
    were_on = kernels.available()
    kernels.use(False)
    yield
    if were_on: kernels.use(True)


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random state, alone or in the whole run."
    mx.random.seed(0)
    try: import torch
    except ImportError: return
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    "How long the book takes: all notebooks, one after the other."
    runs = [report for reports in terminalreporter.stats.values() for report in reports
            if "::test_notebook[" in getattr(report, "nodeid", "")
            and getattr(report, "when", None) == "call"]
    if runs:
        terminalreporter.write_line(f"the book: {len(runs)} notebooks executed in "
                                    f"{sum(report.duration for report in runs):.0f} s in all")
