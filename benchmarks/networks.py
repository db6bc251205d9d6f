"""The networks of nbs/tutorials/networks.ipynb: what its cells import, define and assign.

The page is where they are built and explained; its other statements, which test and print, don't
run here. After `import networks` each definition is an attribute of this module.
"""
import ast
import json
from pathlib import Path

PAGE = Path(__file__).parents[1] / "nbs/tutorials/networks.ipynb"
_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)

for _cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]:
    if _cell["cell_type"] != "code": continue
    _tree = ast.parse("".join(_cell["source"]))
    _tree.body = [node for node in _tree.body if isinstance(node, _KEPT)]
    exec(compile(_tree, str(PAGE), "exec"), globals())
