"""Compiling the glue and the kernels, once for each MLX and processor"""
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from platform import machine
from time import monotonic, sleep, time
from typing import NamedTuple

import mlx.core as mx

SOURCES = Path(__file__).parent / "cpp"


class BuildError(RuntimeError):
    "Why there are no kernels, and what mends it."


# Where -----------------------------------------------------------------------------------------

def cache_folder() -> Path:
    "Where compiled libraries are kept: `FLASHCONV_CACHE`, else in the user's cache."
    named = os.environ.get("FLASHCONV_CACHE")
    if named: return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "flashconv"


_ELSEWHERE = "FLASHCONV_CACHE=FOLDER names another one"


def _trusted(folder):
    "The folder, made if need be, unless somebody else can put a library there."
    if not folder.is_absolute(): raise BuildError(f"there is no home directory. {_ELSEWHERE}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error: raise BuildError(f"no folder {folder}: {error}. {_ELSEWHERE}") from None
    if stat.S_ISLNK(found.st_mode): wrong = "is a link"
    elif found.st_uid != os.geteuid(): wrong = "belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH): wrong = "can be written by others"
    else: return folder
    raise BuildError(f"libraries in {folder} can't be trusted, which {wrong}. {_ELSEWHERE}")


# With what -------------------------------------------------------------------------------------

# nanobind's versions with the tag of an MLX: modules see each other's types if their tags agree.
NANOBIND = {"0.32.4": ("3.0.1", "3.1.0")}


def compiler() -> list:
    "The command for C++: `CXX`, else g++, clang++ or c++; empty if there is none."
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else (["g++"], ["clang++"], ["c++"]):
        if shutil.which(command[0]): return command
    return []


def _nanobind():
    "nanobind's folder and version; None if it is not installed."
    try: import nanobind
    except ImportError: return None
    return Path(nanobind.__file__).parent, nanobind.__version__


def _state(path):
    "What changes when a file is replaced."
    found = os.stat(path)
    return f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}"


def processor() -> str:
    "What -march=native depends on: the extensions that the processor has."
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"): return " ".join(sorted(value.split()))
    return machine()


# What ------------------------------------------------------------------------------------------

class Library(NamedTuple):
    "One library, and what it depends on."
    name: str
    sources: tuple  # the first one is compiled, and includes the others
    flags: tuple
    holds_for: tuple  # what it is right for besides
    made_with: tuple  # tools: empty if they are not all there
    places: tuple = ()  # flags that say where files lie

    def key(self):
        "What tells it from libraries of other sources, flags, machines and versions."
        parts = *self.flags, *self.holds_for
        return _digest([path.read_bytes() for path in self.sources], map(str.encode, parts))

    def file(self, folder):
        "Its file. Where its tools are missing any file with the right key will do, or None."
        if self.made_with:
            return folder / f"{self.name}-{self.key()}-{_digest(map(str.encode, self.made_with))}.so"
        return next(folder.glob(f"{self.name}-{self.key()}-*.so"), None)


def _digest(*groups):
    digest = hashlib.sha256()
    for part in (part for group in groups for part in group):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _tools(*more):
    "The compiler as it is now and what else a library is made with; empty if one is missing."
    command = compiler()
    if not command or None in more: return ()
    return *command, _state(shutil.which(command[0])), *more


def kernels(
    architecture: str = "native",  # as g++ names it: "x86-64-v3" has AVX2, "x86-64" SSE2
) -> Library:
    "The kernels: plain C++, which neither MLX nor Python changes."
    option = "-march=" if machine() == "x86_64" else "-mcpu="
    flags = "-std=c++17", "-O3", option + architecture, "-fPIC", "-shared"
    sources = SOURCES / "kernels.cpp", *sorted(SOURCES.glob("*.h"))
    return Library("kernels", sources, flags, (machine(), processor()), _tools())


def glue() -> Library:
    "The primitive and its binding to Python, against the installed MLX."
    mlx = Path(mx.__file__).parent
    nanobind, number = _nanobind() or (Path(), None)
    headers = (sysconfig.get_path("include"), mlx / "include", nanobind / "include",
               nanobind / "ext/robin_map/include")
    places = (*(f"-isystem{folder}" for folder in headers), str(nanobind / "src/nb_combined.cpp"),
              f"-L{mlx / 'lib'}", "-lmlx")
    return Library(
        "glue", tuple(SOURCES / name for name in ("glue.cpp", "call.h", "conv.h", "pool.h")),
        ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DNB_DOMAIN=mlx", "-DNDEBUG"),
        (machine(), mx.__version__, _state(mlx / "lib/libmlx.so"), sysconfig.get_config_var("SOABI")),
        _tools(number), places)


# How -------------------------------------------------------------------------------------------

def _check_tools(library):
    "A `BuildError` that says what is missing."
    if not compiler():
        named = os.environ.get("CXX")
        raise BuildError(f"CXX={named} is not there" if named
                         else "there is no C++ compiler: apt-get install g++")
    if library.name != "glue": return
    if _nanobind() is None: raise BuildError(f"nanobind is not installed: {_install()}")
    python, mlx = Path(sysconfig.get_path("include")), Path(mx.__file__).parent / "include"
    if not (python / "Python.h").exists():
        raise BuildError(f"no Python.h in {python}: apt-get install python3-dev")
    if not (mlx / "mlx/mlx.h").exists(): raise BuildError(f"no headers of MLX in {mlx}")


def _install():
    "How to get the nanobind that fits the installed MLX."
    fitting = NANOBIND.get(mx.__version__)
    return f"pip install nanobind=={fitting[-1]}" if fitting else 'pip install -U "flashconv[cpu]"'


