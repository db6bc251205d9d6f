"""The tests elsewhere: in other surroundings, on every Python, with the oldest packages.

`make environments`, or `python tools/environments.py bare off 3.12 oldest` for some of it.

Surroundings are what lies around one clone of what is committed and one environment that
`make test` has made: variables, programs and libraries of the system. In each, `make test` runs
the whole suite; `TESTS="tests/test_blas.py tests/test_book.py"` runs some of it.
`python tools/environments.py --within bare make test` runs a command in surroundings, here.

Pythons are looked for on the path and under ~/.pyenv; one that is not there is named and passed
over. PyTorch judges where its wheels are to be had; `TORCH=` leaves it out on Pythons other than
the one that runs this.
"""
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = os.environ.get("TORCH", "torch==2.13.0")
CORE = [f"tests/test_{name}.py"
        for name in ("layers", "functional", "convert", "lazy", "pad", "transforms")]
BOOK = [f"tests/test_{name}.py"
        for name in ("notebooks", "book", "blas", "package", "environments")]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


# Surroundings --------------------------------------------------------------------------------

# What tells a BLAS, flashconv or a traceback how to be: no surroundings take it from this shell.
STEERING = ("FLASHCONV_", "OPENBLAS_", "MKL_", "BLIS_", "OMP_", "FORCE_COLOR", "NO_COLOR",
            "LD_PRELOAD")
COMPILER = re.compile(r"(.*-)?(cc|c[89]9|gcc|g\+\+|c\+\+|clang|clang\+\+)(-[\d.]+)?")


def search(folder):
    "LD_LIBRARY_PATH with a folder in front."
    return ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))


def hidden(folder):
    """LD_LIBRARY_PATH under which the linker finds no BLAS of the system by its name.

    It looks there first, and ends its search at the empty files that stand there under each name
    that flashconv asks for. No rights are needed for that. Still found are a library that is
    preloaded or named with its path, those in site-packages, and those in the folder of a Python
    that looks there first, as conda's does.
    """
    code = ast.parse((ROOT / "flashconv" / "blas.py").read_text(encoding="utf-8"))
    names, = (ast.literal_eval(node.value) for node in code.body
              if isinstance(node, ast.Assign) and node.targets[0].id == "_SONAMES")
    folder = Path(folder) / "hidden"
    folder.mkdir()
    for name in names: (folder / name).touch()
    return search(folder)


def debian(folder):
    "LD_LIBRARY_PATH with Debian's OpenBLAS, unpacked and not installed."
    if not shutil.which("apt-get"): raise FileNotFoundError("apt-get is not here to bring it")
    for package in ("libopenblas0-pthread", "libgfortran5", "libquadmath0"):  # the last on x86 only
        subprocess.run(["apt-get", "-qq", "download", package], cwd=folder, capture_output=True)
    for package in Path(folder).glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, Path(folder) / "debian"], check=True)
    found = sorted(Path(folder).glob("debian/usr/lib/*/openblas-pthread"))
    if not found: raise FileNotFoundError("apt-get has no libopenblas0-pthread")
    path = search(f"{found[0]}:{found[0].parent}")
    subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libopenblas.so.0')"],
                   env=os.environ | {"LD_LIBRARY_PATH": path}, check=True)
    return path


def without_compilers(folder):
    "PATH with a link to each program that was on it, but no compiler."
    folder = Path(folder) / "programs"
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / program.name
            if not COMPILER.fullmatch(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


# Each is all that `bare` is, but for one thing: (variables, what stands before a command).
SURROUNDINGS = {
    "bare": lambda folder: ({}, []),  # what `make test` installs, and no variable set
    "debian": lambda folder: ({"LD_LIBRARY_PATH": debian(folder)}, []),
    "off": lambda folder: ({"FLASHCONV_BLAS": "off"}, []),
    "haswell": lambda folder: ({"OPENBLAS_CORETYPE": "Haswell"}, []),
    "colour": lambda folder: ({"FORCE_COLOR": "1"}, []),
    "no-compiler": lambda folder: ({"PATH": without_compilers(folder)}, []),
    "one-core": lambda folder: ({}, ["taskset", "-c", str(min(os.sched_getaffinity(0)))]),
}


def within(name, command, **more):
    "A command in surroundings, finished. FileNotFoundError says what they need and lack."
    with tempfile.TemporaryDirectory() as folder:
        variables, before = SURROUNDINGS[name](folder)
        plain = {key: value for key, value in os.environ.items() if not key.startswith(STEERING)}
        environ = plain | {"LD_LIBRARY_PATH": hidden(folder)} | variables
        environ["PYTEST_ADDOPTS"] = "--color=no"  # what it says is read
        return subprocess.run([*before, *command], env=environ, **more)


def around(name, clone):
    "Whether `make test` passes in surroundings, with what pytest says last and what failed."
    if sys.platform != "linux": return None, "these surroundings are Linux's"
    command = ["make", "test", f"VENV={clone}/.venv", f"TESTS={os.environ.get('TESTS', '')}"]
    try: done = within(name, command, cwd=clone, capture_output=True, text=True)
    except FileNotFoundError as error: return None, str(error)
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n".join([lines[-1], *failed])


def cloned(folder):
    "A clone of what is committed, with the environment that `make test` makes."
    clone = Path(folder) / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    subprocess.run(["make", "-s", f"VENV={clone}/.venv", f"PYTHON={sys.executable}",
                    f"{clone}/.venv/test-installed"], cwd=clone, check=True)
    return clone


# Pythons and packages ------------------------------------------------------------------------

def requirements():
    "What settings.ini asks for at run time."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["requirements"].split()


def find(version):
    "The interpreter of a version such as 3.12; None if there is none."
    known = Path.home() / ".pyenv" / "versions"
    for path in (shutil.which(f"python{version}"), *sorted(known.glob(f"{version}.*/bin/python"))):
        if path is None: continue
        asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.stdout.strip() == version: return str(path)


def environment(folder, python, *packages):
    "The interpreter of a new environment with some packages in it."
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = str(Path(folder) / "bin" / "python")
    quiet = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*quiet, *packages], check=True)
    return inside


