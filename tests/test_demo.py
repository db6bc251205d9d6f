"""`python -m flashconv`, run as a user runs it."""
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from flashconv.demo import develop

COPY = Path(__file__).parents[1] / "nbs" / "images" / "demo.png"
LINE = re.compile(r"(\w+) +(\(\d+, \d+, \d+\)) +-> (\(\d+, \d+, \d+\)) +\d+\.\d ms  (.+)")
SHAPES = {  # of matplotlib's photograph, before and after each layer
    "blur": ("(3, 600, 512)", "(3, 600, 512)"), "edges": ("(3, 600, 512)", "(2, 600, 512)"),
    "dilated": ("(3, 600, 512)", "(2, 600, 512)"), "strided": ("(3, 600, 512)", "(3, 75, 64)"),
    "transposed": ("(3, 77, 66)", "(3, 600, 512)"), "grouped": ("(3, 600, 512)", "(3, 600, 512)"),
    "lazy": ("(5, 600, 512)", "(3, 600, 512)")}


def run(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "flashconv", *map(str, arguments)], cwd=folder,
                          env={**os.environ, "PYTHONWARNINGS": "ignore", "COLUMNS": "80"},
                          capture_output=True, text=True, encoding="utf-8", timeout=300)


def layer_lines(done):
    "name -> (input shape, output shape, repr) of the layers that a run printed."
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("wrote ")
    return {name: rest for name, *rest in (LINE.fullmatch(line).groups() for line in lines)}


def refused(done):
    "The one line in which a run refused its arguments."
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *others, line = done.stderr.splitlines()
    assert line.startswith("python -m flashconv: can't ")
    assert not [other for other in others if "python -m flashconv" in other]
    return line


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    "The folder in which the command ran without arguments, and how it went."
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder)


def picture(folder, name, array, mode=None):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(folder / name)
    return folder / name


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_one_line_a_layer_with_repr_and_shapes(default):
    lines = layer_lines(default[1])
    assert {name: (x, y) for name, (x, y, _) in lines.items()} == SHAPES
    reprs = {name: text for name, (_, _, text) in lines.items()}
    assert "padding=same, groups=3, bias=False, padding_mode=reflect" in reprs["blur"]
    assert "dilation=(4, 4)" in reprs["dilated"]
    assert reprs["strided"] == "Conv2d(3, 3, kernel_size=(8, 8), stride=(8, 8), groups=3, bias=False)"
    assert reprs["transposed"].startswith("ConvTranspose2d(3, 3, kernel_size=(16, 16), stride=(8, 8)")
    assert reprs["lazy"] == ("LazyConv2d(0, 3, kernel_size=(1, 1), stride=(1, 1)) -> "
                             "Conv2d(5, 3, kernel_size=(1, 1), stride=(1, 1))")


def test_the_sheet_is_white_small_and_wide_enough(default):
    file = default[0] / "demo.png"
    assert [path.name for path in default[0].iterdir()] == ["demo.png"]
    assert file.stat().st_size < 600_000
    with Image.open(file) as sheet:
        assert sheet.format == "PNG"
        assert 1200 <= sheet.width <= 1600
        assert sheet.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_two_runs_write_the_same_bytes(default, tmp_path):
    layer_lines(run(tmp_path, "--output", "again.png"))
    assert (tmp_path / "again.png").read_bytes() == (default[0] / "demo.png").read_bytes()


def test_the_documentation_shows_what_the_command_draws(default):
    with Image.open(COPY) as shown, Image.open(default[0] / "demo.png") as drawn:
        assert shown.size == drawn.size
        a, b = (np.asarray(sheet.convert("RGB"), np.float32) for sheet in (shown, drawn))
    assert np.abs(a - b).mean() < 8, "python -m flashconv --output nbs/images/demo.png"