LONGEST = 300  # seconds that a compiler may take, ten times what it needs on a busy machine


def _compile(libraries, folder):
    "Compile side by side, into `folder`; the files there."
    files = [folder / f"{library.name}.so" for library in libraries]
    commands = [[*compiler(), *library.flags, str(library.sources[0]), *library.places, "-o", str(file)]
                for library, file in zip(libraries, files)]
    environment = os.environ | {"TMPDIR": str(folder), "LC_ALL": "C"}
    running = [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, errors="replace", env=environment)
               for command in commands]
    try:
        for process in running:
            output = process.communicate(timeout=LONGEST)[0]
            if process.returncode: raise BuildError(f"{shlex.join(process.args)} fails: {_first_error(output)}")
    except subprocess.TimeoutExpired: raise BuildError(f"{compiler()[0]} has not ended in {LONGEST} s") from None
    finally:
        for process in running: process.kill(), process.wait()
    return files


def _first_error(output):
    "The line of a compiler's output that says what is wrong."
    lines = output.strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if re.search("error|No space", line)), lines[-1])


def _tag(file):
    "nanobind's tag in a module."
    found = re.search(rb"nanobind\w*_a\d+_v\d+\w*", Path(file).read_bytes())
    return found and found[0].decode()


def load(
    glue_file: Path,
    kernels_file: Path,
):
    "Load both libraries: the module, which calls the kernels from now on."
    loader = ExtensionFileLoader("flashconv_glue", str(glue_file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    use(module, kernels_file)
    return module


def use(module, kernels_file):
    "Have the glue call these kernels from now on."
    function = ctypes.CDLL(str(kernels_file)).flashconv_run
    module.use(ctypes.cast(function, ctypes.c_void_p).value)


def _try(glue_file, kernels_file):
    "What a child process does with new libraries: a 1x1 convolution of 1, 2, 3 by 2."
    module = load(glue_file, kernels_file)
    x = mx.array([1.0, 2, 3]).reshape(1, 1, 3)
    y = module.Spec([1], [(0, 0)], [1])(x, mx.full((1, 1, 1), 2.0), stream=mx.cpu)
    if y.tolist() != [[[2, 4, 6]]]: sys.exit(f"a 1x1 convolution of 1, 2, 3 by 2 is {y}")


def _smoke(glue_file, kernels_file):
    "A `BuildError` unless a child process convolves with these libraries."
    expected = _tag(mx.__file__)
    if expected and _tag(glue_file) != expected:
        raise BuildError(f"nanobind {_nanobind()[1]} does not fit MLX {mx.__version__}: {_install()}")
    code = f"from flashconv.kernels.build import _try; _try({str(glue_file)!r}, {str(kernels_file)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "FLASHCONV_KERNELS": "off",
                                "FLASHCONV_BLAS": "off"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, env=environment, timeout=LONGEST)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise BuildError(f"the new libraries don't work: {last}")


PATIENCE = 120  # seconds to wait for another process that builds; then both build


@contextmanager
def _turn(folder):
    "One process at a time, whichever way the one before has ended."
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        end = monotonic() + PATIENCE
        while monotonic() < end:
            try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError: sleep(0.05)
            except OSError: break  # a file system without locks
            else: break
        yield
    finally: os.close(lock)


def _sweep(folder):
    "Remove what builds that were killed an hour ago or earlier have left."
    for left in folder.glob("building-*"):
        if left.stat().st_mtime < time() - 3600: shutil.rmtree(left, ignore_errors=True)


def _announce(folder):
    print(f"flashconv: compiling its kernels for this processor and MLX {mx.__version__}, once, into "
          f"{folder}: about 10 s", file=sys.stderr, flush=True)


def _move(file, to):
    "A file under its final name, where it is whole whenever it is seen."
    with open(file, "rb") as written: os.fsync(written.fileno())
    os.replace(file, to)


def _build(libraries, folder):
    "Compile, try and keep the libraries that are missing."
    _sweep(folder)
    files = [library.file(folder) for library in libraries]
    missing = [i for i, file in enumerate(files) if file is None or not file.exists()]
    if not missing: return
    for i in missing: _check_tools(libraries[i])
    _announce(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as work:
        new = _compile([libraries[i] for i in missing], Path(work))
        where = dict(zip(missing, new))
        _smoke(*(where.get(i, file) for i, file in enumerate(files)))
        for i, file in where.items(): _move(file, files[i])


def libraries(architecture: str = "native") -> tuple:
    """The files of the glue and the kernels, compiled now if they are not there yet.

    Raises `BuildError`, which says why not.
    """
    folder, wanted = _trusted(cache_folder()), (glue(), kernels(architecture))
    if not _are_there(wanted, folder):
        try:
            with _turn(folder): _build(wanted, folder)
        except OSError as error: raise BuildError(f"nothing can be built in {folder}: {error}. {_ELSEWHERE}") from None
    return tuple(library.file(folder) for library in wanted)


def _are_there(wanted, folder):
    files = [library.file(folder) for library in wanted]
    return all(file is not None and file.exists() for file in files)


def main() -> int:  # exit status
    "`python -m flashconv build`: compile the kernels ahead of their first use and say where they are."
    if sys.platform != "linux": print("flashconv compiles kernels on Linux only: there is nothing to do")
    else:
        try: files = libraries()
        except BuildError as error: return f"flashconv can't build its kernels: {error}"
        print("flashconv's kernels are ready:", *files, sep="\n")
    return 0
