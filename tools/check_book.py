"""Check the book as far as that goes without Quarto: python tools/check_book.py

nbdev turns the notebooks into the pages that Quarto renders. The checks read those pages, and
tests/test_book.py shows that each of them can fail. Each check yields a line for each problem.
"""
import ast
import importlib
import inspect
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from configparser import ConfigParser
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mistune
import nbformat
import yaml
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
UNSEEN = (".*", "_proc", "_docs", "__pycache__", "build", "dist", "*.egg-info")
MARKDOWN = mistune.create_markdown(renderer=None, plugins=["table", "math"])
PROCESS = "from nbdev.serve import proc_nbs\nif __name__ == '__main__': proc_nbs(n_workers=2)\n"


# Pages ---------------------------------------------------------------------------------------

class _Html(HTMLParser):
    "The links, pictures and anchors in HTML that stands among the Markdown."
    def __init__(self, page):
        super().__init__()
        self.page = page

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a" and "href" in given: self.page.links.append(given["href"])
        if tag == "img": self.page.images.append((given.get("src", ""), given.get("alt") or ""))
        if given.get("id"): self.page.anchors.append(given["id"])


@dataclass
class Page:
    "What the checks ask of a page: of a processed notebook, or of README.md."
    path: Path  # relative to the folder of pages
    cells: list = field(default_factory=list)
    settings: dict = field(default_factory=dict)  # title, description, output-file
    headings: list = field(default_factory=list)  # as written
    anchors: list = field(default_factory=list)  # what a link may name after its #
    links: list = field(default_factory=list)
    images: list = field(default_factory=list)  # (address, alt text)
    code: list = field(default_factory=list)  # cells, and blocks in the prose
    blocks: list = field(default_factory=list)  # in what cells print: signatures
    module: str = ""  # the one that is exported from it

    def read(self, text, printed=False):
        "Take in Markdown, of the prose or printed by a cell."
        for token in MARKDOWN(text): self._take(token, self.blocks if printed else self.code)

    def _take(self, token, code):
        kind, attributes = token["type"], token.get("attrs", {})
        if kind == "heading":
            self.headings.append(_text(token))
            self.anchors.append(_anchor(_text(token), self.anchors))
        elif kind == "link": self.links.append(attributes["url"])
        elif kind == "image": self.images.append((attributes["url"], _text(token)))
        elif kind == "block_code": code.append(token["raw"])
        elif kind in ("block_html", "inline_html"): _Html(self).feed(token["raw"])
        for child in token.get("children", []): self._take(child, code)

    @property
    def address(self):
        "Where the site has the page."
        return str(self.path.with_name(self.settings.get("output-file", self.path.name)))


def _text(token):
    "What a reader sees of a token."
    return token.get("raw", "") + "".join(map(_text, token.get("children", [])))


def _anchor(heading, taken):
    "The identifier that Pandoc gives a heading."
    words = re.sub(r"[^\w\s.-]", "", heading.replace("...", "").lower())
    base = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", words.strip())) or "section"
    names = [base] + [f"{base}-{i}" for i in range(1, len(taken) + 1)]
    return next(name for name in names if name not in taken)


def read_page(path, folder, source):
    "A processed notebook, and from its source the module that nbdev leaves out of it."
    page = Page(path.relative_to(folder), nbformat.read(path, as_version=4).cells)
    exported = re.search(r"#\| default_exp (\S+?)[\\\"]", source.read_text(encoding="utf-8"))
    if exported: page.module = exported[1]
    for cell in page.cells:
        if cell.cell_type == "raw" and cell.source.startswith("---"):
            page.settings |= yaml.safe_load(cell.source.strip().strip("-"))
        if cell.cell_type == "markdown": page.read(cell.source)
        if cell.cell_type == "code": page.code.append(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            page.read(data.get("text/markdown", ""), printed=True)
            if "text/markdown" not in data: _Html(page).feed(data.get("text/html", ""))
    return page


@dataclass
class Book:
    "A repository and its processed notebooks."
    root: Path
    pages: list
    readme: Page
    notebooks: dict  # as saved, by path: with the cells that nbdev leaves out of their pages

    @property
    def settings(self):
        "settings.ini"
        config = ConfigParser(delimiters=["="])
        config.read(self.root / "settings.ini", encoding="utf-8")
        return config["DEFAULT"]


def process(root, folder):
    "Copy the repository into `folder` and process the notebooks there."
    shutil.copytree(root, folder, symlinks=True, ignore=shutil.ignore_patterns(*UNSEEN))
    done = subprocess.run([sys.executable, "-c", PROCESS], cwd=folder, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(folder)})
    if done.returncode or "imports and other code" in done.stderr:  # which fails sooner or later
        raise RuntimeError(f"the notebooks can't be processed:\n{done.stderr}")
    return folder


