"""Time flashconv's layers beside mlx.nn's and PyTorch's, all in one run: see README.md."""
import argparse
import fnmatch
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter, sleep

import flashconv  # before mlx.core, so that a fast BLAS is under it
import mlx.core as mx
import numpy as np

import report
from competitors import COMPETITORS, arrays, reference, switch
from rows import ROWS

HERE = Path(__file__).resolve().parent
PASSES = "forward", "gradients"
SLOW = 2  # seconds: what takes longer is timed once, when it is tried
BLOCK = 0.005  # seconds that one sample lasts at least, over as many calls as that takes
PAUSE = 0.03  # seconds before a turn, in which the threads of the one before stop spinning
TOLERANCE = {"float16": 0.02, "bfloat16": 0.1}  # of the largest number; 1e-3 otherwise


@dataclass
class Entry:
    "One competitor on one row in one pass: how it runs, and what was found."
    competitor: object
    runner: object = None
    samples: list = field(default_factory=list)  # seconds a call
    workspace: int | None = None  # bytes
    note: str = ""  # why there is no time, or one only

    def result(self):
        "What goes into the JSON; times in milliseconds."
        found = {"samples": len(self.samples), "workspace": self.workspace, "note": self.note}
        if not self.samples: return found
        return {"median": 1e3 * statistics.median(self.samples),
                "min": 1e3 * min(self.samples), **found}


# One row --------------------------------------------------------------------------------------

def measure(row, rounds, patience):
    "pass -> competitor -> result."
    data = arrays(row)
    expected = reference(row, data)
    tried = {c.name: probe(row, c.blas, patience) for c in COMPETITORS if c.probed}
    runners = {c.name: prepare(c, row, data) for c in COMPETITORS}
    results = {}
    for which in PASSES:
        entries = [enter(c, which, runners[c.name], tried.get(c.name)) for c in COMPETITORS]
        for entry in entries: warm_up(entry, which, row, expected)
        interleave([e for e in entries if not e.note], which, rounds)
        results[which] = {entry.competitor.name: entry.result() for entry in entries}
    mx.clear_cache()
    return results


def prepare(competitor, row, data):
    "The competitor's layer for a row, or the error that it raises."
    try:
        switch(competitor.blas)
        return competitor.make(row, data)
    except Exception as error: return error


def enter(competitor, which, runner, tried):
    "An entry that is ready to run, or that says why not."
    entry = Entry(competitor, runner)
    if isinstance(runner, Exception): entry.note = cannot(runner)
    elif tried is not None and which in tried:
        seconds, entry.workspace, entry.note = tried[which]
        if seconds is not None and seconds > SLOW:
            entry.samples, entry.note = [seconds], "once"
    return entry


def cannot(error):
    return f"cannot: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def warm_up(entry, which, row, expected):
    "Run once to compile, check and weigh what is timed afterwards."
    if entry.note: return
    run, tolerance = getattr(entry.runner, which), TOLERANCE.get(row.dtype, 1e-3)
    try:
        switch(entry.competitor.blas)
        times = []
        outputs = timed(run, times)
        if times[0] > SLOW: entry.samples, entry.note = times, "once"
        for got, want in zip(entry.runner.numpy(outputs), expected):
            error = np.abs(got - want).max() / np.abs(want).max()
            if not error < tolerance:
                entry.samples, entry.note = [], f"wrong: off by {error:.1e} of the largest"
        entry.workspace = entry.runner.workspace(run)
    except Exception as error: entry.samples, entry.note = [], cannot(error)


def interleave(entries, which, rounds):
    "Sample every entry once a round, until its share of time is spent."
    calls = {}
    for turn in range(rounds):
        for entry in entries:
            name, run = entry.competitor.name, getattr(entry.runner, which)
            switch(entry.competitor.blas)
            sleep(PAUSE)
            once = seconds(run)  # not a sample: it brings the row back into the caches
            calls.setdefault(name, max(1, math.ceil(BLOCK / once)))
            if turn < 3 or sum(entry.samples) * calls[name] < 1:
                entry.samples.append(seconds(run, calls[name]))


def seconds(run, calls=1):
    "How long a call takes, on average over a few."
    start = perf_counter()
    for _ in range(calls): run()
    return (perf_counter() - start) / calls


