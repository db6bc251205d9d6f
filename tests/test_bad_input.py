"""Nonsense for every argument, in processes of their own: see `bad_input.py`.

The ordinary run takes each value to one of the three ranks of a layer and to one in eight pictures;
`FLASHCONV_EXAMPLES=2` takes all of them. `python tests/bad_input.py GROUP SUBJECT ARGUMENT VALUE`
repeats one case.
"""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import flashconv

pytest.importorskip("resource", reason="no limits on memory here")
pytest.importorskip("matplotlib", reason="the pictures need it")
bad_input = importlib.import_module("bad_input")

NOT_CALLED_BY_USERS = {  # public to other modules, which pass what has been checked
    "arguments": {"as_int", "as_tuple", "as_ints", "PADDINGS", "is_one_of", "is_paired", "as_pairs",
                  "as_padding", "kept_padding"},
    "arithmetic": {"ReceptiveField", "fixed_pair"},
    "geometry": {"check_limit", "Geometry", "conv_geometry", "causal_rule"},
    "padding": {"check_array", "flip", "pad_axes"}, "blas": {"Info"}, "base": {"IncompatibleKeys"},
    "draw": {"Picture", "BLUE", "ORANGE", "CYAN", "INK", "GREY", "PAPER", "WIDTH", "HEIGHT",
             "FONT"},
    "plain": {"refuse", "check_plain", "pad_plainly", "convolve_plainly", "check_fixed"},
    "explain": {"Run", "Explanation"}}
WITHOUT_ARGUMENTS = {"fast", "load", "info", "raise_cache_limit", "plain_operations", "is_plain"}


@pytest.mark.parametrize("group", bad_input.SUBJECTS)
def test_nonsense(group):
    "A call works or says which argument is wrong; nothing crashes, hangs, or is changed."
    script = Path(bad_input.__file__)
    run = subprocess.run([sys.executable, script, group], capture_output=True, text=True,
                         timeout=300)
    last = run.stderr.splitlines()[-1:]
    assert run.returncode == 0, f"ended with {run.returncode} at {last}: {run.stderr[-3000:]}"
    found = [json.loads(line) for line in run.stdout.splitlines()]
    broken = [f"{each['subject']} {why}" for each in found for why in each["broken"]]
    assert not broken, f"{len(broken)} broken:\n" + "\n".join(broken[:40])
    assert {each["subject"] for each in found} == set(bad_input.SUBJECTS[group])


def test_every_public_function_is_attacked():
    subjects = {name.rpartition(".")[2] for group in bad_input.SUBJECTS.values() for name in group}
    modules = ("arguments", "arithmetic", "geometry", "padding", "dilation", "functional", "base",
               "conv", "transposed", "lazy", "convert", "draw", "blas", "memory",
               "algorithms.explain", "init", "plain")
    names = set(flashconv.__all__) - {"blas", "distributed", "functional", "init", "streaming"}
    for module in modules:
        public = importlib.import_module(f"flashconv.{module}").__all__
        names |= set(public) - NOT_CALLED_BY_USERS.get(module.rpartition(".")[2], set())
    if not bad_input.torch: names -= {"from_torch", "to_torch"}
    assert names - subjects - WITHOUT_ARGUMENTS == set()
