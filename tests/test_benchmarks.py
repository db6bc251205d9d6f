"""The benchmark runs, and says who couldn't; never how long anything may take."""
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "layers.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True,
                          text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "The folder with the files of a quick run on a row that mlx.nn refuses in 3d."
    folder = tmp_path_factory.mktemp("bench") / "new"
    done = run("--quick", "--rows", "depthwise 3x3x3*", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "1/1 done" in done.stderr
    return folder


def test_three_files(out):
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "benchmark.svg"}
    assert ElementTree.parse(out / "benchmark.svg").getroot().tag.endswith("svg")


def test_figures(out):
    "Those that can run have times; MLX's have a workspace; nothing is wrong."
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["machine"]["cores"] >= 1 and found["floors"]
    (row,) = found["rows"]
    for cells in row["passes"].values():
        assert 0 < cells["flashconv"]["min"] <= cells["flashconv"]["median"]
        assert cells["flashconv"]["workspace"] >= 0
        assert 0 < cells["PyTorch"]["min"] and cells["PyTorch"]["workspace"] is None
        assert not [cell for cell in cells.values() if cell["note"].startswith("wrong")]


def test_who_cannot_says_so(out):
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    note = found["rows"][0]["passes"]["forward"]["mlx.nn"]["note"]
    assert note.startswith("cannot: ") and "groups" in note
    assert note in (out / "results.md").read_text(encoding="utf-8")


def test_no_such_row():
    done = run("--rows", "no such row")
    assert done.returncode == 2 and "no row is called 'no such row'" in done.stderr
