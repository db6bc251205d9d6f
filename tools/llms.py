"""Write llms.txt, the book's table of contents for programs that read: python tools/llms.py FILE

The form is that of https://llmstxt.org: the title, the description, and for each section of the
sidebar its pages with their descriptions.
"""
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent


def head(path):
    "The title and the description of a notebook."
    title, *rest = nbformat.read(ROOT / "nbs" / path, as_version=4).cells[0].source.splitlines()
    return title.removeprefix("# "), " ".join(rest).strip().removeprefix("> ")


def entry(path, site):
    "A line of the list."
    title, description = head(path)
    name = Path(path).stem.lstrip("0123456789_")
    return f"- [{title}]({site}/{Path(path).with_name(name)}.html): {description}"


def llms():
    "The text of llms.txt."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    site = settings["doc_host"] + settings["doc_baseurl"]
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    title, description = head("index.ipynb")
    lines = [f"# {title}", "", f"> {description}"]
    for section in sidebar["contents"]:
        if isinstance(section, str): lines.append(entry(section, site))
        else: lines += ["", f"## {section['section']}", "", *(entry(p, site) for p in section["contents"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__": Path(sys.argv[1]).write_text(llms(), encoding="utf-8")
