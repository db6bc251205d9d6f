"""What a run found: the floors it is held to, a table and a picture.

A ratio compares minima: other work on the machine only ever adds to a time.
"""
import json
from math import exp, log
from statistics import median
from typing import NamedTuple

FORMATS = "flashconv", "flashconv channels_last"
PLAIN, NATIVE_FAST, NATIVE = "flashconv, no kernels", "mlx.nn, fast BLAS", "mlx.nn"
TORCH = "PyTorch", "PyTorch channels_last"
NAMES = {"forward": "forward", "gradients": "forward and both gradients"}


class Floor(NamedTuple):
    "A promise, and the figure that keeps or misses it; None if no row was there to tell."
    text: str
    figure: float | None
    bound: float
    at_least: bool  # or else at most
    where: str = ""  # the row that decides

    @property
    def verdict(self):
        if self.figure is None: return "not measured"
        kept = self.figure >= self.bound if self.at_least else self.figure <= self.bound
        return "OK" if kept else "missed"

    @property
    def cells(self):
        "Its line in a table, see `summary`."
        figure = "" if self.figure is None else f"{self.figure:.2f}"
        wanted = f"{'at least' if self.at_least else 'at most'} {self.bound:g}"
        return self.verdict, figure, wanted, self.text, self.where


# The floors -----------------------------------------------------------------------------------

def time(row, which, names):
    "The least time of the best of these competitors, in ms; None if none could run."
    cells = (row["passes"][which][name] for name in names)
    return min((cell["min"] for cell in cells if "min" in cell), default=None)


def ratios(rows, which, above, below):
    "row name -> time of `above` over time of `below`, where both could run."
    pairs = ((row["name"], time(row, which, above), time(row, which, below)) for row in rows)
    return {name: a / b for name, a, b in pairs if a and b}


def mean(text, found, bound, at_least):
    "A floor for the geometric mean."
    figure = exp(sum(map(log, found.values())) / len(found)) if found else None
    return Floor(f"{text}: geometric mean of {len(found)} rows", figure, bound, at_least)


def worst(text, found, bound, at_least):
    "A floor for every single row."
    row = (min if at_least else max)(found, key=found.get, default="")
    return Floor(f"{text}: worst row", found.get(row), bound, at_least, row)


def floors(rows):
    "All floors, on the rows there are."
    full = [row for row in rows if row["kind"] != "tiny"]
    tiny = [row for row in rows if row["kind"] == "tiny"]
    for which, name in NAMES.items():
        yield from against_torch(full, which)
        layouts = ratios(full, which, FORMATS[1:], FORMATS[:1])
        start = f"{name}: time channels last over channels first"
        yield mean(start, layouts, 1.25, False)
        yield worst(start, layouts, 2.5, False)
        for ours in FORMATS:
            found = ratios(full, which, [NATIVE_FAST], [ours])
            yield worst(f"{name}: {ours}'s speed over mlx.nn's, same BLAS", found, 0.95, True)
        found = ratios(tiny, which, FORMATS[:1], [NATIVE_FAST])
        yield worst(f"{name}: tiny layer's time over mlx.nn's", found, 1, False)
        yield worst(f"{name}: time in 16 bits over float32's", halves(rows, which), 1.3, False)
        found = ratios(full, which, [NATIVE_FAST], [PLAIN])
        start = f"{name}: speed without kernels over mlx.nn's, same BLAS"
        yield mean(start, found, 4, True)
        yield worst(start, found, 0.9, True)
        found = workspaces(rows, which)
        yield worst(f"{name}: MiB of workspace without kernels", found, 64, False)


def against_torch(rows, which):
    start = f"{NAMES[which]}: time over PyTorch's, the better format of each"
    found = ratios(rows, which, FORMATS, TORCH)
    yield mean(start, found, 0.65 if which == "forward" else 0.55, False)
    speeds = {row["name"]: row["products"] / time(row, which, TORCH)
              for row in rows if row["name"] in found}
    usual = median(speeds.values()) if speeds else 0
    good = {name: ratio for name, ratio in found.items() if speeds[name] > usual / 3}
    yield mean(f"{start}, where PyTorch has a good kernel", good,
               1 if which == "forward" else 0.85, False)
    yield worst(start, found, 1.5, False)


def halves(rows, which):
    "row name -> its time over that of the same row in float32."
    named = {row["name"]: row for row in rows}
    found = {}
    for row in rows:
        single = named.get(row["name"].removesuffix(f", {row['dtype']}"))
        if row["dtype"] not in ("float16", "bfloat16") or single is None: continue
        found[row["name"]] = time(row, which, FORMATS) / time(single, which, FORMATS)
    return found


def workspaces(rows, which):
    "row -> MiB that flashconv's plain forms need beyond input, weight and outputs."
    cells = ((row["name"], row["passes"][which][PLAIN]["workspace"]) for row in rows)
    return {row: size / 2**20 for row, size in cells if size is not None}


# The files ------------------------------------------------------------------------------------

def write(found, data, table, text):
    "The JSON and the Markdown."
    for path in (data, table): path.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table.write_text(text, encoding="utf-8")