def read_book(root):
    "The book in a folder that `process` has filled."
    folder, readme = root / "_proc", Page(Path("README.md"))
    readme.read((root / "README.md").read_text(encoding="utf-8"))
    pages = [read_page(path, folder, root / "nbs" / path.relative_to(folder))
             for path in sorted(folder.rglob("*.ipynb"))]
    notebooks = {page.path: nbformat.read(root / "nbs" / page.path, as_version=4) for page in pages}
    return Book(root, pages, readme, notebooks)


# Checks --------------------------------------------------------------------------------------

def titles(book):
    "Every page has a title and a description, which no other page has."
    for key in ("title", "description"):
        seen = {}
        for page in book.pages:
            value = page.settings.get(key)
            if not value: yield f"{page.path}: no {key}"
            elif value in seen: yield f"{page.path}: the {key} of {seen[value]}"
            seen[value] = page.path


def openings(book):
    "A notebook's first cell holds its title and its description: nbdev drops whatever else is there."
    for path, notebook in book.notebooks.items():
        for line in notebook.cells[0].source.splitlines()[1:]:
            if line and not line.startswith("> "):
                yield f"{path}: more than a title in the first cell: {line!r}"


def paragraphs(book):
    "What a notebook says, its page says."
    for page in book.pages:
        said = _plain("\n\n".join(cell.source for cell in page.cells))
        for cell in book.notebooks[page.path].cells[1:]:
            if cell.cell_type != "markdown": continue
            for paragraph in map(_plain, re.split(r"\n\s*\n", cell.source)):
                if paragraph not in said: yield f"{page.path}: the page lacks {paragraph!r}"


def _plain(text):
    "Prose without its links, on one line."
    return " ".join(re.sub(r"\[([^][]*)\]\([^()\s]*\)", r"\1", text).split())


def nested_links(book):
    "No link inside another's text: nbdev makes one of every public name in backquotes."
    for page in book.pages:
        for cell in page.cells:
            if cell.cell_type != "markdown": continue
            for found in re.finditer(r"\[[^][\n]*\[[^][\n]*\]\([^()\n]*\)[^][\n]*\]\(", cell.source):
                yield f"{page.path}: a link inside a link: {found[0]}"


def sidebar(book):
    "The sidebar lists every page once, and nothing else."
    def listed(entry):
        if isinstance(entry, str): return [entry]
        return [page for inner in entry["contents"] for page in listed(inner)]
    quarto = yaml.safe_load((book.root / "_quarto.yml").read_text(encoding="utf-8"))
    entries = listed(quarto["website"]["sidebar"])
    pages = {str(page.path) for page in book.pages}
    for page in sorted(pages - set(entries)): yield f"_quarto.yml: the sidebar lacks {page}"
    for entry in sorted(set(entries) - pages): yield f"_quarto.yml: there is no {entry}"
    for entry in sorted(set(entries)):
        if entries.count(entry) > 1: yield f"_quarto.yml: the sidebar has {entry} twice"


def links(book):
    "Links lead to pages, headings and files that there are. Other sites are not asked."
    for page in book.pages:
        for link in page.links: yield from _dead(book, page, link, book.root / "_proc")
    for link in book.readme.links: yield from _dead(book, book.readme, link, book.root)


def _dead(book, page, link, folder):
    "What is wrong with one link of a page that lies in `folder`."
    settings, parts = book.settings, urlsplit(link)
    code = f"{settings['git_url']}/blob/{settings['branch']}/"
    site = settings["doc_host"] + settings["doc_baseurl"] + "/"
    if link.startswith(code):
        yield from _dead_line(book, page, link, link.removeprefix(code))
    elif link.startswith(site) or not parts.scheme:
        file = (folder / page.path.parent / unquote(parts.path)).resolve()
        if link.startswith(site): path = link.removeprefix(site).partition("#")[0]
        elif not parts.path: path = page.address
        else:
            pages = (folder / "nbs" if page is book.readme else folder).resolve()
            path = str(file.relative_to(pages)) if file.is_relative_to(pages) else ""
        target = [p for p in (*book.pages, book.readme) if path in (p.address, str(p.path))]
        there = file.exists() and file.is_relative_to(folder.resolve())
        if not target and (link.startswith(site) or not there):
            yield f"{page.path}: no page or file for {link}"
        elif target and parts.fragment and unquote(parts.fragment) not in target[0].anchors:
            yield f"{page.path}: no heading for {link}"


