"""How a table is filled: competitors by rows, interleaved in one process, see README.md."""
import argparse
import fnmatch
import json
import math
import os
import pickle
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
from typing import NamedTuple

import flashconv  # before mlx.core, so that a fast BLAS is under it
import mlx.core as mx
import numpy as np

from competitors import switch

HERE = Path(__file__).resolve().parent
BLOCK = 0.005  # seconds that one sample lasts at least, over as many calls as that takes
COLD = 2  # seconds: a shorter call is preceded by one that doesn't count
PAUSE = 0.03  # seconds before a turn, in which the threads of the one before stop spinning


class Suite(NamedTuple):
    "A table: what is measured, of whom, and what is right. `module` has it as its SUITE."
    module: str
    rows: tuple  # NamedTuples with a name
    competitors: tuple  # of competitors.py
    passes: tuple  # methods of what a competitor makes
    arrays: object  # row -> what all competitors make theirs from
    reference: object  # row, arrays -> {pass: what PyTorch gives in twice the precision}
    tolerance: object  # row, pass -> error allowed, of the largest number
    facts: object  # row -> more that its figures are to be read with, as a dict
    slow: float  # seconds: what takes longer is timed once, when it is tried
    seconds: float  # spent on a competitor in a pass, after three rounds


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

def measure(suite, row, rounds, patience):
    "pass -> competitor -> result."
    data = suite.arrays(row)
    expected = suite.reference(row, data)
    tried = {c.name: probe(suite, row, c, expected, patience)
             for c in suite.competitors if c.probed}
    runners = {c.name: prepare(c, row, data) for c in suite.competitors}
    results = {}
    for which in suite.passes:
        entries = [enter(suite, c, which, runners[c.name], tried.get(c.name))
                   for c in suite.competitors]
        for entry in entries: warm_up(suite, entry, which, row, expected[which])
        interleave([e for e in entries if not e.note], which, rounds, suite.seconds)
        results[which] = {entry.competitor.name: entry.result() for entry in entries}
    mx.clear_cache()
    return results


def prepare(competitor, row, data):
    "What the competitor runs for a row, or the error that it raises."
    try:
        switch(competitor.blas, competitor.kernels)
        return competitor.make(row, data)
    except Exception as error: return error


def enter(suite, competitor, which, runner, tried):
    "An entry that is ready to run, or that says why not."
    entry = Entry(competitor, runner)
    if isinstance(runner, Exception): entry.note = cannot(runner)
    elif tried is not None:
        samples, workspace, note = tried[which]
        if note or max(samples) > suite.slow:
            entry.samples, entry.workspace, entry.note = samples, workspace, note or "once"
    return entry


def cannot(error):
    return f"cannot: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def warm_up(suite, entry, which, row, expected):
    "Run once to compile, check and weigh what is timed afterwards."
    if entry.note: return
    outputs, times = [], []
    def run():
        start = perf_counter()
        outputs[:] = getattr(entry.runner, which)()
        times.append(perf_counter() - start)
        return outputs
    try:
        switch(entry.competitor.blas, entry.competitor.kernels)
        entry.workspace = entry.runner.workspace(run)
        if not outputs: run()
        if times[0] > suite.slow: entry.samples, entry.note = times, "once"
        for got, want in zip(entry.runner.numpy(outputs), expected):
            error = np.abs(got - want).max() / np.abs(want).max()
            if not error < suite.tolerance(row, which):
                entry.samples, entry.note = [], f"wrong: off by {error:.1e} of the largest"
    except Exception as error: entry.samples, entry.note = [], cannot(error)


def interleave(entries, which, rounds, enough):
    "Sample every entry once a round, until its share of time is spent."
    calls = {}
    for turn in range(rounds):
        for entry in entries:
            name, run = entry.competitor.name, getattr(entry.runner, which)
            if turn >= 3 and sum(entry.samples) * calls[name] >= enough: continue
            switch(entry.competitor.blas, entry.competitor.kernels)
            sleep(PAUSE)
            once = seconds(run)  # no sample if short: it brings the row back into the caches
            calls.setdefault(name, max(1, math.ceil(BLOCK / once)))
            entry.samples.append(once if once > COLD else seconds(run, calls[name]))


def seconds(run, calls=1):
    "How long a call takes, on average over a few."
    start = perf_counter()
    for _ in range(calls): run()
    return (perf_counter() - start) / calls


# Another process, for what may take seconds, eat the memory or end the process ----------------

def probe(suite, row, competitor, expected, patience):
    "pass -> (samples, workspace, note), as found in another process."
    where = suite.rows.index(row), suite.competitors.index(competitor)
    code = f"import timing, {suite.module} as m; timing.try_out(m.SUITE, *{where})"
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=patience,
                              input=pickle.dumps(expected), stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
        printed, end = done.stdout, "cannot: ends the process"
    except subprocess.TimeoutExpired as late:
        printed, end = late.stdout or b"", f"cannot: takes more than {patience} s"
    found = {which: ([], None, end) for which in suite.passes}
    return {**found, **dict(json.loads(line) for line in printed.splitlines())}


def try_out(suite, row, competitor):
    "What the other process does: run a competitor once a pass, and print how it went."
    expected = pickle.load(sys.stdin.buffer)
    limit_memory()
    row, competitor = suite.rows[row], suite.competitors[competitor]
    runner = prepare(competitor, row, suite.arrays(row))
    for which in suite.passes:
        entry = enter(suite._replace(slow=0), competitor, which, runner, None)
        warm_up(suite._replace(slow=0), entry, which, row, expected[which])
        note = "" if entry.note == "once" else entry.note
        print(json.dumps([which, (entry.samples, entry.workspace, note)]), flush=True)


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


def arguments(suite, description, example):
    "What was asked for on the command line."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", default="*", metavar="PATTERN",
                        help=f"measure rows with such names only, such as {example!r}")
    parser.add_argument("--quick", action="store_true",
                        help="three rounds, up to ten until 0.1 s are spent on one competitor, "
                             "and mlx.nn is given up after 10 s on a row")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write all files there; needed unless all rows are measured")
    options = parser.parse_args()
    options.chosen = [row for row in suite.rows if fnmatch.fnmatch(row.name, options.rows)]
    if not options.chosen:
        parser.error(f"no row is called {options.rows!r}: "
                     f"{'; '.join(row.name for row in suite.rows)}")
    if options.out is None and (options.quick or len(options.chosen) < len(suite.rows)):
        options.out = Path(tempfile.mkdtemp(prefix="flashconv-"))  # not over the full figures
    return options


def run(suite, options, floors, write):
    "The chosen rows' figures, and the floors they are held to; written after each row."
    rounds, patience = (10, 10) if options.quick else (20, 120)
    if options.quick: suite = suite._replace(slow=1, seconds=0.1)
    found = {"machine": machine(), "rounds": rounds, "rows": []}
    for done, row in enumerate(options.chosen):
        progress(done, len(options.chosen), row.name)
        found["rows"].append({**row._asdict(), **suite.facts(row),
                              "passes": measure(suite, row, rounds, patience)})
        found["machine"]["load_after"] = os.getloadavg()
        found["floors"] = [floor._asdict() for floor in floors(found["rows"])]
        write(found)
    progress(len(options.chosen), len(options.chosen), "done")
    return found
