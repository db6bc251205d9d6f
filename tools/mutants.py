"""Do the tests bite? Change the package in one place, run the tests, and see whether one fails.

`make mutants` takes a sample from each module and writes one line a mutant to `mutants.jsonl`. What
is in there is not run again, so a run that was cut goes on, and a larger sample adds to it.

    python tools/mutants.py                       # a sample of every module, then the score
    python tools/mutants.py padding --sample 999  # every mutant of one module
    python tools/mutants.py --again               # those that survived, after a test was written
    python tools/mutants.py --again --whole       # and what survives then, against the whole suite
    python tools/mutants.py --show                # the survivors as diffs

The operators are mutmut's (https://mutmut.readthedocs.io) and two more: a statement is dropped, a
branch is never taken. mutmut itself leaves out decorated functions, which with `@patch` is most of
the methods here. Left alone are annotations, docstrings and the words of messages. A mutant runs
in a copy of the repository, in a fork of a process that has imported PyTorch but not flashconv: the
tests of its module, the fastest first, then its notebook, in which the same cell is changed, each
with a time limit. `test_package.py` is not among them: it finds every mutant, as a stale export.
"""
import argparse
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "mutants.jsonl"
WORKERS, MEMORY, SEED = 2, 8 * 2**30, 0
TESTS = {  # module: (size of its sample, the quick tests that own it, the slow ones)
    "arguments": (30, "errors pad layers", "transforms functional"),
    "arithmetic": (60, "arithmetic errors pad layers choice", "transforms functional"),
    "geometry": (40, "errors pad layers choice", "transforms functional"),
    "padding": (70, "pad errors layers", "transforms functional"),
    "dilation": (16, "", "transforms"), "memory": (16, "memory", ""), "blas": (16, "", "blas"),
    "functional": (30, "errors layers choice random", "transforms functional"),
    "base": (40, "lazy errors layers", "transforms"), "conv": (30, "errors layers", "transforms"),
    "transposed": (40, "errors lazy layers", "transforms"),
    "lazy": (30, "lazy errors layers", "transforms"),
    "draw": (15, "draw", ""), "demo": (8, "demo", ""),
    "convert.layers": (20, "swap convert", "models"), "convert.state": (20, "state", "models"),
    "convert.models": (25, "models", "swap"), "convert.swap": (12, "swap", "models"),
    "algorithms.choice": (60, "choice random", "transforms functional"),
    "algorithms.derivatives": (50, "choice layers", "transforms functional"),
    "algorithms.explain": (15, "choice", ""),
    "algorithms.tiles": (40, "random choice", "transforms functional"),
    **{f"algorithms.{name}": (20, "random choice", "transforms functional")
       for name in ("fft", "gpu", "matmul", "native", "overlap", "places", "taps", "weights")}}


# Mutants -------------------------------------------------------------------------------------

def mutants(module, size):
    "A seeded sample of a module's mutants: their names, each with the text of the module."
    changes = sorted(_changes(path_of(module).read_text(encoding="utf-8")),
                     key=lambda change: _digest(f"{SEED} {module} {change[0]}"))
    found = {}
    for words, text in changes:
        if len(found) == size: break
        text = text()
        if _compiles(text): found[f"{module} {_digest(words)}"] = text
    return found


def path_of(module, root=ROOT): return root / "flashconv" / (module.replace(".", "/") + ".py")


def _digest(text): return hashlib.sha1(text.encode()).hexdigest()[:12]


def _compiles(text):
    try: compile(text, "mutant", "exec")
    except SyntaxError: return False
    return True


def _changes(source):
    "All changes in one place: what they are, and a function that gives the whole text."
    import libcst as cst
    from mutmut.mutation.mutators import mutation_operators

    def drop(node):
        value = node.body[0].value if isinstance(node.body[0], cst.Expr) else None
        if isinstance(node.body[0], (cst.Raise, cst.Return)) or isinstance(value, cst.Call):
            yield node.with_changes(body=[cst.Pass()])

    def never(node): yield node.with_changes(test=cst.Name("False"))

    operators = [*mutation_operators, (cst.SimpleStatementLine, drop), (cst.If, never)]
    changes = []

    class Visitor(cst.CSTVisitor):
        def on_visit(self, node):
            if isinstance(node, (cst.Annotation, cst.Import, cst.ImportFrom)): return False
            if isinstance(node, (cst.ConcatenatedString, cst.FormattedString)): return False
            if isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString): return False
            if isinstance(node, cst.Assign) and node.targets[0].target.deep_equals(
                    cst.Name("__all__")): return False
            for kind, operator in operators:
                if not isinstance(node, kind): continue
                new = operator(node)
                if kind is cst.BaseString: new = list(new)[:1]  # not in upper and lower case, too
                changes.extend((node, other) for other in new)
            return True

    tree, seen = cst.parse_module(source), Counter()
    tree.visit(Visitor())
    for node, other in changes:
        words = tree.code_for_node(node) + " -> " + tree.code_for_node(other)
        seen[words] += 1
        yield f"{words} ({seen[words]})", partial(_replaced, tree, node, other)


def _replaced(tree, node, other): return tree.deep_replace(node, other).code


# Running -------------------------------------------------------------------------------------