def _dead_line(book, page, link, rest):
    "What is wrong with a link to a file of this repository on its host."
    path, _, line = rest.partition("#L")
    file = book.root / unquote(path)
    if not file.is_file(): yield f"{page.path}: no file for {link}"
    elif line and int(line) > len(file.read_text(encoding="utf-8").splitlines()):
        yield f"{page.path}: no such line: {link}"


def pictures(book):
    "Pictures are there, and have alt text; those that code draws have a caption as well."
    for page in [*book.pages, book.readme]:
        folder = book.root if page is book.readme else book.root / "_proc"
        for address, alt in page.images:
            if not alt.strip(): yield f"{page.path}: no alt text for {address[:80]}"
            if urlsplit(address).scheme: continue
            if not (folder / page.path.parent / unquote(address)).is_file():
                yield f"{page.path}: no picture at {address}"
        for cell in page.cells:
            kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
            if not any(kind.startswith("image/") for kind in kinds): continue
            for option in ("fig-cap", "fig-alt"):
                if not re.search(rf'^#\| {option}: *"?\w', cell.source, re.M):
                    yield f"{page.path}: no {option} for the picture of {_first(cell)!r}"


def _first(cell):
    "The first line of code in a cell."
    return next((line for line in cell.source.splitlines() if not line.startswith("#")), "")


def outputs(book):
    "Every page shows what its code gave when it was run, and no failure."
    for page in book.pages:
        found = [output for cell in page.cells for output in cell.get("outputs", [])]
        if not found: yield f"{page.path}: no outputs"
        if any(output.output_type == "error" for output in found):
            yield f"{page.path}: a failure among the outputs"


# How an output looks that another machine would not give.
_MACHINE = {
    "the file of a library": r"\blib[\w.+-]+\.(?:so|dylib|a)\b|\b[\w.-]+\.(?:so|dll|dylib|pyd)\b",
    "a path": r"(?<![\w.:/<~])~?/(?:home|lib|opt|proc|root|tmp|usr|var|Users)\b[\w.+/-]*"
              r"|(?<![\w.:/<~])~?/(?:[\w.+-]+/)+[\w.+-]+|\b[A-Z]:\\\w+|\bsite-packages\b",
    "a processor": r"(?i)\b(?:Intel|AMD|Apple M\d|Xeon|EPYC|Ryzen|Zen ?\d|Haswell|Broadwell"
                   r"|Prescott|Nehalem|Skylake\w*|Cooper ?lake|Ice ?lake|Sapphire ?Rapids|Neoverse\w*"
                   r"|Graviton\d?|Cortex-?\w+|x86_64|amd64|aarch64|arm64|AVX\w*|SSE\d|GeForce"
                   r"|RTX|[AH]\d00)\b",
    "a number of threads": r"\b\d+ (?:threads?|cores?|processors?|CPUs?)\b",
    "a rounding error": r"(?<![\w.=])\d(?:\.\d+)?e[-+]\d\d\b",  # eps=1e-05 is a setting
    "last bits": r"(?<![\w.])-?(?=(?:\d\.?){9})[1-9]\d*\.\d+\b|(?<![\w.])0\.0*[1-9]\d{8,}",
}


def machine(book):
    "What is saved, in hidden cells too, shows nothing of the machine that it was made on."
    for path, notebook in book.notebooks.items():
        for cell in notebook.cells:
            for text in map(_shown, cell.get("outputs", [])):
                for what, pattern in _MACHINE.items():
                    for found in re.finditer(pattern, text):
                        yield f"{path}: {what} among the outputs: {found[0]}"


