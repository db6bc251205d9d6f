"""The BLAS under MLX: each test in a process of its own, since what is loaded stays loaded.

Where no fast BLAS is installed, or the platform has nothing to replace, tests say so and skip.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashconv import blas

LINUX = pytest.mark.skipif(not blas._slots(), reason="only MLX on Linux has a table of addresses to replace one in")
GCC = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS"), "1")


def run(code, *arguments, **variables):
    "A finished child process. Of our own variables it sees those that are given."
    env = {name: value for name, value in os.environ.items()
           if name not in ("FLASHCONV_BLAS", "FLASHCONV_EFFECTS", "LD_PRELOAD", "FORCE_COLOR")}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env=env | ONE_THREAD | variables, timeout=300)


def output(code, *arguments, **variables):
    "What a child process prints, if it ends well and complains of nothing."
    done = run(code, *arguments, **variables)
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stdout, done.stderr)
    return done.stdout


LIBRARIES = output("from flashconv import blas\nfor name, _ in blas._usable() if blas._slots() else (): print(name)",
                   FLASHCONV_BLAS="off").split()
EACH = pytest.mark.parametrize("library", [
    pytest.param(name, id=Path(name).name) for name in LIBRARIES] or [
    pytest.param("", marks=pytest.mark.skip(reason="no fast BLAS is installed"))])
SOME = pytest.mark.skipif(not LIBRARIES, reason="no fast BLAS is installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    "A function that compiles C into a library and gives its path."
    folder = tmp_path_factory.mktemp("libraries")

    def build(name, code, *flags):
        source, library = folder / f"{name}.c", folder / f"lib{name}.so"
        source.write_text(code, encoding="utf-8")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, *flags], check=True)
        return str(library)
    return build


def fake(width="int", suffix="", leave_out=""):
    "C for a library whose products are all 42, to be told from right ones."
    code = f"float cblas_sdot{suffix}({width} n, float *x, {width} i, float *y, {width} j)\n"
    code += "{ return n > 0 ? x[0] * y[0] : 0; }\n"
    for letter, scalar, value in (("s", "float", "float"), ("d", "double", "double"), ("c", "void *", "float")):
        if letter == leave_out: continue
        code += (f"void cblas_{letter}gemm{suffix}(int order, int ta, int tb, {width} m, {width} n, {width} k, "
                 f"{scalar} alpha, void *a, {width} lda, void *b, {width} ldb, {scalar} beta, {value} *c, "
                 f"{width} ldc)\n{{ for ({width} i = 0; i < m * n; i++) c[i] = 42; }}\n")
    return code


# Import --------------------------------------------------------------------------------------

ORDERS = {
    "flashconv first": "import flashconv, mlx.core as mx",
    "mlx first": "import mlx.core as mx, flashconv",
    "mlx at work": "import mlx.core as mx\nmx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)))\nimport flashconv",
    "mlx bound late": ("import os, sys\nsys.setdlopenflags(os.RTLD_LAZY)\nimport mlx.core as mx\n"
                       "sys.setdlopenflags(os.RTLD_NOW)\nimport flashconv"),
    "a submodule": "from flashconv.conv import Conv1d\nimport flashconv, mlx.core as mx",
}


@LINUX
@SOME
@pytest.mark.parametrize("order", ORDERS)
def test_import(order):
    "Whichever comes first, MLX multiplies with the fast library from then on, and nobody complains."
    code = ORDERS[order] + "\nprint(flashconv.blas.fast(), flashconv.blas.info().reason)"
    assert output(code) == "True the first that was found\n"


@LINUX
@EACH
def test_named(library):
    "FLASHCONV_BLAS chooses, and that library is behind all three products."
    code = ("from flashconv import blas\nfor name, slot in blas._slots(): print(blas._owner(slot.value))\n"
            "print(blas.info().reason)")
    *owners, reason = output(code, FLASHCONV_BLAS=library).splitlines()
    assert len(owners) == 3 and reason == "FLASHCONV_BLAS names it"
    assert len(set(owners)) == 1 and Path(library).name.split(".so")[0].split("-")[0] in owners[0]


@LINUX
@EACH
def test_is_faster(library):
    "On one thread, so that a busy machine slows both, at least four times as fast as Netlib's."
    code = "from flashconv import blas\nprint(blas.info().gflops)"
    slow, fast = (max(float(output(code, FLASHCONV_BLAS=named)) for _ in range(2)) for named in ("off", library))
    assert fast > 4 * slow


@LINUX
def test_off():
    "With off, the table is as the linker left it and no library was loaded."
    code = ("from flashconv import blas\nprint({name: s.value for name, s in blas._slots()} == blas._own(), blas.fast(), "
            "any(name in open('/proc/self/maps').read() for name in ('libopenblas', 'libmkl', 'libblis')))\n"
            "print(blas.info())")
    first, second = output(code, FLASHCONV_BLAS="off").splitlines()
    assert first == "True False False"
    assert second.startswith("Netlib, 1 thread, ") and "(FLASHCONV_BLAS=off): " in second


@LINUX
@EACH
def test_preloaded(library):
    "A fast BLAS that was there before flashconv stays."
    if "scipy" in library: pytest.skip("its names are not those that MLX looks up")
    code = "from flashconv import blas\nprint(blas.info().reason)"
    assert output(code, LD_PRELOAD=library) == "it was in place already\n"


@pytest.mark.parametrize("pretend, reason", (
    ("import sys; sys.platform = 'darwin'", "nothing to replace on this platform"),
    ("import mlx.core as mx\nmx.default_device = lambda: type('Device', (), {'type': mx.gpu})", "MLX works on the GPU")),
    ids=("mac", "gpu"))
def test_elsewhere(pretend, reason):
    "On a Mac and on a GPU nothing is loaded, refused or said, not even of a wrong FLASHCONV_BLAS."
    if "GPU" in reason and not blas._slots(): pytest.skip("there is nothing to replace, with or without a GPU")
    code = f"{pretend}\nfrom flashconv import blas\nprint(blas._reason, blas.info().reason)"
    assert output(code, FLASHCONV_BLAS="/no/such/library.so") == f"{reason} {reason}\n"


# What is refused -----------------------------------------------------------------------------

@LINUX
@pytest.mark.parametrize("name, message", (
    ("/no/such/library.so", "/no/such/library.so: cannot open shared object file: No such file or directory"),
    ("libnosuchblas.so.0", "libnosuchblas.so.0: cannot open shared object file: No such file or directory"),
    ("libm.so.6", "libm.so.6: has no cblas_sgemm"),
    (__file__, "test_blas.py: "),
    ("/tmp", "/tmp: cannot read file data: Is a directory"),
    ("OFF", "OFF: cannot open shared object file")),
    ids=("path", "soname", "other library", "no library", "folder", "off in capitals"))
def test_refused(name, message):
    "A name that is no BLAS ends the import with a ValueError that says why and what is possible."
    done = run("import flashconv", FLASHCONV_BLAS=name)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ValueError: FLASHCONV_BLAS: ") and message in last
    assert last.endswith(f" Possible here: {', '.join(['off', *LIBRARIES, 'or a path'])}.")


@LINUX
@GCC
@pytest.mark.parametrize("arguments, message", (
    ({"width": "long", "suffix": "64_"}, "takes integers of 64 bits (ILP64), and MLX passes 32"),
    ({"width": "long", "suffix": "_64"}, "takes integers of 64 bits (ILP64), and MLX passes 32"),
    ({"width": "long"}, "takes integers of 64 bits (ILP64), and MLX passes 32"),
    ({"leave_out": "s"}, "has no cblas_sgemm"),
    ({"leave_out": "c"}, "has no cblas_cgemm")),
    ids=("64_", "_64", "unnamed", "no sgemm", "no cgemm"))
def test_refused_by_name(compiled, arguments, message):
    "Libraries with integers of 64 bits, whether their functions say so or not, and incomplete ones."
    library = compiled("bad" + "".join(arguments.values()), fake(**arguments))
    done = run("import flashconv", FLASHCONV_BLAS=library)
    assert done.returncode == 1
    assert f"ValueError: FLASHCONV_BLAS: {library}: {message}. Possible here: off" in done.stderr


@LINUX
def test_numpys_own_is_refused():
    "NumPy's wheel carries an OpenBLAS for integers of 64 bits."
    import numpy
    for path in Path(numpy.__file__).parents[1].glob("numpy.libs/libscipy_openblas64_*.so"):
        with pytest.raises(ValueError, match="takes integers of 64 bits"): blas._routines(str(path))


@LINUX
def test_use_refuses_and_changes_nothing():
    "After a refusal MLX multiplies as before."
    code = """
