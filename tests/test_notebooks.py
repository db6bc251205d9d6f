"""Every notebook runs from top to bottom on a clean kernel, and gives what it has saved.

Its asserts are tests, too. The saved outputs are those of MLX's CPU backend on Linux: elsewhere
the notebooks run, and only that is checked. Pictures are compared where the same Matplotlib draws
them, SVGs by their parts and places.
"""
import base64
import copy
import re
import sys
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import pytest

for needed in ("nbclient", "nbformat", "ipykernel"): pytest.importorskip(needed)

import matplotlib
import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image, UnidentifiedImageError

from flashconv import kernels

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in ROOT.glob("nbs/**/*.ipynb")
                   if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT).parts))
SAME_BACKEND = sys.platform == "linux" and not (mx.metal.is_available() or mx.cuda.is_available())
VERSION = re.compile(rb"Matplotlib (?:version ?|v)([\d.]+\d)")


def run(nb, folder, seed=1):
    """The notebook after a run in `folder` on a clean kernel. Raises what a cell raises.

    A kernel starts from a random state of its own. `seed` takes its place, another one than any
    page's: what a page shows of numbers that it has not seeded differs here in every run.
    """
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = []
    nb.cells.insert(0, nbformat.v4.new_code_cell(f"__import__('mlx.core').core.random.seed({seed})"))
    NotebookClient(nb, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(folder)}}).execute()
    del nb.cells[0]
    return nb


def shown(cell):
    "What a cell shows: its streams by name, its results by type."
    found = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            if found and found[-1][0] == output.name: found[-1][1] += output.text
            else: found.append([output.name, output.text])
        else: found += [[kind, _text(kind, value)] for kind, value in sorted(output.data.items())]
    return found


def _text(kind, value):
    "Nbdev takes addresses out of text, and line ends from the end of pictures."
    if kind.startswith("image/"): return value if "svg" in kind else value.strip()
    if not isinstance(value, str): return value
    return re.sub(r"(<.*?) at 0x[0-9a-fA-F]+(>)", r"\1\2", value)


def stale(saved, again):
    """What a run shows otherwise than the saved notebook, and whose Matplotlib is another one.

    Both are lists of text: the first of differences, the second of pictures that were left out.
    """
    differences, left_out = [], []
    for before, after in zip(saved.cells, again.cells, strict=True):
        if before.cell_type != "code": continue
        old, new = shown(before), shown(after)
        if [kind for kind, _ in old] != [kind for kind, _ in new]:
            differences.append(f"{before.source}\nshowed {old}\nshows {new}")
            continue
        for (kind, was), (_, is_now) in zip(old, new):
            drawn_by = matplotlib_of(kind, was)
            if drawn_by not in (None, matplotlib.__version__):
                left_out.append(f"drawn by Matplotlib {drawn_by}, not {matplotlib.__version__}")
            elif was != is_now and not alike(kind, was, is_now):
                short = f"\nwas {was}\nis  {is_now}" if kind[:5] != "image" else ", another picture"
                differences.append(f"{before.source}\n{kind}{short}")
    return differences, left_out


def matplotlib_of(kind, value):
    "The version of Matplotlib that drew a picture, by its name in it or else in the book's SVGs."
    if not kind.startswith("image/"): return DRAWN_BY if "data:image/" in value else None
    found = VERSION.search(value.encode() if "svg" in kind else base64.b64decode(value))
    return found[1].decode() if found else DRAWN_BY


DRAWN_BY = VERSION.search((ROOT / "nbs" / "09_draw.ipynb").read_bytes())[1].decode()


def alike(kind, was, is_now):
    "Whether two pictures differ by no more than another processor's last bits do."
    if kind == "image/svg+xml": return alike_svg(was, is_now)
    if kind != "image/png": return False
    try: old, new = (Image.open(BytesIO(base64.b64decode(png))) for png in (was, is_now))
    except UnidentifiedImageError: return False
    if old.size != new.size: return False
    old, new = (np.asarray(picture.convert("RGB"), float) for picture in (old, new))
    return np.abs(old - new).mean() < 1  # of 255


NAMED = re.compile(r"\b[mp][0-9a-f]{10}\b")  # by Matplotlib, for a hash of coordinates to the last bit
PLACE = re.compile(r"(?<![\w.])-?\d+\.\d+")  # in points, cut off after two decimals


def alike_svg(was, is_now):
    "Whether two SVGs have the same parts at the same places, to a fiftieth of a point."
    shapes, places = [], []
    for svg in (was, is_now):
        names = {name: f"name{i}" for i, name in enumerate(dict.fromkeys(NAMED.findall(svg)))}
        svg = NAMED.sub(lambda found: names[found[0]], svg)
        shapes.append(PLACE.sub("", svg))
        places.append([float(place) for place in PLACE.findall(svg)])
    return shapes[0] == shapes[1] and np.allclose(*places, rtol=0, atol=0.02)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_notebook(path, monkeypatch):
    "One run: no cell fails, and each shows what it showed."
    if (path.parent.name == "kernels" or path.stem == "kernel") and not kernels.available():
        pytest.skip(f"the page runs kernels: {kernels.info()}")
    if not kernels.available():
        monkeypatch.setenv("FLASHCONV_KERNELS", "off")  # the warning would be an output
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own: figures are outputs
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    saved = nbformat.read(ROOT / path, as_version=4)
    code = "\n".join(cell.source for cell in saved.cells if cell.cell_type == "code")
    if re.search(r"^(import|from) torch\b", code, re.M): pytest.importorskip("torch")
    differences, left_out = stale(saved, run(saved, (ROOT / path).parent))
    if not SAME_BACKEND: return
    assert not differences, "run the notebook again and commit it:\n" + "\n\n".join(differences)
    if left_out: pytest.skip(f"{len(left_out)} pictures not compared: {left_out[0]}")