def _shown(output):
    "The text of an output, without the pictures and sounds in it."
    data = output.get("data", {})
    texts = [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
    return re.sub(r"data:[\w/+-]+;base64,[\w+/=\s]+", "", "\n".join(texts))


def code(book):
    "Code fits into a page, and has no links in it, which nbdev makes of names in backticks."
    for page in [*book.pages, book.readme]:
        for line in (line for block in page.code for line in block.splitlines()):
            if len(line) > COLUMNS and not line.startswith("#| "):
                yield f"{page.path}: {len(line)} columns: {line}"
        for line in (line for block in page.blocks for line in block.splitlines()):
            if "](http" in line: yield f"{page.path}: a link in code: {line.strip()}"


def leads(book):
    "A sentence that ends in a colon leads to something: nbdev leaves out what is only exported."
    for page in book.pages:
        for cell, after in zip(page.cells, [*page.cells[1:], None]):
            if cell.cell_type != "markdown" or not cell.source.rstrip().endswith(":"): continue
            if after is None or after.cell_type != "code":
                yield f"{page.path}: nothing follows {cell.source.rstrip().splitlines()[-1]!r}"


@cache
def public_names(package="flashconv"):
    "(module, name, object) of everything public, where it is defined."
    return list(_public_names(package))


def _public_names(package):
    top = importlib.import_module(package)
    modules = [top] + [importlib.import_module(found.name)
                       for found in pkgutil.walk_packages(top.__path__, package + ".")
                       if not found.name.endswith(("__main__", "_modidx"))]
    seen = set()
    for module in modules[1:] + modules[:1]:
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            home = getattr(value, "__module__", None) if callable(value) else None
            home = home or module.__name__  # a constant has the module of its class
            if inspect.ismodule(value) or (home, name) in seen: continue
            if not home.startswith(package): home = module.__name__
            seen.add((home, name))
            yield home.removeprefix(package + "."), name, value


def names(book, public=None):
    "Every public name is documented on the page of its module, and so is every argument."
    pages = {page.module: page for page in book.pages}
    for module, name, value in public_names() if public is None else public:
        if module not in pages: yield f"{module}.{name}: no page"
        elif not callable(value):
            if not any(re.search(rf"\b{name}\b", block) for block in pages[module].code):
                yield f"{module}.{name}: nowhere on its page"
        else:
            if name not in pages[module].headings: yield f"{module}.{name}: no entry on its page"
            if not inspect.getdoc(value): yield f"{module}.{name}: no docstring"
            for argument in _unexplained(value): yield f"{module}.{name}: what is {argument}?"


@cache
def _unexplained(value):
    "The arguments of a function or class, and the fields of a named tuple, without a comment."
    if hasattr(value, "_fields"):
        source = inspect.getsource(value)
        return [name for name in value._fields if not re.search(rf"^ +{name}:.*  # ", source, re.M)]
    if isinstance(value, type) and not inspect.isfunction(value.__init__): return []
    explained, parameters = docments(inspect.unwrap(value)), inspect.signature(value).parameters
    missing = [name for name in parameters if not explained.get(name)]
    rest = [name for name in missing if parameters[name].kind == inspect.Parameter.VAR_KEYWORD]
    if rest:  # whose comments docments does not read
        source = inspect.getsource(value.__init__ if isinstance(value, type) else value)
        rest = [name for name in rest if re.search(rf"^ +\*\*{name}\b.*  # ", source, re.M)]
    return [name for name in missing if name not in rest]


# What a name stands for on every page; the README has one sentence on the other meaning of `nn`.
_MEANING = {"mx": "mlx.core", "nn": "mlx.nn", "fc": "flashconv"}
_IMPORT = re.compile(r"^ *(?:import|from) .*$", re.M)
_README_SAYS = "import flashconv as nn"


def meanings(book):
    "A name has one meaning in the book, and a shown cell has it from a shown import."
    for path, notebook in book.notebooks.items():
        for source in _sources(notebook.cells):
            for name, module in _aliases(source):
                said = f"import {module} as {name}"
                if str(path) == "index.ipynb" and said == _README_SAYS: continue
                if module != _MEANING[name]: yield f"{path}: {name} is {module}"
    for page in book.pages:
        known = set()
        for cell in page.cells:
            known |= {name for source in _sources([cell]) for name, _ in _aliases(source)}
            if cell.cell_type != "code" or _is_export(cell) or _is_silent(cell): continue
            for name in sorted(_used(cell.source) - known):
                known.add(name)
                yield f"{page.path}: no shown import of {name} before {_first(cell)!r}"


def _sources(cells):
    "Code: of cells, and of blocks in the prose."
    for cell in cells:
        if cell.cell_type == "code": yield cell.source
        if cell.cell_type == "markdown":
            page = Page(Path())
            page.read(cell.source)
            yield from page.code


def _aliases(source):
    "(name, module) of the imports whose names have one meaning."
    for line in _IMPORT.findall(source):
        try: found = ast.parse(line.strip()).body[0]
        except SyntaxError: continue
        for each in found.names:
            name = each.asname or each.name
            scope = f"{found.module}." if isinstance(found, ast.ImportFrom) else ""
            if name in _MEANING: yield name, scope + each.name


def _used(source):
    "The names with one meaning that code reads."
    return {node.id for node in ast.walk(_tree(source))
            if isinstance(node, ast.Name) and node.id in _MEANING}


def _tree(source):
    "The syntax of a cell, without what only IPython knows."
    return ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))


