"""The entries of the reference, mended after nbdev has written them. settings.ini names `entries`.

What belongs to a private class has no entry of its own, unless a page shows it on purpose. A named
tuple shows its fields. Other classes without arguments of their own show what they derive from, and
so do base classes, whose arguments are those of the classes derived from them. A function that
another one makes has a link to the lines where that happens.
"""
import importlib
import inspect
import re
import sys
from pathlib import Path

from nbdev.config import get_config

_LINK = '[source]({url}){{target="_blank" style="float:right; font-size:smaller"}}\n\n'
_NO_WORDS = "*Call self as a function.*"  # what Python says of a function that says nothing
_HEAD = re.compile(r"```python\n(.*?)```", re.S)


def entries(cell):
    "Mend the entry that a cell shows; nbdev calls this for each cell of each page."
    found = re.search(r"^show_doc\(([\w.]+)", cell.get("source", ""), re.M)
    if not found: return
    if getattr(cell, "has_sd", False) and found[1].startswith("_"): del cell["source"]
    else:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                text = mended("".join(data["text/markdown"]), found[1])
                data["text/markdown"] = text.splitlines(keepends=True)


def mended(text, name):
    "An entry with what it lacks."
    value = _found(text, name)
    text = text.replace(_NO_WORDS, "")
    if "[source](" not in text and value is not None:
        text = text.replace("---\n\n", "---\n\n" + _LINK.format(url=_address(value)), 1)
    if isinstance(value, type) and ("*args, **kwargs" in text or name.startswith("_")):
        text = _HEAD.sub(lambda _: f"```python\n{_class(value)}\n```", text, count=1)
    return text


def _found(text, name):
    "What the entry is about: by the module in its link, or by its name among those that are loaded."
    linked = re.search(r"/blob/[^/]+/([\w/]+)\.py#", text)
    first, *rest = name.split(".")
    if linked: modules = [importlib.import_module(linked[1].replace("/", "."))]
    else: modules = [sys.modules[key] for key in sorted(sys.modules) if key.startswith("flashconv.")]
    value = next((vars(module)[first] for module in modules if first in vars(module)), None)
    for part in rest: value = getattr(value, part, None)
    return value


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
