"""The first cases of seed 0 of the long run, `make fuzz`, judged by PyTorch.

A failure prints the line that repeats it alone; fuzz.py draws the cases, judge.py judges them.
"""
import sys

import pytest
from fuzz import Worker, alike, command, draw, shrink, smaller
from judge import verdict

CASES, PARTS = 600, 12


@pytest.mark.parametrize("part", range(PARTS))
def test_cases(part):
    "The same refusals, results and gradients; few are refused."
    words = []
    for number in range(part, CASES, PARTS):
        case = draw(0, number)
        word, failure = verdict(case)
        assert failure is None, f"{failure}\n{command(case)}"
        words.append(word)
    assert words.count("equal") > 0.6 * len(words)


def test_shrinking():
    "A failure that needs two dilated taps is shrunk to those and nothing else."
    def fails(case):
        dilation = case["kw"].get("dilation", 1)
        wide = max(case.get("kernel", [1])) > 1 and dilation not in (1, [1] * len(case["sizes"]))
        return "gradient 0: off by 3.5" if wide else None
    cases = (draw(0, number) for number in range(200))
    found = [case for case in cases if fails(case)]
    assert len(found) > 20
    for case in found:
        small, failure = shrink(case, fails(case), fails)
        assert fails(small) and not any(map(fails, smaller(small)))
        assert max(small["kernel"]) == 2 and small["batch"] in (None, 0, 1) and small["in"] <= 1
        assert not {"of", "axes", "jvp", "compile", "views", "dtype"} & small.keys()


def test_a_case_is_the_same_each_time():
    "A number stands for one case, whatever was drawn before it."
    assert draw(3, 7) == draw(3, 7) != draw(3, 8)
    assert alike("gradient 0: error 3.5e+3") == alike("gradient 1: error 2")


@pytest.mark.parametrize("program, seconds, word, failure", (
    ("input(); import os; os.abort()", 60, "crash", "the process ended with -6"),
    ("raise SystemExit(3)", 60, "crash", "the process ended with 3"),
    ("import time; time.sleep(60)", 1, "hang", "no answer in 1 seconds"),
    ("while input(): print('[\"wrong\", \"by 3\"]', flush=True)", 60, "wrong", "by 3"),
))
def test_processes_that_die(program, seconds, word, failure):
    "A crash and a hang are verdicts like others, and the next case has a new process."
    worker = Worker()
    worker.command = [sys.executable, "-c", program]
    for _ in range(2):
        assert tuple(worker({}, seconds)) == (word, failure)
    if worker.process: worker.process.kill()


FOUND = (  # by `make fuzz`, and mended since
    {"kind": "conv_transpose", "batch": 1, "in": 1, "seed": 344, "groups": 1, "out": 1, "of": 0,
     "kw": {"dilation": [1, 2], "output_padding": [0, 1]}, "kernel": [1, 1], "sizes": [1, 1],
     "dtype": "complex64"},
)


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    "What failed once."
    _, failure = verdict(case)
    assert failure is None, f"{failure}\n{command(case)}"
