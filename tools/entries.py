"""The entries of the reference, mended after nbdev has written them: settings.ini names `entries`.

What belongs to a private class has no entry of its own, unless a page shows it on purpose, nor has
a property without a docstring, whose line stands above. A named tuple shows its fields. Other
classes without arguments of their own show what they derive from, and so do base classes, whose
arguments are those of the classes derived from them. Arguments that an entry shares with one before
it on the page are not listed again. A function that another one makes has a link to the lines where
that happens. Entries stand in the order of the source.
"""
import importlib
import inspect
import re
import sys
from itertools import groupby
from pathlib import Path

from nbdev.config import get_config
from nbdev.process import Processor

_LINK = '[source]({url}){{target="_blank" style="float:right; font-size:smaller"}}\n\n'
_SOURCE = re.compile(r"\[source\]\([^)]*\)\{[^}]*\}\n\n")
_NO_WORDS = "*Call self as a function.*"  # what Python says of a function that says nothing
_MANY = 4  # arguments, from which on a second list of them only takes room
_HEAD = re.compile(r"```python\n(.*?)```", re.S)


class entries(Processor):
    "Mend the entries of a page; nbdev calls this for each of its cells."
    def __init__(self, nb):
        super().__init__(nb)
        self.module = _module(nb.cells)  # before other processors take these cells out

    def begin(self):
        self.shown = {}  # arguments -> the name that they were listed for
        cells = self.nb.cells
        for _, run in groupby(range(len(cells)), lambda i: getattr(cells[i], "has_sd", False)):
            run = list(run)
            if not getattr(cells[run[0]], "has_sd", False): continue
            for i, cell in zip(run, sorted((cells[i] for i in run), key=_line)): cells[i] = cell

    def cell(self, cell):
        found = re.search(r"^show_doc\(([\w.]+)", cell.get("source", ""), re.M)
        if not found: return
        if getattr(cell, "has_sd", False) and self.says_nothing(found[1]): del cell["source"]
        else:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/markdown" not in data: continue
                text = mended("".join(data["text/markdown"]), found[1], self.module)
                data["text/markdown"] = self.once(text, found[1]).splitlines(keepends=True)

    def says_nothing(self, name):
        "Whether an entry that nobody has asked for is private, or of a property without a word."
        value = _found(self.module, None, name)
        return name.startswith("_") or isinstance(value, property) and not value.__doc__

    def once(self, text, name):
        "The entry without arguments that were listed before."
        head = _HEAD.search(text)
        arguments = head and head[1].partition("(")[2]
        if not arguments or arguments.count("\n") < _MANY: return text
        first = self.shown.setdefault(arguments, name)
        if first == name: return text
        return _HEAD.sub(lambda _: f"```python\ndef {name}(...)  # the arguments of {first}\n```", text,
                         count=1)


def _line(cell):
    "Where the source of an entry begins."
    text = "".join("".join(output.get("data", {}).get("text/markdown", ""))
                   for output in cell.get("outputs", []))
    found = re.search(r"\.py#L(\d+)", text)
    return int(found[1]) if found else 0


def _module(cells):
    "The module that a page is exported to; None where it is none."
    names = [name for cell in cells for name in getattr(cell, "directives_", {}).get("default_exp", [])]
    return importlib.import_module(f"flashconv.{names[0]}") if names else None


def mended(text, name, module):
    "An entry with what it lacks; `module` is the page's own, or None."
    linked = re.search(r"/blob/[^/]+/([\w/]+)\.py#", text)
    linked = linked and importlib.import_module(linked[1].replace("/", "."))
    value = _found(module, linked, name)
    if linked and linked is not module and _is_defined_in(module, value):
        text = _SOURCE.sub("", text)  # nbdev takes the first module that has such a name
    text = text.replace(_NO_WORDS, "")
    if "[source](" not in text and value is not None:
        text = text.replace("---\n\n", "---\n\n" + _LINK.format(url=_address(value)), 1)
    if isinstance(value, type) and ("*args, **kwargs" in text or name.startswith("_")):
        text = _HEAD.sub(lambda _: f"```python\n{_class(value)}\n```", text, count=1)
    return text


def _found(module, linked, name):
    "What the entry is about: in the page's module, in the linked one, or in any that is loaded."
    loaded = [sys.modules[key] for key in sorted(sys.modules) if key.startswith("flashconv.")]
    first, *rest = name.split(".")
    modules = [each for each in (module, linked, *loaded) if each and first in vars(each)]
    value = vars(modules[0])[first] if modules else None
    for part in rest: value = getattr(value, part, None)
    return value


def _is_defined_in(module, value):
    return module and getattr(inspect.unwrap(value), "__module__", None) == module.__name__


def _address(value):
    "Where the repository has the lines of a function."
    made = inspect.unwrap(getattr(value, "__delwrap__", value))
    file = Path(inspect.getsourcefile(made)).resolve()
    line, config = inspect.getsourcelines(made)[1], get_config()
    path = file.relative_to(config.lib_path.resolve().parent).as_posix()
    return f"{config.git_url}/blob/{config.branch}/{path}#L{line}"


def _class(cls):
    "The head of a class: the fields of a named tuple, or the classes that it derives from."
    if hasattr(cls, "_fields"):
        fields = "|".join(cls._fields)
        lines = re.findall(rf"^    (?:{fields}):.*$", inspect.getsource(cls), re.M)
        return "\n".join([f"class {cls.__name__}(NamedTuple):", *lines])
    parents = [base.__name__ for base in cls.__bases__
               if base is not object and not base.__name__.startswith("_")]
    return f"class {cls.__name__}" + (f"({', '.join(parents)})" if parents else "")