# Another process, for what may take seconds, eat the memory or end the process ----------------

def probe(row, which_blas, patience):
    "pass -> (seconds, workspace, note) of mlx.nn, as found in another process."
    code = f"import layers; layers.try_out({ROWS.index(row)}, {which_blas!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=patience,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        printed, end = done.stdout, "cannot: ends the process"
    except subprocess.TimeoutExpired as late:
        printed, end = late.stdout or b"", f"cannot: takes more than {patience} s"
    found = {which: (None, None, end) for which in PASSES}
    return {**found, **dict(json.loads(line) for line in printed.splitlines())}


def try_out(index, which_blas):
    "What the other process does: run mlx.nn's layer once a pass, and print how it went."
    limit_memory()
    row = ROWS[index]
    data = arrays(row)
    competitor = next(c for c in COMPETITORS if c.probed and c.blas == which_blas)
    runner = prepare(competitor, row, data)
    for which in PASSES:
        try:
            if isinstance(runner, Exception): raise runner
            times = []
            weight = runner.workspace(lambda: timed(getattr(runner, which), times))
            outcome = times[0], weight, ""
        except Exception as error: outcome = None, None, cannot(error)
        print(json.dumps([which, outcome]), flush=True)


def timed(run, times):
    "Run once, and note how long it took."
    start = perf_counter()
    outputs = run()
    times.append(perf_counter() - start)
    return outputs


def limit_memory():
    "Let this process have three quarters of the machine's memory: others need some."
    if sys.platform != "linux": return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (memory * 3 // 4, memory * 3 // 4))


# The run --------------------------------------------------------------------------------------

def machine():
    "Where the figures come from."
    import torch
    torch.set_num_threads(os.cpu_count())
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cpu": cpu(), "cores": os.cpu_count(), "platform": platform.platform(),
            "load": os.getloadavg(), "python": platform.python_version(),
            "flashconv": flashconv.__version__, "mlx": mx.__version__,
            "torch": torch.__version__, "torch_threads": torch.get_num_threads(),
            "numpy": np.__version__, "blas": {name: blas(name) for name in ("fast", "stock")}}


def cpu():
    "The processor's model."
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def blas(which):
    "What MLX multiplies with under this name."
    try: switch(which)
    except ValueError as error: return str(error)
    return repr(flashconv.blas.info())


def progress(done, total, name):
    "One line on a terminal, one line a row elsewhere."
    bar = "#" * (20 * done // total)
    end = "" if sys.stderr.isatty() and done < total else "\n"
    start = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{start}[{bar:20}] {done}/{total} {name}", end=end, file=sys.stderr, flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="*", metavar="PATTERN",
                        help="measure rows with such names only, such as 'depthwise*'")
    parser.add_argument("--quick", action="store_true",
                        help="three rounds, and mlx.nn is given up after 10 s on a row")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write all three files there; needed unless all rows are measured")
    options = parser.parse_args()
    options.chosen = [row for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    if not options.chosen:
        parser.error(f"no row is called {options.rows!r}: {'; '.join(r.name for r in ROWS)}")
    if options.out is None and (options.quick or len(options.chosen) < len(ROWS)):
        options.out = Path(tempfile.mkdtemp(prefix="flashconv-"))  # not over the full figures
    return options


def main():
    options = arguments()
    rounds, patience = (3, 10) if options.quick else (20, 120)
    found = {"machine": machine(), "rounds": rounds, "rows": []}
    for done, row in enumerate(options.chosen):
        progress(done, len(options.chosen), row.name)
        found["rows"].append({**row._asdict(), "passes": measure(row, rounds, patience)})
    progress(len(options.chosen), len(options.chosen), "done")
    found["machine"]["load_after"] = os.getloadavg()
    found["floors"] = [floor._asdict() for floor in report.floors(found["rows"])]
    results, pictures = options.out or HERE, options.out or HERE.parent / "nbs" / "images"
    report.write(found, results / "results.json", results / "results.md",
                 pictures / "benchmark.svg")
    print(report.summary(found))
    print(f"wrote {results}/results.json, results.md and {pictures}/benchmark.svg")


if __name__ == "__main__": main()