from flashconv import blas
before = [slot.value for _, slot in blas._slots()], blas._reason
try: blas.use("libm.so.6")
except ValueError as error: print(error)
print(before == ([slot.value for _, slot in blas._slots()], blas._reason))
"""
    message, unchanged = output(code, FLASHCONV_BLAS="off").splitlines()
    assert "libm.so.6: has no cblas_sgemm. Possible here: off" in message and unchanged == "True"


# Where it looks ------------------------------------------------------------------------------

@LINUX
@GCC
@pytest.mark.parametrize("intel", (True, False))
def test_order(compiled, tmp_path, intel):
    "What was installed for this: on Intel's processors MKL, the newest first. Then the system's, then SciPy's."
    library = compiled("good", fake())
    site, system = tmp_path / "lib/python3/site-packages", tmp_path / "system"
    wheel = site / "scipy_openblas32/lib/libscipy_openblas.so"
    scipy = site / "scipy.libs/libscipy_openblas-0.so"
    mkl = [tmp_path / f"lib/libmkl_rt.so.{version}" for version in (3, 2)]
    for path in (wheel, scipy, *mkl, system / "libopenblas.so.0"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, path)
    code = ("import os, sys\nos.environ['FLASHCONV_BLAS'] = 'off'\nfrom flashconv import blas\n"
            "sys.path, blas._is_intel = [sys.argv[1]], lambda: bool(int(sys.argv[2]))\nblas.use('on')\n"
            "print(blas._owner(blas._slots()[0][1].value))\nfor name, _ in blas._usable(): print(name)")
    chosen, *found = output(code, site, int(intel), LD_LIBRARY_PATH=system).splitlines()
    others = [str(wheel), "libopenblas.so.0", str(scipy)]
    found = [name for name in found if name in others or name.startswith(str(tmp_path))]  # of the machine
    mkl = [str(path) for path in mkl]
    assert found == ([*mkl, *others] if intel else [*others, *mkl])
    assert chosen == found[0]


@LINUX
def test_processor():
    "As the system says."
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert blas._is_intel() == ("GenuineIntel" in told)


@LINUX
@SOME
def test_on():
    "After off, the first that fits comes back."
    code = ("from flashconv import blas\nbefore = blas._owner(blas._slots()[0][1].value)\nblas.use('off')\n"
            "print(blas.fast())\nblas.use('on')\nprint(blas.fast(), before == blas._owner(blas._slots()[0][1].value))")
    assert output(code) == "False\nTrue True\n"


# The warning ---------------------------------------------------------------------------------

HIDE = """
import ctypes, sys, warnings