def _is_export(cell): return cell.source.startswith("#| code-fold: show")


def _is_silent(cell): return bool(re.search(r"^#\| *echo: *false", cell.source, re.M))


_UNIT = r"(?:ns|[uµ]s|ms|microseconds?|milliseconds?|[KMGT]?FLOP/s|[KMGT]B/s)"
_COUNT = (r"(?:\d[\d.,]*|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|hundred"
          r"|thousand)")
_TYPED = re.compile(
    rf"\b\d[\d.,]*(?: to \d[\d.,]*)? ?{_UNIT}\b"
    rf"|\b{_COUNT} times (?:faster|slower|as (?:fast|slow|long|quick)\w*|longer|the (?:time|speed)"
    rf"|quicker|less time|more time|its time|its speed)"
    r"|\b\d[\d.,]* ?(?:%|per cent|x) (?:faster|slower|of the time|of PyTorch|less time|more time)"
    r"|\b(?:half|thirds?|quarters?|fifths?|tenths?) of (?:[\w']+ )?(?:time|speed)\b"
    r"|\b\d[\d.,]*(?:e\d+)? (?:values|copies|products|operations|multiplications) a second", re.I)
_MEMORY = re.compile(r"\b\d[\d.,]* ?[KMGT]i?B\b")
_HOLDS = re.compile(r"\b(?:holds?|held|peaks?|measured)\b", re.I)

# Sentences whose numbers look measured and are not.
_COMPUTED = (
    "So one call holds about 64 MiB besides its arrays.",  # a limit that tiles keep
    "A container that may use 150 ms of processors in every 100 ms:",  # an example's quota
    "holds 32 KiB or more for each core",  # a processor's first cache, as it is built
    "5.2 GFLOP/s at 2.6 GHz.",  # two operations in a cycle
    "1 GiB holds what a step of most networks frees.",  # the limit that is set
    "A microphone gives 20 ms at a time",  # here and below: lengths of sound
    "turns 20 ms of sound into one vector", "one vector for 20 ms.", "20 ms in all:",
    "in pieces of 20 ms", "at 20 milliseconds", "over 3 milliseconds",
    "a position of the transformer is 20 ms long",
)


def measurements(book):
    "No measured time, ratio of times or memory is typed into prose, a caption or an alt text."
    for page in book.pages:
        for cell in page.cells:
            for sentence in _sentences(cell):
                found = _TYPED.search(sentence)
                if not found and _HOLDS.search(sentence): found = _MEMORY.search(sentence)
                if not found or any(words in sentence for words in _COMPUTED): continue
                yield f"{page.path}: typed, not measured: {found[0]!r} in {sentence[:90]!r}"


def _sentences(cell):
    "What a cell says: prose without code, or caption and alt text."
    if cell.cell_type == "markdown":
        text = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", cell.source, flags=re.M | re.S)
        for part in re.split(r"\n\s*\n|(?<=[.:;?])\s", text): yield " ".join(part.split())
    if cell.cell_type == "code":
        yield from re.findall(r"^#\| fig-(?:cap|alt): *(.*)$", cell.source, re.M)


_IN_A_ROW = 3  # definitions that a reader takes in before something has to run


