"""The drawings: numbers of the layers, the same bytes on every run, words for what is seen."""
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from io import BytesIO

import matplotlib
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import flashconv as nn
from flashconv import arguments, arithmetic, draw, functional

SVG = "{http://www.w3.org/2000/svg}"


def filled(cls, *args, **options):
    "A layer with small whole weights, the same in each process."
    layer = cls(*args, **options)
    layer.weight = (mx.arange(layer.weight.size) % 5 - 1.0).reshape(layer.weight.shape)
    if layer.bias is not None: layer.bias = mx.arange(1.0, layer.bias.size + 1)
    return layer


def stack():
    return [nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, stride=2),
            nn.Conv1d(1, 1, 2, dilation=2)]


PICTURES = {  # name -> with numbers, with a layer, what the alt text says
    "window 1d": (lambda: draw.window(3, 7, stride=2, padding=1),
                  lambda: draw.window(filled(nn.Conv1d, 1, 1, 3, 2, 1), 7), "4 outputs"),
    "window 2d": (lambda: draw.window(3, (5, 4), padding="same"),
                  lambda: draw.window(filled(nn.Conv2d, 2, 2, 3, padding="same"), (5, 4)),
                  "5 × 4 outputs"),
    "transposed 1d": (lambda: draw.window(3, 4, stride=2, transposed=True),
                      lambda: draw.window(filled(nn.ConvTranspose1d, 1, 1, 3, 2), 4), "9 outputs"),
    "transposed 2d": (lambda: draw.window((2, 3), 3, stride=2, transposed=True),
                      lambda: draw.window(filled(nn.ConvTranspose2d, 1, 1, (2, 3), 2), 3),
                      "6 × 7 outputs"),
    "frames": (lambda: draw.frames(3, 7, stride=2),
               lambda: draw.frames(filled(nn.Conv1d, 1, 1, 3, 2), 7), "3 outputs"),
    "animation": (lambda: draw.animation(3, 5),
                  lambda: draw.animation(filled(nn.Conv1d, 1, 1, 3), 5), "3 outputs"),
    "matrix": (lambda: draw.matrix(3, 7, stride=2),
               lambda: draw.matrix(filled(nn.Conv1d, 1, 1, 3, 2), 7), "3 outputs"),
    "padding_modes": (lambda: draw.padding_modes([1, 2, 3], 2),
                      lambda: draw.padding_modes(mx.array([1.0, 2, 3]), (2, 2)), "padded to 7"),
    "dilation_taps": (lambda: draw.dilation_taps(2, (2,)),
                      lambda: draw.dilation_taps(nn.Conv1d(1, 1, 2, dilation=2)), "span 3"),
    "gridding": (lambda: draw.dilation_taps((3, 3), (2, 2), stacked=True),
                 lambda: draw.dilation_taps([nn.Conv1d(1, 1, 3, dilation=2)] * 2, stacked=True),
                 "sees 9 inputs, of which 4 are never used"),
    "groups": (lambda: draw.groups(4, 8, 2), lambda: draw.groups(nn.Conv2d(4, 8, 3, groups=2)),
               "8 output channels"),
    "receptive_field": (lambda: draw.receptive_field([(3, 1, 1), (3, 2), (2, 1, 0, 2)]),
                        lambda: draw.receptive_field(stack()), "9 inputs, from -1 to 7"),
    "overlap 1d": (lambda: draw.overlap(3, 2, 4),
                   lambda: draw.overlap(nn.ConvTranspose1d(1, 1, 3, 2), size=4), "9 outputs"),
    "overlap 2d": (lambda: draw.overlap(3, 2, (3, 2)),
                   lambda: draw.overlap(nn.ConvTranspose2d(1, 1, 3, 2), size=(3, 2)),
                   "7 × 5 outputs"),
    "output_sizes": (lambda: draw.output_sizes(3, 2, 1),
                     lambda: draw.output_sizes(nn.Conv2d(1, 1, 3, 2, 1)), "5, 6 give 3"),
    "feature_maps": (lambda: draw.feature_maps(mx.arange(50.0).reshape(2, 5, 5)),
                     lambda: draw.feature_maps(filled(nn.Conv2d, 1, 2, 3), mx.ones((1, 7, 7))),
                     "2 of 2 feature maps of 5 × 5"),
    "kernels": (lambda: draw.kernels(filled(nn.Conv2d, 3, 9, 3)),
                lambda: draw.kernels(filled(nn.ConvTranspose1d, 3, 9, 3)), "8 of 9 kernels"),
    "figure": (lambda: draw.figure(lambda ax: ax.plot([1, 2]), alt="A line from 1 to 2."),) * 2 + (
        "from 1 to 2",),
}


