"""Time the steps from a loop to tiles, which the pages on kernels explain: see README.md."""
import argparse
import ctypes
import json
import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np

from flashconv.kernels import build
from flashconv.kernels.pool import threads

HERE = Path(__file__).resolve().parent
STEPS = "loop", "vectors", "blocks", "tiles", "threads"
CHANNELS, PLACES, KERNEL = 64, 56, 3  # a layer of ResNet's first stage, whose input is padded before
ROUNDS = 50
MULTIPLY_ADDS = 2_000_000  # of each sum in the peak's loop: some 10 ms


def compiled():
    "The steps as a library."
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/steps.so"
        subprocess.run([*build.compiler(), *build.kernels().flags, f"-I{build.SOURCES}",
                        HERE / "steps.cpp", "-o", file], check=True)
        return ctypes.CDLL(file)


def arrays():
    "The layer's numbers, x with room behind it, w and y."
    random, size = np.random.default_rng(0), PLACES + KERNEL - 1
    layer = np.array([CHANNELS, size, size, CHANNELS, PLACES, PLACES, KERNEL, 1, 1, 0])
    x = random.standard_normal(CHANNELS * size * size + 64).astype(np.float32)
    w = random.standard_normal((CHANNELS, CHANNELS, KERNEL, KERNEL)).astype(np.float32)
    return layer, x, w, np.empty((CHANNELS, PLACES, PLACES), np.float32)


def measure(library, rounds):
    "GFLOP/s of every step and of the peak, by name."
    layer, x, w, y = arrays()
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (layer, x, w, y)]
    runs = {step: lambda call=library[step]: call(*pointers) for step in STEPS}
    for run in runs.values():
        run()
        if run is runs["loop"]: expected = y.copy()
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
        y[:] = np.nan
    runs["peak"] = lambda: library.peak(ctypes.c_int64(MULTIPLY_ADDS))
    work = dict.fromkeys(STEPS, 2 * w.size * PLACES**2)
    work["peak"] = 2 * MULTIPLY_ADDS * library.lanes_of_peak()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            clock = perf_counter if name == "threads" else thread_time  # not what others take
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return {name: work[name] / seconds / 1e9 for name, seconds in best.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, for a first impression")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="write steps.json there")
    options = parser.parse_args()
    library, count = compiled(), threads()
    library.use_threads(ctypes.c_int64(count))
    gflops = measure(library, 2 if options.quick else ROUNDS)
    found = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load": os.getloadavg(),
             "machine": platform.machine(), "threads": count, "gflops": gflops}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "steps.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, speed in gflops.items(): print(f"{name:8} {speed:7.1f} GFLOP/s")


if __name__ == "__main__": main()