@pytest.mark.parametrize("name, array, mode", [
    ("colours.jpg", noise(40, 56, 3), None), ("grey.png", noise(40, 56), None),
    ("transparent.png", noise(40, 56, 4), None), ("grey and transparent.png", noise(40, 56), "LA"),
    ("deep.png", noise(40, 56, dtype=np.uint16), None), ("palette.gif", noise(40, 56, 3), "P"),
    ("deep.tiff", noise(40, 56, dtype=np.uint16), None), ("bits.png", noise(40, 56), "1"),
    ("print.jpg", noise(40, 56, 3), "CMYK"), ("plain.png", np.full((40, 56), 9, np.uint8), None)])
def test_a_picture_of_ones_own(tmp_path, name, array, mode):
    lines = layer_lines(run(tmp_path, picture(tmp_path, name, array, mode)))
    assert list(lines) == list(SHAPES)
    assert lines["blur"][0] == "(3, 40, 56)"
    assert (tmp_path / "demo.png").stat().st_size > 0


def test_the_smallest_picture_and_sizes_that_eight_does_not_divide(tmp_path):
    assert layer_lines(run(tmp_path, picture(tmp_path, "16.png", noise(16, 16))))["strided"][1] == (
        "(3, 2, 2)")
    lines = layer_lines(run(tmp_path, picture(tmp_path, "odd.png", noise(31, 45, 3))))
    assert (lines["strided"][1], lines["transposed"][1]) == ("(3, 3, 5)", "(3, 24, 40)")


def test_a_large_picture_is_shrunk(tmp_path):
    lines = layer_lines(run(tmp_path, picture(tmp_path, "large.png", noise(160, 1280))))
    assert lines["blur"][0] == "(3, 80, 640)"


def test_a_picture_on_its_side_is_turned(tmp_path):
    sideways = Image.Exif()
    sideways[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(noise(40, 56, 3)).save(tmp_path / "phone.jpg", exif=sideways)
    assert layer_lines(run(tmp_path, "phone.jpg"))["blur"][0] == "(3, 56, 40)"


def test_sixteen_bits_and_transparency_keep_their_brightness(tmp_path):
    from flashconv.demo import read_picture
    deep = picture(tmp_path, "deep.png", np.full((20, 20), 0x8000, np.uint16))
    assert np.allclose(read_picture(deep), 128 / 255)
    clear = picture(tmp_path, "clear.png", np.zeros((20, 20, 4), np.uint8))
    assert np.allclose(read_picture(clear), 1)


def test_importing_the_command_does_not_run_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import flashconv.__main__"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])


def test_the_package_does_not_need_matplotlib_to_be_imported():
    code = "import flashconv, sys; print('matplotlib' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "False"]


def test_what_is_no_picture_is_refused_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    whole = picture(tmp_path, "whole.png", noise(40, 56)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    line = refused(run(tmp_path, "missing.png"))
    assert "can't read missing.png: No such file or directory" in line
    assert "cannot identify image file" in refused(run(tmp_path, "notes.txt"))
    assert "truncated" in refused(run(tmp_path, "half.png"))
    assert "cannot identify" in refused(run(tmp_path, "empty.jpg"))
    assert "Is a directory" in refused(run(tmp_path, "."))
    assert not (tmp_path / "demo.png").exists()


def test_a_tiny_picture_is_refused_with_the_rule(tmp_path):
    for shape in ((1, 1), (15, 40), (10, 1280)):
        line = refused(run(tmp_path, picture(tmp_path, "tiny.png", noise(*shape))))
        assert "at least 16 x 16 pixels are needed" in line


def test_an_output_that_cannot_be_written_is_one_line_too(tmp_path):
    small = picture(tmp_path, "small.png", noise(20, 20))
    done = run(tmp_path, small, "--output", "no/such/folder.png")
    assert done.returncode == 2
    assert "can't write no/such/folder.png: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_captions_say_what_came_out():
    "Sizes after the layer and channels before it, width first as on a picture."
    captions = {step.name: step.caption for step in develop(mx.zeros((3, 48, 32)))}
    assert captions["strided"].endswith("down to 4 × 6")
    assert captions["transposed"].endswith("up to 32 × 48")
    assert captions["lazy"] == "LazyConv2d: counts 5 channels, mixes them"
