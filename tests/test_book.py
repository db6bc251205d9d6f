"""The book is whole, by tools/check_book.py, and each of its checks finds what it is for."""
import json
import shutil
import sys
from pathlib import Path

import pytest

for needed in ("nbdev", "nbformat", "mistune", "yaml"): pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import check_book
import llms
import nbformat
from check_book import CHECKS, Book, problems, process, read_book


@pytest.fixture(scope="session")
def processed(tmp_path_factory):
    "A copy of the repository, with its notebooks as nbdev hands them to Quarto."
    return process(ROOT, tmp_path_factory.mktemp("processed") / "book")


@pytest.fixture(scope="session")
def book(processed): return read_book(processed)


@pytest.fixture(autouse=True, scope="session")
def read_once():
    "A page that a change does not touch is not parsed again."
    parse, parsed = check_book.read_page, {}
    def read(path, folder, source):
        key = path.relative_to(folder), path.read_bytes(), source.read_bytes()
        if key not in parsed: parsed[key] = parse(path, folder, source)
        return parsed[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_book, "read_page", read)
        yield


@pytest.fixture(scope="session")
def standing(book):
    "What the checks say of the book as it is."
    return set(problems(book))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_book(book, check):
    "The book as it is committed."
    found = list(check(book))
    assert not found, "\n".join(found)


def test_there_are_pages(book):
    "The search for notebooks finds them."
    assert len(book.pages) > 20 and len(book.readme.links) > 10


# Each check can fail -------------------------------------------------------------------------

PICTURE = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}}
PATH = {"output_type": "stream", "name": "stdout", "text": "from /usr/lib"}
FAILURE = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}


@pytest.fixture
def broken(processed, standing, tmp_path):
    "What the checks say of the book after a change, and did not say before."
    def after(change):
        copy = shutil.copytree(processed, tmp_path / "book", symlinks=True)
        change(copy)
        return set(problems(read_book(copy))) - standing
    return after


def edit(path, old, new):
    "The change that replaces `old` in a file."
    def change(root):
        text = (root / path).read_text(encoding="utf-8")
        assert old in text
        (root / path).write_text(text.replace(old, new, 1), encoding="utf-8")
    return change


def add(kind, source, outputs=None, folder="_proc"):
    "The change that adds a cell to a page, or to the notebook that it is made of."
    def change(root):
        path = root / folder / "01_padding.ipynb"
        nb = json.loads(path.read_text(encoding="utf-8"))
        cell = {"cell_type": kind, "id": "sample", "metadata": {}, "source": source}
        if kind == "code": cell |= {"execution_count": None, "outputs": outputs or []}
        nb["cells"].append(cell)
        path.write_text(json.dumps(nb), encoding="utf-8")
    return change


def together(*changes):
    "Several changes as one."
    def change(root):
        for each in changes: each(root)
    return change


EXPORTED = "#| code-fold: show\n"  # how nbdev marks a cell whose source is shown


def strip_outputs(root):
    path = root / "_proc" / "01_padding.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    path.write_text(json.dumps(nb), encoding="utf-8")