def tested(inside, files):
    "Whether some test files pass, with what pytest says last."
    done = subprocess.run([inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
                          cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"})
    return done.returncode == 0, (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]


def on(version, oldest=False):
    """The core tests on one Python, and with the newest packages those of the book.

    The oldest packages that are admitted draw and print a page otherwise than it is saved.
    """
    python = find(version)
    if python is None: return None, "not installed"
    wanted = ["-e", f"{ROOT}[cpu,dev]", "scipy-openblas32"]
    if oldest:
        wanted = [re.sub(r"^mlx\b", "mlx[cpu]", name.replace(">=", "==")) for name in requirements()]
        wanted += ["pytest", "safetensors"]
    with tempfile.TemporaryDirectory() as folder:
        try: inside = environment(folder, python, *wanted, *filter(None, [TORCH]))
        except subprocess.CalledProcessError as error: return False, f"not installable: {error}"
        return tested(inside, CORE if oldest else CORE + BOOK)


def unexpected(names, allowed):
    "The files that match none of some patterns."
    return [name for name in names if not any(re.fullmatch(pattern, name) for pattern in allowed)]


def packages():
    "The wheel and the source archive: what is in them, and a layer run from each."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build = environment(folder / "build", sys.executable, "build")
        subprocess.run([build, "-m", "build", "-q", "--outdir", folder / "dist", ROOT], check=True)
        wheel, = (folder / "dist").glob("*.whl")
        archive, = (folder / "dist").glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as opened: inside = opened.namelist()
        extra = unexpected(inside, (r"flashconv/((algorithms|convert|kernels)/)?\w+\.py",
                                    r"flashconv/kernels/cpp/\w+\.(h|cpp)",
                                    r"flashconv-[\w.]+\.dist-info/.*"))
        if extra or not any(name.endswith("licenses/LICENSE") for name in inside):
            return False, f"the wheel holds {extra or 'no licence'}"
        with tarfile.open(archive) as opened:
            inside = [name.partition("/")[2] for name in opened.getnames() if "/" in name]
        missing = {"LICENSE", "README.md", "settings.ini", "setup.py"} - set(inside)
        if missing: return False, f"the source archive lacks {sorted(missing)}"
        for path in (wheel, archive):
            python = environment(folder / path.suffix[1:], sys.executable, f"{path}[cpu]")
            code = ("import flashconv, mlx.core as mx\n"
                    "assert flashconv.Conv2d(3, 4, 3)(mx.ones((1, 3, 8, 8))).shape == (1, 4, 6, 6)")
            subprocess.run([python, "-c", code], check=True, cwd=folder)
    return True, "installed and run, with the files they should have"


JOBS = {**{version: lambda version=version: on(version) for version in PYTHONS},
        "oldest": lambda: on("3.11", oldest=True), "wheel": packages}


def run(names):
    "Do some jobs, and say of each how it went. The names of those that failed."
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        clone = None
        for name in names:
            if name in SURROUNDINGS and clone is None: clone = cloned(folder)
            passed, words = around(name, clone) if name in SURROUNDINGS else JOBS[name]()
            how = {True: "passed", False: "FAILED", None: "absent"}[passed]
            print(f"{name:11} {how}: {words}", flush=True)
            if passed is False: failed.append(name)
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--within"]: sys.exit(within(sys.argv[2], sys.argv[3:]).returncode)
    sys.exit(bool(run(sys.argv[1:] or [*SURROUNDINGS, *JOBS])))
