"""Every notebook runs from top to bottom: its asserts are tests, too."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbdev", reason="nbdev, which runs the notebooks, is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in ROOT.glob("nbs/**/*.ipynb")
                   if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT).parts))
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb

flags = get_config().tst_flags.split()
passed, _ = test_nb(Path(sys.argv[1]).absolute(), skip_flags=flags, basepath=Path.cwd())
sys.exit(not passed)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_notebook(path):
    "By nbdev's runner, in a process of its own."
    done = subprocess.run([sys.executable, "-c", RUN, path], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr


def test_there_are_notebooks():
    "The search above finds the pages."
    assert len(NOTEBOOKS) > 10