def definitions(book):
    "After at most three shown definitions something runs."
    for page in book.pages:
        waiting = []
        for cell in page.cells:
            if cell.cell_type != "code" or _is_silent(cell) or _is_imports(cell): continue
            waiting = [*waiting, _first(cell)] if _only_defines(cell) else []
            if len(waiting) == _IN_A_ROW + 1:
                yield f"{page.path}: nothing runs between {waiting[0]!r} and {waiting[-1]!r}"


def _only_defines(cell):
    "Whether a cell makes names and runs nothing: exported, or functions and classes alone."
    body = _tree(cell.source).body
    return _is_export(cell) or all(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in body)


def plumbing(book):
    "A cell that defines private names only is not shown, unless it argues for itself in a comment."
    for page in book.pages:
        for cell in page.cells:
            if cell.cell_type != "code" or not _is_export(cell): continue
            names = _defined(cell)
            if not names or not all(name.startswith("_") for name in names): continue
            if names[0] in _ARGUED.get(str(page.path), ()) or _has_comment(cell.source): continue
            yield f"{page.path}: private and shown: {', '.join(names)}"


# Private definitions without a comment that stay, since the prose around them argues about them.
_ARGUED = {
    "01_padding.ipynb": ("_piece", "_pad_axis"),  # what each mode copies
    "04_base.ipynb": ("_draw",),  # PyTorch's initial values
    "07_lazy.ipynb": ("__setitem__",),  # how a weight becomes one
    "10_blas.ipynb": ("_is_wide",),  # two widths of integers
    "15_checkpoints.ipynb": ("_wide", "_spectral_norm"),  # old names of keys
    "16_leaves.ipynb": ("_Window", "_views"),  # pooling by slices
    "18_plain.ipynb": ("_covered",),  # what counts as seen
    "19_init.ipynb": ("_fans",),  # the definition
    "20_streaming.ipynb": ("_stepped",),  # what a state holds
    "21_weight_norm.ipynb": ("_Parametrized",),  # PyTorch's names
    "22_folding.ipynb": ("_scaled", "_obstacle"),  # the algebra, and what prevents it
    "algorithms/choice.ipynb": ("_named",),  # the rule itself
    "algorithms/derivatives.ipynb": ("_with_rules", "_plus", "_batched"),  # vjp, sums of 64, vmap
    "algorithms/matmul.ipynb": ("_multiplied",),  # the product
    "algorithms/native.ipynb": ("_by_depth", "_is_defined"),  # what MLX lacks
    "algorithms/overlap.ipynb": ("_Axis", "_sums", "_stamped", "_phase"),  # the algorithm
    "algorithms/taps.ipynb": ("_summed", "_stamped"),  # the algorithm, and its transpose
    "algorithms/weights.ipynb": ("_multiplied",),  # the product
}


def _is_imports(cell):
    "Whether a cell has nothing but imports."
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in _tree(cell.source).body)


def _defined(cell):
    "The names that a cell defines, in order."
    names = []
    for node in _tree(cell.source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [found.id for target in targets for found in ast.walk(target)
                      if isinstance(found, ast.Name)]
    return names


def _has_comment(source):
    "Whether code has a comment, directives aside."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return any(each.type == tokenize.COMMENT and not each.string.startswith("#|")
               for each in tokens)


def entries(book):
    "An entry of the reference is of something public, leads to its source, and says what it takes."
    for page in book.pages:
        for cell in page.cells:
            if not re.search(r"^show_doc\(", cell.source, re.M): continue
            for output in cell.get("outputs", []):
                text = output.get("data", {}).get("text/markdown", "")
                heading = re.search(r"^### (.*)$", text, re.M)
                if not heading: continue
                for what, is_wrong in (
                    ("is private", re.match(r"_\w+\.", heading[1])),
                    ("has no link to its source", "[source](" not in text),
                    ("takes whatever Python takes", "    *args, **kwargs\n" in text),
                    ("says nothing", "Call self as a function" in text),
                ):
                    if is_wrong: yield f"{page.path}: the entry {heading[1]} {what}"


CHECKS = (titles, openings, paragraphs, nested_links, sidebar, links, pictures, outputs, machine,
          code, leads, names, entries, meanings, measurements, definitions, plumbing)


def problems(book):
    "What all checks find."
    return [line for check in CHECKS for line in check(book)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = problems(read_book(process(ROOT, Path(folder) / "book")))
    print("\n".join(found or [f"the book is whole: {', '.join(c.__name__ for c in CHECKS)}"]))
    sys.exit(bool(found))
