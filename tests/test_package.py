"""The package as it is imported, and the repository as it is committed."""
import ast
import configparser
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashconv

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in ROOT.glob("nbs/**/*.ipynb")
                   if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT).parts))
MODULES = ["flashconv"] + [m.name for m in pkgutil.walk_packages(flashconv.__path__, "flashconv.")
                           if not m.name.endswith(("__main__", "_modidx"))]


def python(code, cwd=None, *, flags=(), **variables):
    "What a child process prints. FLASHCONV_EFFECTS is as given."
    environ = {name: value for name, value in os.environ.items() if name != "FLASHCONV_EFFECTS"}
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True,
                          cwd=cwd, env=environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The import ----------------------------------------------------------------------------------

@pytest.mark.parametrize("module", ("matplotlib", "torch", "PIL", "nbdev", "IPython", "asyncio",
                                    "flashconv.draw", "flashconv.convert.operations"))
def test_import_leaves_out(module):
    "What drawing, judging, building and converting programs need is not loaded with the layers."
    assert python(f"import sys, flashconv; print({module!r} in sys.modules)") == "False\n"


def test_import_is_light():
    "MLX, NumPy and fastcore are all that it loads beside Python's own modules."
    code = ("import os, sys\nos.environ['FLASHCONV_BLAS'] = 'off'\nbefore = set(sys.modules)\n"
            "import flashconv\nloaded = {name.partition('.')[0] for name in {*sys.modules} - before}\n"
            "print(sorted(loaded - sys.stdlib_module_names))")
    loaded = ast.literal_eval(python(code))
    assert set(loaded) == {"flashconv", "mlx", "numpy", "fastcore"}


def test_import_leaves_mlx_alone():
    "The default device and the random state are the user's."
    code = ("import mlx.core as mx\nmx.random.seed(3)\n"
            "def state(): return mx.default_device(), mx.random.state[0].tolist()\n"
            "before = state()\nimport flashconv\nprint(before == state())")
    assert python(code) == "True\n"


# What can be seen of a process from inside, after everything that any program with MLX may load.
PROCESS = """
import ctypes, os, signal, sys, threading, warnings
import fastcore.basics, fastcore.meta, mlx.core as mx, mlx.nn, numpy
def process():
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    libraries, table = set(), []
    if sys.platform == "linux":
        lines = open("/proc/self/maps").read().splitlines()
        libraries = {line.split()[-1] for line in lines if ".so" in line and "cpython" not in line}
    return dict(
        limit=limit, libraries=libraries, environment=dict(os.environ), flags=sys.getdlopenflags(),
        filters=list(warnings.filters), hooks=[sys.excepthook, sys.displayhook, *sys.meta_path],
        signals=[signal.getsignal(n) for n in signal.valid_signals()],
        threads=threading.active_count(), device=mx.default_device(), path=list(sys.path),
        stream=mx.default_stream(mx.cpu), random=mx.random.state[0].tolist(),
        active=mx.get_active_memory(), numpy=numpy.geterr())
before = process()
import flashconv
after = process()
changed = [name for name in before if before[name] != after[name]]
own = flashconv.blas._own() if flashconv.blas._slots() else {}
if any(slot.value != own[name] for name, slot in flashconv.blas._slots()): changed.append("table")
print(*changed)
"""


@pytest.mark.parametrize("variables", ({}, {"FLASHCONV_BLAS": "on"}, {"FLASHCONV_BLAS": "/no/such.so"}),
                         ids=str)
def test_import_without_effects(variables):
    "FLASHCONV_EFFECTS=off changes nothing and says nothing, whatever else is set."
    off = python(PROCESS, flags=("-W", "error"), FLASHCONV_EFFECTS="off", **variables)
    assert off == "\n"


@pytest.mark.skipif(not flashconv.blas._slots(), reason="nothing is changed on macOS but the limit")
def test_import_with_effects():
    "What the test above would see otherwise: the limit, and with a fast BLAS the rest."
    has_one = next(flashconv.blas._usable(), None)
    changed = python(PROCESS, FLASHCONV_EFFECTS="on", FLASHCONV_BLAS="on" if has_one else "off")
    assert changed.split() == (["limit", "libraries", "table"] if has_one else ["limit"])