# What every picture is --------------------------------------------------------------------------

@pytest.mark.parametrize("name", PICTURES)
def test_numbers_and_layers(name):
    "Every function takes numbers and a layer, and says the same of the same case."
    numbers, layer, words = PICTURES[name]
    for picture in (numbers(), layer()):
        assert words in picture.alt
        assert repr(picture) == picture.alt


@pytest.mark.parametrize("name", PICTURES)
def test_form(name):
    "An SVG of at most 6 x 2.5 inches on white paper, or a GIF, that says what it shows."
    picture = PICTURES[name][1]()
    bundle, metadata = picture._repr_mimebundle_()
    assert bundle["text/plain"] == picture.alt
    if isinstance(picture.data, bytes):
        assert 'alt="' in bundle["text/html"]
        return
    svg = ET.fromstring(picture.data)
    assert svg.get("role") == "img"
    assert svg.find(SVG + "title").text == (picture.caption or picture.alt)
    assert svg.find(SVG + "desc").text == picture.alt == metadata["image/svg+xml"]["alt"]
    wide, high = (float(svg.get(side).removesuffix("pt")) / 72 for side in ("width", "height"))
    assert 0 < wide <= 6.001 and 0 < high <= 2.501
    assert next(svg.iter(SVG + "path")).get("style").replace(" ", "") == "fill:#ffffff"
    assert len(picture.data) < 60_000
    assert not any(text in picture.data for text in ("<text", "<!--", "\n", "dc:date"))


