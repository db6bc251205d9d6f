"""Where a process runs: without a home, a display, a compiler, a network, PyTorch or a fast BLAS."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashconv import kernels

ROOT = Path(__file__).parents[1]

# Forward, gradients, compiled; an assertion would be left out by -O.
LAYERS = """
import mlx.core as mx, mlx.nn
import flashconv as nn
mx.random.seed(0)
model = mlx.nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), mlx.nn.relu,
                          nn.ConvTranspose2d(3, 2, 4, stride=2))
x = mx.random.normal((1, 2, 8, 8))
y = model(x)
loss, gradients = mlx.nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
mx.eval(y, loss, gradients)
COMPILED
print(tuple(y.shape), loss.item() > 0, bool(mx.allclose(y, fast, atol=1e-5)))
"""
COMPILE = "fast = mx.compile(lambda x: model(x))(x)\nmx.eval(fast)"
RIGHT = "(1, 2, 18, 18) True True\n"


def child(code, *flags, command=(), without=(), **variables):
    "A process with some variables of the environment set, and some missing."
    without = {*without, "FLASHCONV_EFFECTS", "FORCE_COLOR"}  # a traceback is read below
    environ = {name: value for name, value in os.environ.items() if name not in without}
    if not kernels.available(): environ["FLASHCONV_KERNELS"] = "off"  # a warning would be read, too
    return subprocess.run([*command, sys.executable, *flags, "-c", code], capture_output=True,
                          text=True, env=environ | variables)


def prints(code, *flags, **more):
    "What the process prints; it fails the test if it ends with an error, or warns."
    done = child(code, *flags, **more)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("flags, without, variables", (
    ((), ("HOME", "USER", "LOGNAME"), {}),
    ((), (), {"HOME": "/proc", "FLASHCONV_KERNELS": "off"}),  # nothing can be written there, by root either
    ((), ("LANG", "LC_CTYPE"), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    (("-O",), (), {}), (("-OO",), (), {}), (("-B", "-s"), (), {}),
    (("-X", "dev"), (), {}), (("-W", "error"), (), {"FLASHCONV_BLAS": "off"}),
    ((), (), {"PYTHONHASHSEED": "0"}), ((), (), {"PYTHONHASHSEED": "12345"}),
    ((), (), {"FLASHCONV_BLAS": "off"})), ids=str)
def test_layers_run(flags, without, variables):
    "Each gives the shape, the loss and the compiled result, and says nothing."
    code = LAYERS.replace("COMPILED", COMPILE)
    assert prints(code, *flags, without=without, **variables) == RIGHT


def test_without_a_network():
    "Nothing is fetched."
    if not shutil.which("unshare") or subprocess.run(["unshare", "-n", "true"]).returncode:
        pytest.skip("this system lets nobody leave the network")
    code = LAYERS.replace("COMPILED", COMPILE)
    assert prints(code, command=("unshare", "-n")) == RIGHT


def test_without_a_compiler():
    "Compiled or not: what `mx.compile` would have built is interpreted then."
    code = LAYERS.replace("COMPILED", COMPILE)
    assert prints(code, PATH="/nonexistent") == RIGHT


def test_without_a_display(tmp_path):
    "Pictures are drawn to files."
    code = ("from flashconv import draw\n"
            "picture = draw.figure(lambda ax: ax.plot([1, 2]), 2, 1, alt='a line')\n"
            "print('<svg' in str(picture._repr_mimebundle_()))")
    hidden = ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY", "HOME")
    done = child(code, without=hidden, MPLCONFIGDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to choose elsewhere")
@pytest.mark.parametrize("named", ("/nonexistent/libblas.so", "OFF", "openblas", "libm.so.6", "/"))
def test_blas_set_wrongly(named):
    "The import ends with a ValueError that names the variable and what was in it."
    done = child("import flashconv", FLASHCONV_BLAS=named)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ValueError: FLASHCONV_BLAS: ")
    assert named.rstrip("/") in last


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to choose elsewhere")
def test_without_a_fast_blas():
    "One warning, once, that says what to do."
    code = ("import warnings\nfrom flashconv import blas\n"
            "blas._usable = lambda: []\nblas._put(blas._own())\n"
            "with warnings.catch_warnings(record=True) as seen:\n    blas.load()\n"
            "print(len(seen), seen[0].category.__name__, 'pip install' in str(seen[0].message))")
    done = child(code, without=("FLASHCONV_BLAS",))
    assert (done.returncode, done.stdout) == (0, "1 RuntimeWarning True\n"), done.stderr


def test_without_pytorch():
    "`to_torch` says what it needs; everything else does not ask."
    code = ("import sys\nsys.modules['torch'] = None\nimport flashconv as nn\n"
            "try: nn.to_torch(nn.Conv1d(1, 1, 1))\nexcept ImportError as error: print(error)")
    assert prints(code) == "to_torch needs PyTorch: pip install flashconv[torch]\n"


def test_mlx_first():
    "The order of the imports does not matter: it is MLX, then ours, in all the tests above."
    first = "import mlx.core as mx, mlx.nn\n"
    assert LAYERS.lstrip().startswith(first)
    code = "import flashconv as nn\n" + LAYERS.replace("COMPILED", COMPILE)
    assert prints(code) == RIGHT


# The surroundings of `make environments` ------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux", reason="the surroundings are Linux's")
@pytest.mark.parametrize("name, code, said", (
    ("bare", "print(*(key for key in os.environ if key.startswith(('FLASHCONV', 'OPENBLAS'))))", ""),
    ("bare", "try: ctypes.CDLL('libopenblas.so.0')\nexcept OSError as e: print('short' in str(e))", "True"),
    ("off", "print(os.environ['FLASHCONV_BLAS'])", "off"),
    ("haswell", "print(os.environ['OPENBLAS_CORETYPE'])", "Haswell"),
    ("colour", "print(os.environ['FORCE_COLOR'])", "1"),
    ("no-compiler", "print(*map(shutil.which, ('cc', 'g++', 'gcc', 'clang', 'c++')))", "None " * 5),
    ("no-compiler", "print(shutil.which('env') is not None)", "True"),
    ("one-core", "print(len(os.sched_getaffinity(0)))", "1")))
def test_surroundings(tmp_path, name, code, said):
    "What a process finds in them, on a machine that has everything else and every variable set."
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    library = next(line.split()[-1] for line in maps if "/libc.so" in line or "/libc-" in line)
    (tmp_path / "libopenblas.so.0").symlink_to(library)  # any library will do
    busy = dict.fromkeys(("FLASHCONV_BLAS", "OPENBLAS_CORETYPE", "FORCE_COLOR"), "mine")
    environ = os.environ | busy | {"LD_LIBRARY_PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libopenblas.so.0')"],
                   env=environ, check=True)  # found here
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "environments.py", "--within", name, sys.executable,
         "-c", f"import ctypes, os, shutil\n{code}"], capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout.strip()) == (0, said.strip()), done.stderr