def summary(found):
    "The floors as a Markdown table that is aligned for a terminal, too."
    lines = [("", "figure", "floor", "of", "decided by")]
    lines += [Floor(**floor).cells for floor in found["floors"]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def markdown(found):
    "Where it ran, the times, the workspace and the floors."
    parts = ["# Times of convolution layers", *where(found), "float32 where a row names no other."]
    for which, name in NAMES.items():
        parts += [f"## {name.capitalize()}", grid(found["rows"], which, cell_time)]
    parts += ["## Workspace", "MiB at the peak beyond input, weight and outputs; PyTorch doesn't "
              "tell. Forward / forward and both gradients:", grid(found["rows"], None, cell_sizes)]
    parts += ["## Floors", summary(found)]
    return "\n\n".join(parts) + "\n"


def where(found):
    "Paragraphs: the machine, the libraries, and how to read a time."
    m = found["machine"]
    return (
        f"{m['date'][:10]}, {m['cpu']}, {m['cores']} cores (load {m['load'][0]:.1f} before, "
        f"{m['load_after'][0]:.1f} after), {m['platform']}. flashconv {m['flashconv']}, MLX "
        f"{m['mlx']}, PyTorch {m['torch']} on {m['torch_threads']} threads.",
        "\n".join(f"- {name} BLAS: {text}" for name, text in m["blas"].items()),
        f"Milliseconds: median (minimum) of up to {found['rounds']} interleaved rounds; *once* "
        "is a single run. A ratio is one of minima.",
        CODES)


CODES = ("`3x3 s2, 64->128 @56, N=4` is a kernel of 3 x 3 taps at stride 2, from 64 to 128 "
         "channels, on 4 inputs of 56 x 56. A single number of channels stands for both. `d` is "
         "the dilation, `g` the groups, `k` the kernel of a transposed layer. In 1d, `K` is the "
         "kernel and `L` the length.")


def grid(rows, which, cell):
    "A Markdown table of rows by competitors."
    names = list(next(iter(rows[0]["passes"].values())))
    if which is None: names = [name for name in names if name not in TORCH]
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    lines += [[row["name"], *(cell(row, which, name) for name in names)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_time(row, which, name):
    cell = row["passes"][which][name]
    if "min" not in cell: return cell["note"]
    if cell["samples"] == 1: return f"{number(cell['min'])} {cell['note']}"
    return f"{number(cell['median'])} ({number(cell['min'])})"


def cell_sizes(row, _, name):
    sizes = [row["passes"][which][name]["workspace"] for which in row["passes"]]
    return " / ".join("-" if size is None else number(size / 2**20) for size in sizes)


def number(value):
    "Three digits, and no exponent."
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 0.1 else f"{value:.3f}"


# The picture ----------------------------------------------------------------------------------

MARKS = (  # label, competitors of which the best counts, marker, colour (Okabe and Ito)
    ("mlx.nn as installed", (NATIVE,), "s", "#D55E00"),
    ("mlx.nn, fast BLAS", (NATIVE_FAST,), "o", "#E69F00"),
    ("flashconv, no kernels", (PLAIN,), "x", "#000000"),
    ("PyTorch, better format", TORCH, "D", "#0072B2"))
CLASSES = {  # kind of row -> its name in a picture, where not its own
    "few taps": "depthwise, few taps", "many taps": "depthwise, many taps",
    "long": "depthwise 1d, long", "one side": "padded on one side"}


def draw(rows, path):
    "Every competitor's time over flashconv's, a line a row."
    names = [row["name"] for row in rows]
    def found(which, competitors): return ratios(rows, which, competitors, FORMATS[:1])
    picture(names, MARKS, found, path, (10, 1.6 + 0.27 * len(rows)), beside=True)


def by_class(rows, which, competitors):
    "class of layer -> the geometric mean of these competitors' times over flashconv's."
    times = {}
    for row in rows:
        found = ratios([row], which, competitors, FORMATS[:1])
        times.setdefault(CLASSES.get(row["kind"], row["kind"]), []).extend(found.values())
    return {name: exp(sum(map(log, each)) / len(each)) for name, each in times.items() if each}


def draw_classes(rows, path):
    "The same in geometric means, a line a class of layer, narrow enough for a phone."
    names = list(dict.fromkeys(CLASSES.get(row["kind"], row["kind"]) for row in rows))
    marks = [mark for mark in MARKS if mark[1] != (PLAIN,)]
    def found(which, competitors): return by_class(rows, which, competitors)
    picture(names, marks, found, path, (4.6, 1.6 + 0.46 * len(names)), beside=False)


def picture(names, marks, found, path, size, beside):
    "A panel for each pass, and in it a line for each name: `found(pass, competitors)` by name."
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "flashconv", "font.size": 9})
    figure, panels = plt.subplots(*((1, 2) if beside else (2, 1)), sharey=beside, sharex=not beside,
                                  figsize=size, layout="constrained")
    for panel, which in zip(panels, NAMES): draw_panel(panel, names, marks, which, found)
    for panel in panels[:1] if beside else panels:
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=len(marks) if beside else 2, frameon=False)
    figure.supxlabel("time over flashconv's: to the right, flashconv is faster", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_panel(panel, names, marks, which, found):
    places = {name: place for place, name in enumerate(names)}
    for label, competitors, marker, colour in marks:
        times = found(which, competitors)
        panel.plot(list(times.values()), [places[name] for name in times], marker, color=colour,
                   label=label, markersize=5, clip_on=False)
    panel.axvline(1, color="0.4", linewidth=1)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.set_title(NAMES[which].capitalize(), fontsize=10)
    panel.grid(axis="both", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