def markdown(text):
    "A Markdown output."
    return [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": text}}]


SITE = "https://flashconv.github.io/flashconv/"
CODE = "https://github.com/flashconv/flashconv/blob/main/"
PAGE = "_proc/01_padding.ipynb"
BROKEN = {
    "no title": (edit(PAGE, "title: Padding", "subtitle: Padding"), "no title"),
    "no description": (edit(PAGE, "description: ", "subtitle: "), "no description"),
    "a title twice": (edit(PAGE, "title: Padding", "title: Dilation"), "the title of"),
    "prose beside the title": (edit("nbs/01_padding.ipynb", '"# Padding\\n"', '"# Padding\\n", "More.\\n"'),
                               "more than a title in the first cell"),
    "a paragraph that the page lacks": (add("markdown", "Written.", folder="nbs"),
                                        "the page lacks 'Written.'"),
    "a link inside a link": (add("markdown", "[see [`pad`](x.html)](#pad)"), "a link inside a link"),
    "not in the sidebar": (edit("_quarto.yml", "- 01_padding.ipynb", "- index.ipynb"),
                           "the sidebar lacks 01_padding.ipynb"),
    "twice in the sidebar": (edit("_quarto.yml", "- 01_padding.ipynb",
                                  "- 01_padding.ipynb\n          - 01_padding.ipynb"), "twice"),
    "nothing for the sidebar": (edit("_quarto.yml", "- 01_padding.ipynb", "- 01_pad.ipynb"),
                                "there is no 01_pad.ipynb"),
    "a link to no page": (add("markdown", "[a](99_none.ipynb)"), "no page or file"),
    "a link out of the book": (add("markdown", "[a](../README.md)"), "no page or file"),
    "a link to no heading": (add("markdown", "[a](02_dilation.ipynb#none)"), "no heading"),
    "a link to no heading here": (add("markdown", "[a](#none)"), "no heading"),
    "a link to no page of the site": (add("markdown", f"[a]({SITE}none.html)"), "no page or file"),
    "a link to no name": (add("markdown", f"[a]({SITE}conv.html#conv9d)"), "no heading"),
    "a link to no file": (add("markdown", f"[a]({CODE}none.py)"), "no file"),
    "a link to no line": (add("markdown", f"[a]({CODE}setup.py#L999)"), "no such line"),
    "a link in HTML": (add("markdown", '<a href="99_none.ipynb">a</a>'), "no page or file"),
    "a link in an output": (add("code", "f()", markdown("[a](99_none.ipynb)")), "no page or file"),
    "a link of the README": (edit("README.md", "](nbs/01_padding.ipynb)", "](nbs/1.ipynb)"),
                             "README.md: no page or file"),
    "a link of the README for nbs/": (edit("README.md", "](nbs/01_padding.ipynb)",
                                           "](01_padding.ipynb)"), "README.md: no page or file"),
    "no picture": (add("markdown", "![a window](images/none.png)"), "no picture"),
    "no picture in the README": (edit("README.md", "](nbs/images/demo.png)", "](images/demo.png)"),
                                 "README.md: no picture"),
    "no alt text": (add("markdown", "![](images/demo.png)"), "no alt text"),
    "no alt text in HTML": (add("markdown", '<img src="images/demo.png">'), "no alt text"),
    "no alt text of an output": (add("code", '#| fig-cap: "A"\nplot()', [PICTURE]), "no fig-alt"),
    "no caption": (add("code", '#| fig-alt: "A"\nplot()', [PICTURE]), "no fig-cap"),
    "no outputs": (strip_outputs, "no outputs"),
    "a failure": (add("code", "f()", [FAILURE]), "a failure"),
    "a path in a hidden cell": (add("code", "#| hide\nf()", [PATH], folder="nbs"),
                                "a path among the outputs: /usr/lib"),
    "a wide line": (add("code", "f(" + "1" * 100 + ")"), "103 columns"),
    "a wide line in the prose": (add("markdown", "~~~sh\n" + "1" * 101 + "\n~~~"), "101 columns"),
    "a link in a signature": (add("code", "f()", markdown(f"```\nf() # [`pad`]({SITE})\n```")),
                              "a link in code"),
    "a sentence that leads nowhere": (add("markdown", "Like so:"), "nothing follows 'Like so:'"),
    "a name with another meaning": (add("code", "import flashconv as nn", folder="nbs"),
                                    "01_padding.ipynb: nn is flashconv"),
    "a name from another package": (add("code", "from torch import nn", folder="nbs"),
                                    "01_padding.ipynb: nn is torch.nn"),
    "a name with another meaning in the prose": (
        add("markdown", "~~~python\nimport mlx.nn as fc\n~~~", folder="nbs"),
        "01_padding.ipynb: fc is mlx.nn"),
    "a name from nowhere": (add("code", "layer = nn.Linear(1, 1)"),
                            "no shown import of nn before 'layer = nn.Linear(1, 1)'"),
    "a time in the prose": (add("markdown", "That takes 3.5 ms."), "typed, not measured: '3.5 ms'"),
    "a time in a caption": (add("code", '#| fig-cap: "Twice 3 ms"\nplot()'), "typed, not measured"),
    "four definitions in a row": (
        together(add("code", "f(1)"), *[add("code", f"{EXPORTED}def {name}(x): return x")
                                        for name in "abcd"]),
        "nothing runs between 'def a(x): return x' and 'def d(x): return x'"),
    "a private helper": (add("code", f"{EXPORTED}def _f(x): return x"), "private and shown: _f"),
    "an entry without a source": (add("code", "show_doc(f)", markdown("### f")), "no link to its source"),
    "a private entry": (add("code", "show_doc(_F.f)", markdown("### _F.f")), "_F.f is private"),
    "an entry without arguments": (
        add("code", "show_doc(F)", markdown("### F\n\n```python\ndef F(\n    *args, **kwargs\n):\n```")),
        "takes whatever Python takes"),
    "an entry without words": (add("code", "show_doc(f)", markdown("### f\n\n*Call self as a function.*")),
                               "f says nothing"),
    "no entry": (edit(PAGE, "### pad_axes", "### elsewhere"), "padding.pad_axes: no entry"),
    "no page of a module": (edit("nbs/01_padding.ipynb", "default_exp padding", "default_exp p"),
                            "padding.pad: no page"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_finds(broken, change, message):
    "A book that is broken in one place."
    found = broken(change)
    assert any(message in line for line in found), found


@pytest.mark.parametrize("text, found", (
    ("cblas_sgemm is libblas-r0.3.21.so", ["the file of a library", "libblas-r0.3.21.so"]),
    ("from core.cpython-311-darwin.so", ["the file of a library", "core.cpython-311-darwin.so"]),
    ("in /usr/lib/x.txt", ["a path", "/usr/lib/x.txt"]), ("'/tmp'", ["a path", "/tmp"]),
    ("/data/a b", ["a path", "/data/a"]), ("in ~/.cache/x", ["a path", "~/.cache/x"]),
    ("C:\\Users", ["a path", "C:\\Users"]), ("on a SkylakeX", ["a processor", "SkylakeX"]),
    ("an H100", ["a processor", "H100"]), ("OpenBLAS, 2 threads", ["a number of threads", "2 threads"]),
    ("['8e-08']", ["a rounding error", "8e-08"]), ("-1.2e-07", ["a rounding error", "1.2e-07"]),
    ("10485.7509765625", ["last bits", "10485.7509765625"]),
    ("[-0.30000001192]", ["last bits", "0.30000001192"]),
    *((text, []) for text in (
        "BatchNorm(8, eps=1e-05)", "0.0078125", "(1, 2) mlx.core.float32", "H/2 of N/A, and/or",
        "https://flashconv.github.io/flashconv/blas.html", "<td>1</td><br/>", "is in libblas",
        "1000000000", '<img src="data:image/png;base64,AAAA/usr/lib/A0H100=">'))), ids=str)
def test_what_says_something_of_a_machine(text, found):
    "And what does not."
    cell = nbformat.v4.new_code_cell("f()", outputs=[nbformat.v4.new_output("stream", text=text)])
    book = Book(ROOT, [], None, {"page": nbformat.v4.new_notebook(cells=[cell])})
    expected = [f"page: {found[0]} among the outputs: {found[1]}"] if found else []
    assert list(check_book.machine(book)) == expected


@pytest.mark.parametrize("text, found", (
    ("It takes 0.1 to 0.3 ms to wake.", "0.1 to 0.3 ms"), ("It makes 340 GFLOP/s.", "340 GFLOP/s"),
    ("That is 5 times faster.", "5 times faster"),
    ("Ours is twenty times as fast.", "twenty times as fast"),
    ("In four fifths of the time.", "fifths of the time"), ("30 % faster than that", "30 % faster"),
    ("One thread copies 2e9 values a second.", "2e9 values a second"),
    ("The call holds 282 MB besides.", "282 MB"), ("```\nsleep 3 ms\n```", None),
    *((text, None) for text in (
        "The columns have 40 MB.", "3 x 3 taps at stride 2", "It has 256 times what it needs.",
        "Times are in ms.", "five times the same sum", "once per 1000 samples"))), ids=str)
def test_what_was_measured(text, found):
    "A number that somebody typed, and numbers that follow from shapes."
    page = check_book.Page(Path("page"), [nbformat.v4.new_markdown_cell(text)])
    said = list(check_book.measurements(Book(ROOT, [page], None, {})))
    expected = [True] if found else []
    assert [f"typed, not measured: {found!r}" in line for line in said] == expected, said


@pytest.mark.parametrize("sources, found", (
    (["a = 1"] * 5, False), ([EXPORTED + "def a(): pass"] * 4, True),
    ([EXPORTED + "def a(): pass"] * 3, False), (["def a(): pass"] * 4, True),
    (["def a(): pass", "def b(): pass", "import mlx", "def c(): pass", "def d(): pass"], True),
    (["def a(): pass", "def b(): pass", "a()", "def c(): pass", "def d(): pass"], False),
    (["def a(): pass"] * 3 + ["#| echo: false\nshow_doc(a)", "def b(): pass"], True)), ids=str)
def test_what_only_defines(sources, found):
    "A run of definitions is broken by what runs, not by imports or by the entry of a function."
    page = check_book.Page(Path("page"), [nbformat.v4.new_code_cell(source) for source in sources])
    assert bool(list(check_book.definitions(Book(ROOT, [page], None, {})))) == found


@pytest.mark.parametrize("source, found", (
    ("def _f(): pass", True), ("_X = 1", True), ("_X = 1  # things", False),
    ("def f(): pass", False),
    ("_TABLE['a'] = 1\nclass _A: pass", True), ("def _f(): pass\ndef f(): pass", False)), ids=str)
def test_what_is_plumbing(source, found):
    "Private definitions without a comment."
    page = check_book.Page(Path("page"), [nbformat.v4.new_code_cell(EXPORTED + source)])
    assert bool(list(check_book.plumbing(Book(ROOT, [page], None, {})))) == found


def test_every_argued_definition_is_shown(book):
    "The list of private definitions that stay has none that is gone or hidden."
    pages = {str(page.path): page for page in book.pages}
    for path, names in check_book._ARGUED.items():
        shown = {name for cell in pages[path].cells if cell.cell_type == "code"
                 and check_book._is_export(cell) for name in check_book._defined(cell)[:1]}
        assert set(names) <= shown, (path, set(names) - shown)


def test_llms(book):
    "llms.txt has the address of every page."
    text = llms.llms()
    for page in book.pages:
        assert f"/{Path(page.address).with_suffix('.html')})" in text, page.address


def bare(x): return x


@pytest.mark.parametrize("value, message", ((bare, "no docstring"), (bare, "what is x?"),
                                            (3, "nowhere on its page")),
                         ids=("docstring", "argument", "constant"))
def test_finds_undocumented_names(book, value, message):
    "A public name that nobody explains."
    found = list(check_book.names(book, [("padding", "bare", value)]))
    assert any(line == f"padding.bare: {message}" for line in found), found


@pytest.mark.parametrize("old, new, message", (
    ("import mlx.core as mx", "import no_such_module", "no_such_module"),
    ("from fastcore.test import *", "from fastcore.test import *; x = 1", "imports and other code"),
), ids=("failing", "mixed"))
def test_what_nbdev_cannot_process(tmp_path, old, new, message):
    "A notebook that the build of the site can't take is an error, not a page less."
    root = shutil.copytree(ROOT, tmp_path / "root", symlinks=True,
                           ignore=shutil.ignore_patterns(*check_book.UNSEEN))
    edit("nbs/01_padding.ipynb", old, new)(root)
    with pytest.raises(RuntimeError, match=message): process(root, tmp_path / "book")


@pytest.mark.parametrize("heading, anchor", (
    ("How much padding is 'same'?", "how-much-padding-is-same"),
    ("ReceptiveField", "receptivefield"), ("_ConvNd", "convnd"),
    ("1x1 kernels... and k=3", "x1-kernels-and-k3"),
    ("What works here that mlx.nn lacks", "what-works-here-that-mlx.nn-lacks"), ("3", "section"),
))
def test_anchors_are_pandocs(heading, anchor):
    "As Pandoc 3.9 makes them."
    assert check_book._anchor(heading, []) == anchor
    assert check_book._anchor(heading, [anchor]) == anchor + "-1"