class Hidden(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        hidden = "libopenblas", "libscipy", "libmkl", "libblis", "libarmpl"
        if name and name.split("/")[-1].startswith(hidden): raise OSError(f"{name}: cannot open shared object file")
        super().__init__(name, *args, **kwargs)

ctypes.CDLL = Hidden
"""


@LINUX
@pytest.mark.parametrize("order", ORDERS)
def test_none_found(tmp_path, order):
    "One warning, on the user's line, says what it costs and what mends it; nothing else changes."
    script = tmp_path / "script.py"
    script.write_text(f"{HIDE}\n{ORDERS[order]}\nimport flashconv.functional\n"
                      "print(flashconv.blas.fast(), flashconv.blas._reason)\n", encoding="utf-8")
    done = run("import runpy, sys\nrunpy.run_path(sys.argv[1], run_name='__main__')", script)
    assert done.stdout == "False no other was found\n"
    assert done.stderr.count("Warning") == 1
    line = 1 + next(i for i, line in enumerate(script.read_text(encoding="utf-8").splitlines()) if "flashconv" in line)
    assert done.stderr.startswith(f"{script}:{line}: RuntimeWarning: MLX multiplies matrices with Netlib's")
    for word in ("5 GFLOP/s", "pip install scipy-openblas32", "apt-get install libopenblas0", "FLASHCONV_BLAS=off"):
        assert word in done.stderr


@LINUX
def test_on_without_any():
    "Who asks for a fast one by name gets an error where there is none."
    done = run(f"{HIDE}\nimport flashconv", FLASHCONV_BLAS="on")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "ValueError: FLASHCONV_BLAS: no library was found that fits. Possible here: off, or a path.")


@LINUX
def test_off_does_not_warn():
    "Who wants MLX as it is has said so."
    assert output(HIDE + "import flashconv\nprint(flashconv.blas.fast())", FLASHCONV_BLAS="off") == "False\n"


# Right results -------------------------------------------------------------------------------

PRODUCTS = """
import numpy as np, flashconv, mlx.core as mx
rng = np.random.default_rng(0)
mx.set_default_device(mx.cpu)
def draw(*shape, dtype):
    a = rng.standard_normal(shape)
    return (a + 1j * rng.standard_normal(shape) if dtype.startswith("c") else a).astype(dtype)
def own(a): return mx.array(a, getattr(mx, str(a.dtype)))
for dtype, eps in (("float32", 2e-6), ("float64", 4e-15), ("complex64", 4e-6)):
    for m, k, n in ((1, 1, 1), (1, 7, 1), (7, 1, 5), (33, 65, 17), (128, 300, 64), (257, 129, 511), (1, 4096, 3)):
        for ta in (0, 1):
            for tb in (0, 1):
                a, b = draw(*((k, m) if ta else (m, k)), dtype=dtype), draw(*((n, k) if tb else (k, n)), dtype=dtype)
                x, y = own(a), own(b)
                a, x = (a.T, x.T) if ta else (a, x)
                b, y = (b.T, y.T) if tb else (b, y)
                bound = eps * k * np.abs(a).max() * np.abs(b).max()
                assert (x @ y).dtype == getattr(mx, dtype)
                for ours in (x @ y, mx.addmm(mx.zeros((m, n), dtype=x.dtype), x, y, 1, 1)):
                    assert np.abs(np.array(ours) - a @ b).max() <= bound, (dtype, m, k, n, ta, tb)
    a, b = draw(3, 4, 9, 8, dtype=dtype), draw(4, 8, 7, dtype=dtype)
    assert np.abs(np.array(own(a) @ own(b)) - a @ b).max() < 100 * eps
    a, b = draw(40, 60, dtype=dtype), draw(60, 40, dtype=dtype)  # views with strides, and a broadcast one
    assert np.abs(np.array(own(a)[::2, ::3] @ own(b)[::3, 5:9]) - a[::2, ::3] @ b[::3, 5:9]).max() < 100 * eps
    wide = mx.broadcast_to(own(a)[:, :1], (40, 60)) @ own(b)
    assert np.abs(np.array(wide) - np.broadcast_to(a[:, :1], (40, 60)) @ b).max() < 300 * eps
    for shape, other in (((0, 3), (3, 2)), ((2, 3), (3, 0)), ((2, 0), (0, 3))):  # no rows, no columns, no terms
        assert np.array_equal(np.array(mx.zeros(shape, dtype=x.dtype) @ mx.zeros(other, dtype=x.dtype)),
                              np.zeros(shape) @ np.zeros(other))
special = mx.array([[0.0, 1.0], [np.inf, 0.0]]) @ mx.array([[np.nan, 1.0], [2.0, 3.0]])
assert np.array_equal(np.array(special), [[np.nan, 3], [np.nan, np.inf]], equal_nan=True), special
print("right")
"""


@LINUX
@EACH
def test_products(library):
    "float32, float64 and complex64: transposed, batched, strided, broadcast, empty."
    assert output(PRODUCTS, FLASHCONV_BLAS=library) == "right\n"


@LINUX
@GCC
def test_each_product_is_replaced(compiled):
    "With a library whose every product is 42, so is MLX's in three dtypes; the others never called a BLAS."
    code = ("import flashconv, mlx.core as mx\nmx.set_default_device(mx.cpu)\n"
            "for dtype in (mx.float32, mx.float64, mx.complex64, mx.float16, mx.bfloat16):\n"
            "    a = mx.ones((2, 2), dtype=dtype)\n    print((a @ a)[0, 0].item().real)\n"
            "flashconv.blas.use('off')\nprint((mx.ones((2, 2)) @ mx.ones((2, 2)))[0, 0].item())")
    said = output(code, FLASHCONV_BLAS=compiled("fortytwo", fake())).split()
    assert [float(value) for value in said] == [42, 42, 42, 2, 2, 2]


LINALG = """
import hashlib, flashconv, numpy as np, mlx.core as mx
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
for dtype in (mx.float32, mx.float64):
    a = mx.array(rng.standard_normal((50, 50))).astype(dtype)
    tall, symmetric, one = a[:, :20], a + a.T, mx.eye(50, dtype=dtype)
    positive = one * 60 + symmetric
    for name, parts in dict(
            svd=mx.linalg.svd(a), thin=mx.linalg.svd(tall), qr=mx.linalg.qr(tall), inv=[mx.linalg.inv(a)],
            tri_inv=[mx.linalg.tri_inv(mx.tril(positive))], cholesky=[mx.linalg.cholesky(positive)],
            eigh=mx.linalg.eigh(symmetric), eigvalsh=[mx.linalg.eigvalsh(symmetric)],
            eig=mx.linalg.eig(a) if dtype == mx.float32 else [], lu=mx.linalg.lu(a),
            lu_factor=mx.linalg.lu_factor(a)).items():
        print(dtype, name, *(hashlib.sha256(np.array(part).tobytes()).hexdigest()[:12] for part in parts))
    # These multiply, too, so the last bits may differ: residuals.
    b = mx.array(rng.standard_normal((50, 3))).astype(dtype)
    eps = 1e-3 if dtype == mx.float32 else 1e-11
    assert mx.abs(a @ mx.linalg.solve(a, b) - b).max().item() < eps
    assert mx.abs(mx.linalg.cholesky_inv(mx.linalg.cholesky(positive)) @ positive - one).max().item() < eps
    assert mx.abs(mx.linalg.pinv(tall) @ tall - mx.eye(20, dtype=dtype)).max().item() < eps
    u, s, vt = mx.linalg.svd(tall)
    assert mx.abs(u[:, :20] * s @ vt - tall).max().item() < eps
    q, r = mx.linalg.qr(tall)
    assert mx.abs(q @ r - tall).max().item() < eps
    values, vectors = mx.linalg.eigh(symmetric)
    assert mx.abs(symmetric @ vectors - vectors * values).max().item() < eps
"""


@LINUX
@EACH
def test_linalg_is_unchanged(library):
    "Decompositions stay in MLX's LAPACK, bit for bit."
    before, after = output(LINALG, FLASHCONV_BLAS="off"), output(LINALG, FLASHCONV_BLAS=library)
    assert before == after and before.count("\n") == 22


@LINUX
@EACH
def test_convolution(library):
    "MLX's own convolution, which calls for products as well, gives what it gave."
    code = ("import numpy as np, flashconv, mlx.core as mx\nmx.set_default_device(mx.cpu)\nmx.random.seed(0)\n"
            "x, w = mx.random.normal((2, 20, 20, 8)), mx.random.normal((16, 3, 3, 8))\n"
            "y = np.array(mx.conv2d(x, w, stride=2, padding=1))\nflashconv.blas.use('off')\n"
            "print(np.allclose(y, np.array(mx.conv2d(x, w, stride=2, padding=1)), atol=1e-4))")
    assert output(code, FLASHCONV_BLAS=library) == "True\n"


# Neighbours ----------------------------------------------------------------------------------

NEIGHBOURS = """
import sys
for name in sys.argv[1].split(): exec("import " + name)
import numpy as np, torch, flashconv, mlx.core as mx
mx.set_default_device(mx.cpu)
mx.eval(mx.ones((300, 300)) @ mx.ones((300, 300)))
assert flashconv.blas.fast()
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
    eps = 5e-3 if dtype in (torch.float32, torch.complex64) else 1e-9
    a, b, v = (torch.randn(*shape, dtype=dtype) for shape in ((90, 90), (90, 90), (90,)))
    n, m, u = a.numpy(), b.numpy(), v.numpy()
    def same(ours, theirs):
        assert np.allclose(ours, theirs, rtol=eps, atol=eps * np.abs(theirs).max()), dtype
    same(torch.dot(v, v), (u * u).sum())
    same(torch.vdot(v, v), (u.conj() * u).sum())
    same(a @ b, n @ m)
    same(n @ m, np.einsum("ij,jk", n, m))
    same(a @ v, n @ u)
    same(torch.bmm(a[None], b[None])[0], n @ m)
    same(torch.linalg.svdvals(a), np.linalg.svd(n, compute_uv=False))
    same(torch.linalg.eigvalsh(a @ a.mH), np.linalg.eigvalsh(n @ n.conj().T))
    same(torch.linalg.solve(a, v), np.linalg.solve(n, u))
    same(a @ torch.linalg.inv(a), np.eye(90))
    q, r = torch.linalg.qr(a)
    same(q @ r, n)
    same(torch.fft.fft(v), np.fft.fft(u))
x, w = torch.randn(2, 4, 9, 9, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
same(torch.nn.functional.conv2d(x, w), np.einsum("bcyxij,ocij->boyx", np.lib.stride_tricks.sliding_window_view(
    x.numpy(), (3, 3), (2, 3)), w.numpy()))
mx.eval(mx.ones((300, 300)) @ mx.ones((300, 300)))
print("right")
"""


@LINUX
@EACH
@pytest.mark.parametrize("order", ("flashconv numpy torch", "torch numpy flashconv", "mlx.core torch flashconv"))
def test_neighbours(library, order):
    "PyTorch and NumPy in the same process, each before and after flashconv, keep their results."
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert output(NEIGHBOURS, order, FLASHCONV_BLAS=library) == "right\n"


@LINUX
@EACH
def test_not_for_all_to_see(library):
    "The library is loaded for MLX alone (MKL's parts excepted, which MKL loads itself)."
    if "mkl" in library: pytest.skip("MKL loads its parts for all to see")
    code = "import ctypes, flashconv\nprint(flashconv.blas.fast(), hasattr(ctypes.CDLL(None), 'cblas_sgemm'))"
    assert output(code, FLASHCONV_BLAS=library) == "True False\n"


# Threads and processes -----------------------------------------------------------------------

@LINUX
@EACH
def test_threads(library):
    "Results stay right while other threads multiply and the library is changed under them."
    code = """
import sys, threading, numpy as np, mlx.core as mx, flashconv
rng = np.random.default_rng(0)
a, b = (rng.integers(-9, 10, (200, 200)).astype(np.float32) for _ in range(2))
right, wrong, done = a @ b, [], []
def multiply():
    with mx.stream(mx.cpu):
        x, y = mx.array(a), mx.array(b)
        for _ in range(30):
            if not np.array_equal(np.array(x @ y), right): wrong.append(1)
        done.append(1)
threads = [threading.Thread(target=multiply) for _ in range(3)]
for thread in threads: thread.start()
while any(thread.is_alive() for thread in threads):
    for name in ("off", sys.argv[1]): flashconv.blas.use(name)
for thread in threads: thread.join()
print("wrong" if wrong else "right", len(done))
"""
    assert output(code, library) == "right 3\n"


@LINUX
@EACH
def test_import_in_threads(library):
    "Threads that import at once get one library."
    code = ("import threading\ndone = []\ndef work():\n    import flashconv\n    done.append(flashconv.blas.fast())\n"
            "threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "for t in threads: t.start()\nfor t in threads: t.join()\nprint(*done)")
    assert output(code, FLASHCONV_BLAS=library) == "True True True True\n"


@LINUX
@EACH
def test_fork(library):
    "A process that was forked after the import multiplies. (After an evaluation MLX itself hangs there.)"
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about threads and fork
import flashconv, mlx.core as mx
read, write = os.pipe()
if not os.fork():
    os.write(write, f"{flashconv.blas.fast()} {(mx.ones((300, 300)) @ mx.ones((300, 300))).sum().item()}".encode())
    os._exit(0)
os.wait()
print(os.read(read, 99).decode(), (mx.ones((300, 300)) @ mx.ones((300, 300))).sum().item())
"""
    two = dict.fromkeys(ONE_THREAD, "2")
    assert output(code, FLASHCONV_BLAS=library, **two) == "True 27000000.0 27000000.0\n"


# The table -----------------------------------------------------------------------------------

CALLER = """
void cblas_sgemm(int, int, int, int, int, int, float, void *, int, void *, int, float, float *, int);
void cblas_dgemm(int, int, int, int, int, int, double, void *, int, void *, int, double, double *, int);
void cblas_cgemm(int, int, int, int, int, int, void *, void *, int, void *, int, void *, float *, int);
double call(void) {
    float s = 0, c = 0; double d = 0;
    cblas_sgemm(101, 111, 111, 1, 1, 1, 1, 0, 1, 0, 1, 0, &s, 1);
    cblas_dgemm(101, 111, 111, 1, 1, 1, 1, 0, 1, 0, 1, 0, &d, 1);
    cblas_cgemm(101, 111, 111, 1, 1, 1, 0, 0, 1, 0, 1, 0, &c, 1);
    return s + d + c;
}
"""
TABLES = """
import ctypes, sys
from flashconv import blas
caller, first, second = sys.argv[1:]
library = ctypes.CDLL(caller)
library.call.restype = ctypes.c_double
said = [library.call()]
blas._libmlx = lambda: caller
blas._slots.cache_clear()
assert sorted({name for name, _ in blas._slots()}) == sorted(blas._ROUTINES)
blas._put(blas._routines(second))
said += [library.call()]
assert blas._owner(blas._slots()[0][1].value) == second
blas._put(blas._own())
print(*said, library.call())
"""


@LINUX
@GCC
@pytest.mark.parametrize("flags", (["-Wl,-z,now,-z,relro"], ["-Wl,-z,lazy"], ["-fno-plt", "-O2", "-Wl,-z,now,-z,relro"]),
                         ids=("protected", "lazy", "no-plt"))
def test_other_tables(compiled, flags):
    "However MLX will be linked one day: a table that is write-protected, filled late, or without stubs."
    kind = "".join(c for c in "".join(flags) if c.isalpha())
    first, second = compiled(f"first{kind}", fake()), compiled(f"second{kind}", fake().replace("42", "7"))
    caller = compiled(f"caller{kind}", CALLER, *flags, first, f"-Wl,-rpath,{Path(first).parent}")
    assert output(TABLES, caller, first, second, FLASHCONV_BLAS="off") == "126.0 21.0 126.0\n"


# What is said --------------------------------------------------------------------------------

def test_info():
    "It fits on a line and holds the figures."
    info = blas.Info("OpenBLAS", "/lib/libopenblas.so.0", 2, 186.4, "the first that was found")
    assert repr(info) == "OpenBLAS, 2 threads, 186 GFLOP/s (the first that was found): /lib/libopenblas.so.0"
    assert repr(info._replace(threads=None, library=None)) == "OpenBLAS, 186 GFLOP/s (the first that was found)"
    assert blas.info().gflops > 0 and blas.info().reason == blas._reason


@LINUX
@EACH
def test_threads_are_told(library):
    "info counts the threads that the library would use."
    assert output("from flashconv import blas\nprint(blas.info().threads)", FLASHCONV_BLAS=library) == "1\n"
