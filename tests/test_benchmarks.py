"""The benchmarks run, and say who couldn't; never how long anything may take."""
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flashconv import kernels

pytest.importorskip("torch", reason="PyTorch is not installed")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments, script="layers.py"):
    return subprocess.run([sys.executable, BENCHMARKS / script, *map(str, arguments)],
                          capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "The folder with the files of a quick run on a row that mlx.nn refuses in 3d."
    folder = tmp_path_factory.mktemp("bench") / "new"
    done = run("--quick", "--rows", "depthwise 3x3x3*", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "1/1 done" in done.stderr
    return folder


def test_files(out):
    pictures = {"benchmark.svg", "benchmark_layers.svg"}
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md"} | pictures
    for name in pictures: assert ElementTree.parse(out / name).getroot().tag.endswith("svg")


def test_what_the_home_page_says_of_its_picture(monkeypatch):
    "mlx.nn is far to the right where the alt text says so, PyTorch for long kernels only."
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report
    rows = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))["rows"]
    for which in report.NAMES:
        mlx = report.by_class(rows, which, [report.NATIVE_FAST])
        torch = report.by_class(rows, which, report.TORCH)
        far = {name for name in mlx if name.startswith("depthwise")}
        assert min(mlx[name] for name in far | {"dilated", "transposed", "grouped"}) > 10
        assert torch.pop("depthwise 1d, long") > 10 > max(torch.values())
    alt = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    assert "far to the right for dilated, transposed, grouped and depthwise layers" in alt
    assert "around 1 for most classes and far to the right for long kernels" in alt


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


def test_steps(tmp_path):
    "All steps give what the loop gives, or there is no file; the pages read these names."
    if not kernels.available(): pytest.skip(f"the steps are compiled: {kernels.info()}")
    done = run("--quick", "--out", tmp_path, script="steps.py")
    assert done.returncode == 0, done.stderr
    found, kept = (json.loads((folder / "steps.json").read_text(encoding="utf-8"))
                   for folder in (tmp_path, BENCHMARKS))
    assert [*found["gflops"]] == [*kept["gflops"]] == ["loop", "vectors", "blocks", "tiles", "threads", "peak"]
    assert min(found["gflops"].values()) > 0 and found["threads"] >= 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "The folder with the files of a quick run on the smallest network."
    folder = tmp_path_factory.mktemp("bench-models")
    done = run("--quick", "--rows", "Whisper*", "--out", folder, script="models.py")
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout or "missed" in done.stdout
    return folder


def test_models(models):
    "Both passes have times and agree with PyTorch; the floors have figures."
    found = json.loads((models / "models.json").read_text(encoding="utf-8"))
    (row,) = found["rows"]
    assert row["passes"].keys() == {"inference", "training"}
    for cells in row["passes"].values():
        assert 0 < cells["flashconv channels_last"]["min"] and 0 < cells["PyTorch"]["min"]
        assert cells["flashconv channels_last"]["workspace"] > 2**20
        assert not [cell for cell in cells.values() if cell["note"].startswith("wrong")]
        assert cells["PyTorch channels_last"]["note"] == "cannot: PyTorch has no such format in 1d"
    assert found["floors"][0]["figure"] > 0
    assert "Whisper stem" in (models / "models.md").read_text(encoding="utf-8")


def test_converted():
    "Each way to convert a network has a time or says why not, and is right."
    done = run("--quick", "--rows", "Whisper*", script="converted.py")
    assert done.returncode == 0, done.stderr
    heading, row = done.stdout.splitlines()
    assert "converted, folded" in heading and row.startswith("Whisper stem")
    assert row.split()[3] == "ms" and len(row.split()) == 8 and "wrong" not in row


def test_streaming():
    "Both ways are right, and have times."
    done = run("--quick", "--rows", "t*", script="streaming.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("us by hand" in line and "us a step" in line for line in lines)


def test_rows_padded_on_one_side(tmp_path):
    "PyTorch and mlx.nn pad before, and give the same."
    done = run("--quick", "--rows", "3x3 s2 (0, 1)*", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    for cells in row["passes"].values():
        assert not [cell["note"] for cell in cells.values() if cell["note"] not in ("", "once")]


WRONG = """
import sys
sys.argv = ["models.py", "--quick", "--rows", "Whisper*", "--out", sys.argv[1]]
import models, timing
right = models.OnMLX.numpy
def off(self, outputs):
    y, *gradients = right(self, outputs)
    return [y] if not gradients else [y, 1.5 * gradients[0]]
models.OnMLX.numpy = off
models.main()
"""


def test_wrong_gradients_are_an_error(tmp_path):
    "Gradients half too large end the run with an error that says whose and how far."
    done = subprocess.run([sys.executable, "-c", WRONG, tmp_path], capture_output=True, text=True,
                          cwd=BENCHMARKS, timeout=300)
    assert done.returncode == 1
    assert "Whisper stem, training, flashconv channels_last: wrong: off by 5.0e-01" in done.stderr
    assert "inference" not in done.stderr


def test_survey():
    "A case is the same each time, is timed alone, and listed beyond a limit and not below."
    runs = [run("--only", 2, "--torch", limit, script="survey.py") for limit in (0, 1e9)]
    for done in runs: assert done.returncode == 0, done.stderr
    first, second = (done.stdout for done in runs)
    for printed in (first, second):
        assert printed.startswith("2: 1x1 32x16x22x10x4 -> 21 kernel 1x1x1\n")
    for which in ("forward", "input_gradient", "weight_gradient"):
        assert f"x PyTorch  {which:15} flashconv channels_last" in first
        assert f"  {which}: flashconv " in second
    assert "x PyTorch" not in second
