"""The tests in empty environments: every Python, the oldest and the newest that settings.ini admits.

`make environments`, or `python tools/environments.py 3.12 oldest wheel` for some of them. Pythons are
looked for on the path and under ~/.pyenv; one that is not there is named and passed over. PyTorch
judges where its wheels are to be had; `TORCH=` leaves it out.
"""
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
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


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


def tested(inside):
    "Whether the core tests pass, with what pytest says last."
    done = subprocess.run([inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE], cwd=ROOT,
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"})
    return done.returncode == 0, (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]


def on(version, oldest=False):
    "The core tests on one Python, with the newest packages or the oldest that are admitted."
    python = find(version)
    if python is None: return None, "not installed"
    wanted = [name.replace(">=", "==") for name in requirements()] if oldest else requirements()
    wanted = [re.sub(r"^mlx\b", "mlx[cpu]", name) for name in wanted]
    with tempfile.TemporaryDirectory() as folder:
        try: inside = environment(folder, python, *wanted, "pytest", "safetensors",
                                  *filter(None, [TORCH]))
        except subprocess.CalledProcessError as error: return False, f"not installable: {error}"
        return tested(inside)


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
        extra = unexpected(inside, (r"flashconv/((algorithms|convert)/)?\w+\.py",
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

if __name__ == "__main__":
    failed = []
    for name in sys.argv[1:] or JOBS:
        passed, words = JOBS[name]()
        print(f"{name:8} {'passed' if passed else 'absent' if passed is None else 'FAILED'}: {words}",
              flush=True)
        if passed is False: failed.append(name)
    sys.exit(bool(failed))
