"""Write README.md from nbs/index.ipynb.

nbdev's own command needs Quarto; nbconvert makes the same Markdown without it. Links and images
are relative to nbs/ in the notebook and to the repository in README.md.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n"


def readme():
    "The text of README.md."
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith("#| hide")]
    for cell in nb.cells: cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:|#)", "](nbs/", text)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--check" in sys.argv:
        if path.read_text(encoding="utf-8") != readme():
            sys.exit("README.md differs from nbs/index.ipynb: run `make readme`")
    else:
        path.write_text(readme(), encoding="utf-8")