class Copy:
    "A copy of the repository whose package may be broken."
    def __init__(self, folder):
        self.root, self.limits = Path(folder) / "flashconv", {}
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "_proc", "_docs", "mutants.jsonl", "*.egg-info"))
        subprocess.run([sys.executable, "-m", "compileall", "-q", "--invalidation-mode",
                        "checked-hash", self.root / "flashconv"], check=True)

    def killer(self, module, text, stages):
        "The first of `stages` that fails for a mutant; None if it survives them."
        path = path_of(module, self.root)
        whole, notebook = path.read_text(encoding="utf-8"), self.root / notebook_of(module)
        pages = notebook.read_text(encoding="utf-8")
        for stage in map(tuple, stages):
            if stage not in self.limits:  # the untouched package passes, in this time
                start = time.monotonic()
                word = self.run(stage, 1200)
                if word: raise RuntimeError(f"{stage} fails without a mutant: {word}")
                self.limits[stage] = 20 + 4 * (time.monotonic() - start)
            try:
                path.write_text(text, encoding="utf-8")
                notebook.write_text(_in_notebook(pages, whole, text), encoding="utf-8")
                word = self.run(stage, self.limits[stage])
            finally:
                path.write_text(whole, encoding="utf-8")
                notebook.write_text(pages, encoding="utf-8")
            if word: return word

    def run(self, stage, limit):
        "How one stage fails in a child process; None if it passes."
        log = self.root / "log"
        child = os.fork()
        if not child: self._test(stage, log)
        until = time.monotonic() + limit
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.monotonic() > until: break
            time.sleep(0.02)
        try: os.killpg(child, signal.SIGKILL)
        except ProcessLookupError: pass
        if not done:
            os.waitpid(child, 0)
            return "time"
        if status == 0: return None
        failed = re.search(r"^(?:FAILED|ERROR) (.*)", log.read_text(errors="replace"), re.M)
        return failed[1] if failed else f"status {status}"

    def _test(self, stage, log):
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for fd in (1, 2): os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
        os.chdir(self.root)
        os.environ["PYTHONPATH"] = str(self.root)
        sys.path[:] = [str(self.root)] + [p for p in sys.path if p not in ("", str(ROOT))]
        import pytest
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", *stage]))


def notebook_of(module):
    return re.search(r"File to edit: [./]*(\S+ipynb)", path_of(module).read_text())[1]


def _in_notebook(pages, whole, text):
    "The notebook, which defines the module's names itself, with the cell that differs in `text`."
    notebook = json.loads(pages)
    for old, new in zip(whole.split("\n# %% ")[1:], text.split("\n# %% ")[1:]):
        if old == new: continue
        head, _, source = new.partition("\n")
        cell, = (c for c in notebook["cells"] if c["id"] == head.rpartition("#")[2])
        cell["source"] = ["#| export\n", source.rstrip("\n")]
    return json.dumps(notebook)


def stages(module, whole):
    "What a mutant has to survive, in order."
    notebook = notebook_of(module)
    _, quick, slow = TESTS[module]
    files = [[f"tests/test_{name}.py" for name in names.split()] for names in (quick, slow)]
    if whole: return [[file] for file in files[1]]
    return [*filter(None, files[:1]), [f"tests/test_notebooks.py::test_notebook[{notebook}]"]]


def judge(jobs):
    "Judge mutants of a module, one after the other, and write down each verdict."
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(folder)
        for name, text, todo in jobs:
            verdict = {"name": name, "killer": copy.killer(name.split()[0], text, todo)}
            with RESULTS.open("a") as file: file.write(json.dumps(verdict) + "\n")


def verdicts():
    "The last verdict on each mutant: what killed it, or None."
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {verdict["name"]: verdict["killer"] for verdict in map(json.loads, lines)}


def main():
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("modules", nargs="*", help="arithmetic, algorithms.choice and so on; else all")
    ask.add_argument("--sample", type=int, help="how many mutants of each module")
    for flag in ("again", "whole", "show"): ask.add_argument(f"--{flag}", action="store_true")
    given = ask.parse_args()
    known, batches, texts = verdicts(), [], {}
    for module in given.modules or TESTS:
        found = mutants(module, given.sample or TESTS[module][0])
        todo = stages(module, given.whole)
        batches.append([(name, text, todo) for name, text in found.items()
                        if name not in known or given.again and known[name] is None])
        texts |= found
    if given.show:
        for name in texts:
            if known.get(name, "") is None: print(name, *_difference(name, texts[name]), sep="\n")
        return
    for module in ("torch", "mlx.nn", "matplotlib.pyplot", "nbclient", "pytest"):
        try: __import__(module)
        except ImportError: pass
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        batches = sorted(filter(None, batches), key=len, reverse=True)
        for _ in pool.imap_unordered(judge, batches): pass
    known = verdicts()
    judged = Counter(name.split()[0] for name in texts if name in known)
    killed = Counter(name.split()[0] for name in texts if known.get(name))
    for module in judged: print(f"{module:24}{killed[module]:4} of {judged[module]:4} killed")
    print(f"{'in all':24}{killed.total():4} of {judged.total():4} killed")


def _difference(name, text):
    before = path_of(name.split()[0]).read_text(encoding="utf-8").splitlines()
    lines = difflib.unified_diff(before, text.splitlines(), lineterm="", n=0)
    return list(lines)[2:]


if __name__ == "__main__": main()