EMBEDDED = "import os\nos.environ.setdefault('FLASHCONV_EFFECTS', 'off')\n"


@pytest.mark.parametrize("first, variables, is_off", (
    (EMBEDDED, {}, True), (EMBEDDED, {"FLASHCONV_EFFECTS": "on"}, False),
    ("import flashconv\n" + EMBEDDED, {}, False), ("", {}, False), ("", {"FLASHCONV_EFFECTS": ""}, False),
    (EMBEDDED + "import flashconv\nflashconv.memory.raise_cache_limit()\n", {}, False)),
    ids=("a library", "the user's word", "imported before", "nobody", "empty", "later, by hand"))
def test_who_decides_on_effects(first, variables, is_off):
    "A library before the first import, and the user before the library."
    code = "import flashconv, mlx.core as mx\nprint(mx.set_cache_limit(0))"
    alone = int(python("import mlx.core as mx\nprint(mx.set_cache_limit(0))"))
    if alone != flashconv.memory._MLX_LIMIT: pytest.skip("MLX keeps more than that by itself here")
    limit = int(python(first + code, FLASHCONV_BLAS="off", **variables))
    assert (limit == alone) == is_off


@pytest.mark.parametrize("value", ("OFF", "0", "none"))
def test_effects_set_wrongly(value):
    "A misspelt switch is an error that names it."
    code = "try: import flashconv\nexcept ValueError as error: print(error)"
    assert python(code, FLASHCONV_EFFECTS=value) == (
        f"FLASHCONV_EFFECTS must be on or off, but is {value!r}\n")


@pytest.mark.parametrize("module", MODULES)
def test_all(module):
    "Every name in `__all__` exists, once."
    module = importlib.import_module(module)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    for name in names: assert hasattr(module, name), name


def test_names_of_pytorch():
    "The names of PyTorch that stand at the top of the package, and in `functional`."
    layers = {f"{lazy}Conv{transpose}{n}d" for lazy in ("", "Lazy")
              for transpose in ("", "Transpose") for n in (1, 2, 3)}
    functions = {f"conv{transpose}{n}d" for transpose in ("", "_transpose") for n in (1, 2, 3)}
    assert layers | {"functional"} <= set(flashconv.__all__)
    assert functions | {"pad"} <= set(flashconv.functional.__all__)


def test_version():
    "The package's version is the one in settings.ini."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert flashconv.__version__ == settings["DEFAULT"]["version"]


# The repository ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    "A copy of the repository in which nbdev may write: exported again from nothing, and cleaned."
    pytest.importorskip("nbdev", reason="nbdev is not installed")
    copy = tmp_path_factory.mktemp("copy") / "flashconv"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "_proc", "_docs", "build", "dist", "*.egg-info"))
    for path in (copy / "flashconv").rglob("*.py"):
        if is_export(path): path.unlink()
    python("from nbdev.doclinks import nbdev_export\nnbdev_export()", copy)
    python("from nbdev.clean import nbdev_clean\nnbdev_clean()", copy)
    return copy


def is_export(path):
    return path.name == "_modidx.py" or "AUTOGENERATED" in path.read_text(encoding="utf-8")


def test_exports_are_fresh(copied):
    "Exporting the notebooks gives the files in flashconv/: none is missing, stale or edited."
    def files(root): return {p.relative_to(root): p.read_text(encoding="utf-8")
                             for p in sorted((root / "flashconv").rglob("*.py"))}
    ours, exported = files(ROOT), files(copied)
    assert ours.keys() == exported.keys()
    for path in ours: assert ours[path] == exported[path], f"{path} differs: run nbdev_export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_notebooks_are_clean(copied, path):
    "nbdev_clean has nothing to do."
    assert (ROOT / path).read_bytes() == (copied / path).read_bytes(), "run nbdev_clean"


def test_quarto_settings_are_a_link():
    "nbdev builds from nbs/ alone, so the settings at the top are linked there."
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and link.readlink() == Path("../_quarto.yml")
    assert link.resolve() == (ROOT / "_quarto.yml").resolve()


def test_readme_is_in_step():
    "README.md is what nbs/index.ipynb gives."
    pytest.importorskip("nbconvert")
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