def test_there_are_notebooks():
    "The search above finds the pages."
    assert len(NOTEBOOKS) > 10


# What the comparison finds -------------------------------------------------------------------

SVG = "<svg><dc:title>Matplotlib v{}, https://matplotlib.org/</dc:title>{}</svg>"
PNG = b"\x89PNG tEXtSoftware\0Matplotlib version%s, https://matplotlib.org/ %s"


def page(*outputs):
    "A notebook of one cell that shows `outputs`."
    cell = nbformat.v4.new_code_cell("show()", outputs=list(outputs))
    return nbformat.v4.new_notebook(cells=[cell])


def text(value): return nbformat.v4.new_output("stream", name="stdout", text=value)


def svg(version, drawing):
    return nbformat.v4.new_output("display_data", {"image/svg+xml": SVG.format(version, drawing)})


def png(version, drawing):
    data = base64.b64encode(PNG % (version.encode(), drawing.encode())).decode()
    return nbformat.v4.new_output("display_data", {"image/png": data})


@pytest.mark.parametrize("before, after", (
    ([text("1")], [text("2")]), ([text("1")], []), ([], [text("1")]),
    ([svg(matplotlib.__version__, "a")], [svg(matplotlib.__version__, "b")]),
    ([png(matplotlib.__version__, "a")], [png(matplotlib.__version__, "b")]),
    ([svg("2.0.0", "a")], [text("a")]),
), ids=("text", "nothing now", "nothing then", "SVG", "PNG", "text for a picture"))
def test_finds_stale_outputs(before, after):
    "Another text or picture, or one too few or too many."
    assert len(stale(page(*before), page(*after))[0]) == 1
    assert stale(page(*before), page(*before))[0] == []


def test_tells_pictures_apart():
    "Rounding is no other picture; a white square in it is."
    def encoded(pixels):
        file = BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return base64.b64encode(file.getvalue()).decode()
    grey = np.full((20, 20, 3), 100, np.uint8)
    rounded, marked = grey + (np.arange(20) % 2)[:, None, None].astype(np.uint8), grey.copy()
    marked[:5, :5] = 255
    assert alike("image/png", encoded(grey), encoded(rounded))
    assert not alike("image/png", encoded(grey), encoded(marked))
    assert not alike("image/png", encoded(grey), encoded(grey[:10]))


@pytest.mark.parametrize("other, same", (
    ("M 113.99 2.00 url(#p0123456789) #m0123456789", True), ("M 114.00 2.01 url(#pa) #m0123456789", False),
    ("M 114.00 2.01 url(#pfedcba9876) #m0123456789", True), ("M 114.10 2.00 url(#p0123456789) #m0123456789", False),
    ("M 114.00 2.00 url(#p0123456789) #p0123456789", False), ("L 114.00 2.00 url(#p0123456789) #m0123456789", False),
    ("M 114.00 url(#p0123456789) #m0123456789", False)))
def test_tells_svgs_apart(other, same):
    "Another rounding, and names by hashes of it, are no other picture."
    assert alike("image/svg+xml", "M 114.00 2.00 url(#p0123456789) #m0123456789", other) == same


@pytest.mark.parametrize("kind, value, drawn_by", (
    ("image/png", base64.b64encode(b"a palette").decode(), DRAWN_BY),
    ("text/html", '<img src="data:image/gif;base64,AAAA">', DRAWN_BY),
    ("text/html", '<source src="data:audio/wav;base64,AAAA">', None), ("stdout", "3.10.1", None)))
def test_pictures_without_a_name(kind, value, drawn_by):
    "Palettes and animations are as old as the drawings."
    assert matplotlib_of(kind, value) == drawn_by and re.fullmatch(r"\d+\.\d+\.\d+", DRAWN_BY)


@pytest.mark.parametrize("picture", (svg, png))
def test_leaves_out_pictures_of_another_matplotlib(picture):
    "Their bytes say nothing about the page."
    before, after = picture("2.0.0", "a"), picture(matplotlib.__version__, "b")
    differences, left_out = stale(page(before), page(after))
    assert differences == []
    assert left_out == [f"drawn by Matplotlib 2.0.0, not {matplotlib.__version__}"]


def test_finds_failures(tmp_path):
    "A cell that raises."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 > 2")])
    with pytest.raises(Exception, match="AssertionError"): run(nb, tmp_path)