def test_the_same_bytes_in_every_process():
    "Two fresh processes draw all pictures alike, one of them with a user's own settings."
    code = ("import hashlib, matplotlib, sys; sys.path.insert(0, 'tests')\n"
            "matplotlib.rcParams.update(eval(sys.argv[1]))\nfrom test_draw import PICTURES\n"
            "for a, b, _ in PICTURES.values():\n  for p in (a(), b()):\n"
            "    d = p.data if type(p.data) is bytes else p.data.encode()\n"
            "    print(hashlib.sha1(d).hexdigest())")
    settings = {"font.size": 30, "font.family": "serif", "svg.fonttype": "none",
                "mathtext.default": "it", "figure.dpi": 31, "axes.grid": True,
                "figure.facecolor": "black", "text.usetex": True, "savefig.bbox": "tight"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runs = [subprocess.Popen([sys.executable, "-c", code, repr(given)], cwd=root, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": seed})
            for given, seed in (({}, "1"), (settings, "2"))]
    first, second = (run.communicate(timeout=120)[0].split() for run in runs)
    assert len(first) == 2 * len(PICTURES)
    assert first == second


def test_settings_stay_the_users():
    "Drawing leaves matplotlib's settings as they are, and doesn't import pyplot."
    with matplotlib.rc_context({"font.size": 17, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        for numbers, _, _ in PICTURES.values(): numbers()
        assert dict(matplotlib.rcParams) == before
    code = "import sys, flashconv.draw; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_save(tmp_path):
    still, moving = draw.window(3, 5), draw.animation(3, 5)
    still.save(tmp_path / "a.svg")
    moving.save(tmp_path / "a.gif")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == still.data
    assert (tmp_path / "a.gif").read_bytes() == moving.data
    for picture, name in ((still, "a.gif"), (moving, "a.svg"), (still, "a")):
        with pytest.raises(ValueError, match=f"but got '{tmp_path / name}'"):
            picture.save(str(tmp_path / name))


def test_escaped():
    "Words with markup in them stay words."
    alt = 'a < b & "c"'
    picture = draw.figure(lambda ax: None, alt=alt, caption="<i>")
    assert ET.fromstring(picture.data).find(SVG + "desc").text == alt


# The numbers ------------------------------------------------------------------------------------

CASES = [
    (nn.Conv1d, 8, (1, 1, 3), dict(stride=2, padding=1)),
    (nn.Conv1d, 9, (1, 1, 3), dict(dilation=2, padding="same")),
    (nn.Conv1d, 9, (1, 1, 4), dict(padding="same", padding_mode="circular")),
    (nn.Conv1d, 9, (1, 1, 4), dict(padding="valid", bias=False)),
    (nn.Conv2d, (5, 6), (1, 1, (3, 2)), dict(stride=(2, 1), padding=(1, 0))),
    (nn.Conv2d, (3, 4), (1, 1, 4), dict(padding=2, padding_mode="reflect")),
    (nn.Conv2d, 4, (1, 1, 1), {}),
    (nn.ConvTranspose1d, 5, (1, 1, 3), dict(stride=2, padding=1, output_padding=1)),
    (nn.ConvTranspose1d, 4, (1, 1, 2), dict(dilation=3, output_padding=2)),
    (nn.ConvTranspose1d, 5, (1, 1, 1), dict(stride=2, padding=1)),
    (nn.ConvTranspose2d, 2, (1, 1, (2, 3)), dict(stride=2, padding=(1, 0), output_padding=(1, 0))),
]


def case_of(cls, args, options): return filled(cls, *args, **options)


@pytest.mark.parametrize("cls, size, args, options", CASES)
def test_window_draws_what_the_layer_gives(cls, size, args, options):
    layer = case_of(cls, args, options)
    drawn = draw.window(layer, size).numbers
    theirs = np.array(layer(mx.array(drawn["input"], mx.float32)[None])[0])
    assert drawn["output"].shape == theirs.shape
    np.testing.assert_allclose(drawn["output"], theirs, rtol=1e-6)


@pytest.mark.parametrize("cls, size, args, options", CASES)
def test_every_step_uses_the_orange_cells(cls, size, args, options):
    "An output is the sum over its taps; a transposed input reaches its taps and no others."
    layer = case_of(cls, args, options)
    kernel = np.array(layer.weight[0, 0]).ravel()
    bias = 0.0 if layer.bias is None else layer.bias.item()
    steps = draw.window(layer, size).numbers
    steps = steps["input" if layer.transposed else "output"].size
    for step in range(0, steps, 1 + steps // 6):
        drawn = draw.window(layer, size, step=step).numbers
        assert drawn["taps"].sum() == kernel.size
        if not layer.transposed:
            total = (drawn["padded"][drawn["taps"]] * kernel).sum() + bias
            np.testing.assert_allclose(drawn["output"].ravel()[step], total, rtol=1e-6)
            continue
        layer.weight, unit = mx.ones_like(layer.weight), np.zeros(drawn["input"].shape)
        unit.ravel()[step] = 1
        reached = np.array(layer(mx.array(unit, mx.float32)[None])[0]) != bias
        cut = tuple(slice(p, n - p) for p, n in zip(
            arguments.as_ints(layer.padding, unit.ndim, "padding"), drawn["taps"].shape))
        assert (reached == drawn["taps"][cut]).all()


@pytest.mark.parametrize("cls, size, args, options", CASES)
def test_matrix_is_the_layer(cls, size, args, options):
    layer = case_of(cls, args, options)
    bias = 0.0 if layer.bias is None else layer.bias.item()
    drawn = draw.window(layer, size).numbers
    product = draw.matrix(layer, size).numbers["matrix"] @ drawn["input"].ravel()
    np.testing.assert_allclose(product + bias, drawn["output"].ravel(), rtol=1e-6)


def test_matrix_of_the_transpose():
    forth = draw.matrix([[1, 2], [3, 4]], (3, 3), stride=1, padding=1).numbers["matrix"]
    back = draw.matrix([[1, 2], [3, 4]], (4, 4), transposed=True, padding=1).numbers["matrix"]
    assert forth.shape == (16, 9)
    assert (forth.T == back).all()


def test_uneven_padding():
    "padding='same' with an even kernel pads one more at the end, and the words say so."
    assert "padding 1 and 2:" in draw.window(4, 6, padding="same").alt


def test_given_values():
    "Weights and inputs of one's own, in lists or arrays."
    drawn = draw.window([1, -1], input=[1, 4, 9, 16]).numbers
    assert drawn["output"].tolist() == [-3, -5, -7]
    drawn = draw.window(mx.array([[0.5]]), input=np.eye(3)).numbers
    assert (drawn["output"] == np.eye(3) / 2).all()


def test_one_of_many_kernels():
    "A layer with many channels is drawn by its first kernel and bias."
    layer = filled(nn.Conv2d, 4, 6, 3, groups=2)
    drawn = draw.window(layer, 5).numbers
    x = mx.array(drawn["input"], mx.float32)[None]
    theirs = functional.conv2d(x, layer.weight[:1, :1], layer.bias[:1])[0]
    assert drawn["output"].tolist() == theirs.tolist()


def test_frames_and_animation():
    assert draw.frames(3, 9).numbers["steps"] == [0, 1, 2, 6]
    assert draw.frames(3, 4).numbers["steps"] == [0, 1]
    assert draw.frames(3, 9, steps=(4, 1)).numbers["steps"] == [4, 1]
    with Image.open(BytesIO(draw.animation(3, 6, seconds=0.5).data)) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (4, 0, 500)
        assert gif.width <= 6 * 144 and gif.height <= 2.5 * 144
    assert "4 steps" in draw.animation(3, 6).alt


def test_padding_modes():
    numbers = draw.padding_modes([1, 2, 3, 4], (1, 2)).numbers
    x = mx.array([[1.0, 2, 3, 4]])
    for name, row in numbers.items():
        mode = "constant" if name == "zeros" else name
        assert row.tolist() == functional.pad(x, (1, 2), mode)[0].tolist()
    assert list(numbers) == ["zeros", "reflect", "replicate", "circular"]


def test_receptive_field():
    drawn = draw.receptive_field(stack()).numbers
    assert (drawn["size"], drawn["jump"], drawn["start"]) == arithmetic.receptive_field(*stack())
    gradient = mx.grad(lambda x: stacked(x)[0, 3])(mx.zeros((1, 40)))[0]
    reached = np.flatnonzero(np.array(gradient)) - 3 * drawn["jump"]
    assert reached.tolist() == drawn["used"]


def stacked(x):
    for layer in stack():
        layer.weight = mx.ones_like(layer.weight)
        x = layer(x)
    return x


def test_cells():
    "The values given, with a gap for each NaN and the roles given."
    nan = float("nan")
    picture = draw.cells({"row": [1, 2, 3], "block": [[4, nan], [5, 6]]}, {"block": [["tap", "tap"], ["output", "input"]]},
                         alt="a row and a block")
    assert picture.numbers["row"].tolist() == [[1, 2, 3]] and picture.alt == "a row and a block"
    np.testing.assert_array_equal(picture.numbers["block"], [[4, nan], [5, 6]])


def test_groups():
    "An output channel depends on an input channel where the picture has a line."
    layer = filled(nn.ConvTranspose1d, 4, 6, 1, groups=2, bias=False)
    layer.weight = mx.ones_like(layer.weight)
    depends = np.array(layer(mx.eye(4)[..., None])[..., 0]) != 0
    assert (draw.groups(layer).numbers["feeds"] == depends).all()


@pytest.mark.parametrize("kernel, stride, size, options", [
    (3, 2, 5, {}), (4, 2, 5, dict(padding=1)), (2, 3, 4, dict(output_padding=1)),
    (3, 1, 4, dict(dilation=2)), ((3, 2), (2, 1), (3, 4), dict(padding=1))])
def test_overlap_counts(kernel, stride, size, options):
    drawn = draw.overlap(kernel, stride, size, **options).numbers["counts"]
    n = drawn.ndim
    x = mx.ones((1, *arguments.as_ints(size, n, "size")))
    w = mx.ones((1, 1, *arguments.as_ints(kernel, n, "kernel")))
    conv = functional.conv_transpose1d if n == 1 else functional.conv_transpose2d
    assert drawn.tolist() == conv(x, w, stride=stride, **options)[0].tolist()


def test_output_sizes():
    for size, output, rest in draw.output_sizes(4, 3, 1, 2, outputs=(2, 7)).numbers["ways"]:
        assert arithmetic.output_size(size, 4, 3, 1, 2) == output
        assert arithmetic.transposed_output_size(output, 4, 3, 1, rest, 2) == size


def test_feature_maps():
    layer = filled(nn.Conv2d, 3, 20, 3, data_format="channels_last")
    x = mx.arange(108.0).reshape(6, 6, 3)
    drawn = draw.feature_maps(layer, x).numbers["maps"]
    assert drawn.shape == (16, 4, 4)
    np.testing.assert_allclose(drawn, np.moveaxis(np.array(layer(x)), -1, 0)[:16])
    batched = draw.feature_maps(filled(nn.Conv1d, 1, 3, 3), mx.ones((1, 1, 9))).numbers["maps"]
    assert batched.shape == (3, 1, 7)


def test_titles_and_signs():
    "A title stands above each map or kernel; a signed map is white where it is 0."
    maps = mx.array([[[-2.0, 0], [0, 1]]])
    for draws in (lambda **o: draw.feature_maps(maps, **o),
                  lambda **o: draw.kernels(filled(nn.Conv2d, 1, 1, 2), **o)):
        plain, titled = draws(), draws(titles=("one",))
        assert "one" in titled.alt and "one" not in plain.alt
        assert plain.data != titled.data
    signed = draw.feature_maps(maps, signed=True)
    assert "0 white" in signed.alt and signed.data != draw.feature_maps(maps).data
    figure = draw._images(np.array(maps), [""], True)
    image = figure.axes[0].images[0]
    assert image.cmap(image.norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01)


def test_kernels():
    layer = filled(nn.ConvTranspose2d, 4, 6, 3, groups=2)
    assert (draw.kernels(layer, most=3).numbers["weights"] == np.array(layer.weight[0, :3])).all()


# What is refused --------------------------------------------------------------------------------

@pytest.mark.parametrize("error, words, call", [
    (ValueError, "1 or 2 spatial axes can be drawn, but got 3", lambda: draw.window((3, 3, 3), 5)),
    (ValueError, "but got 3", lambda: draw.kernels(nn.Conv3d(1, 1, 2))),
    (TypeError, "a size or an input is needed", lambda: draw.window(3)),
    (TypeError, "argument 'kernel_size' must be tuple of ints, not str",
     lambda: draw.window("3", 5)),
    (TypeError, "argument 'size' must be tuple of ints, not float", lambda: draw.window(3, 5.0)),
    (TypeError, "input must be real numbers", lambda: draw.window(1, input=["a"])),
    (TypeError, "argument 'step' must be int, not float", lambda: draw.window(3, 5, step=1.0)),
    (ValueError, "step must be from 0 to 2, but got -1", lambda: draw.window(3, 5, step=-1)),
    (ValueError, "size must be at least 1", lambda: draw.window(1, 0)),
    (ValueError, "kernel_size must be at least 1", lambda: draw.window(0, 5)),
    (ValueError, "output_padding is for transposed", lambda: draw.window(3, 5, output_padding=1)),
    (ValueError, "input must have 2 axes", lambda: draw.window((3, 3), input=[1, 2, 3])),
    (RuntimeError, "non-positive stride", lambda: draw.window(3, 5, stride=0)),
    (RuntimeError, "negative padding", lambda: draw.window(3, 5, padding=-1)),
    (RuntimeError, "Kernel size can't be greater", lambda: draw.matrix(5, 4)),
    (RuntimeError, "output padding must be smaller",
     lambda: draw.window(3, 5, output_padding=1, transposed=True)),
    (ValueError, "6.0 x 2.5 inches at most", lambda: draw.window(3, 80)),
    (ValueError, "6.0 x 2.5 inches at most", lambda: draw.matrix(3, 60)),
    (ValueError, "6.0 x 2.5 inches at most", lambda: draw.receptive_field([101])),
    (ValueError, "at least one layer", lambda: draw.receptive_field([])),
    (ValueError, "no single receptive field",
     lambda: draw.receptive_field([nn.ConvTranspose1d(1, 1, 3)])),
    (ValueError, "stride must be at least 1, but got 0", lambda: draw.receptive_field([(3, 0)])),
    (ValueError, "steps must name at least one", lambda: draw.frames(3, 5, steps=())),
    (ValueError, "seconds must be above 0", lambda: draw.animation(3, 5, seconds=-1)),
    (ValueError, "values must have one axis", lambda: draw.padding_modes([[1]], 1)),
    (ValueError, "padding must be at least 0", lambda: draw.padding_modes([1, 2], -1)),
    (RuntimeError, "Padding size should be less", lambda: draw.padding_modes([1, 2], 2)),
    (ValueError, "one dilation per layer",
     lambda: draw.dilation_taps([3, 3], (1, 2, 3), stacked=True)),
    (ValueError, "divisible by groups", lambda: draw.groups(4, 6, 4)),
    (ValueError, "a transposed layer is needed", lambda: draw.overlap(nn.Conv1d(1, 1, 3))),
    (ValueError, "no input gives an output size of 1",
     lambda: draw.output_sizes(3, 2, 2, outputs=(1,))),
    (TypeError, "argument 'padding'", lambda: draw.output_sizes(3, padding="same")),
    (ValueError, r"output of shape \(2, 3, 4, 5\)",
     lambda: draw.feature_maps(mx.ones((2, 3, 4, 5)))),
    (ValueError, "most must be at least 1, but got 0",
     lambda: draw.feature_maps(mx.ones((2, 3, 4)), most=0)),
    (ValueError, "each of the 2 that are drawn, but got 1",
     lambda: draw.feature_maps(mx.ones((2, 3, 4)), titles=("a",))),
    (TypeError, "titles must be a tuple of str", lambda: draw.feature_maps(mx.ones((2, 3, 4)), titles="ab")),
    (TypeError, "signed must be bool", lambda: draw.feature_maps(mx.ones((2, 3, 4)), signed=1)),
    (TypeError, "must be a layer of flashconv, but got int", lambda: draw.kernels(3)),
    (ValueError, "can be 'green'; roles are empty,", lambda: draw.cells({"a": [1]}, {"a": "green"}, alt="a")),
    (ValueError, "'a' has the shape", lambda: draw.cells({"a": []}, alt="a")),
    (ValueError, "must have one to draw", lambda: draw.cells({}, alt="a")),
    (ValueError, "a role for 'b', but no such block", lambda: draw.cells({"a": [1]}, {"b": "tap"}, alt="a")),
    (ValueError, "alt must say", lambda: draw.figure(lambda ax: None, alt="")),
    (ValueError, "inches at most, but got 7 x 2",
     lambda: draw.figure(lambda ax: None, 7, 2, alt="a")),
])
def test_refused(error, words, call):
    with pytest.raises(error, match=words): call()
