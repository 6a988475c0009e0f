"""Imports and attributes of vLLM that our source uses, and the signatures of the functions among them.

`python -m tests.engine.surface` writes the signatures of the installed vLLM, after a new version was reviewed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vllm_ctc_spec
from vllm_ctc_spec.engine import compat

PACKAGE = Path(vllm_ctc_spec.__file__).parent
SIGNATURES = Path(__file__).with_name("vllm_signatures")
"""One file for each supported minor version of vLLM."""


def sources() -> dict[str, ast.Module]:
    """Parsed modules by path below the package."""
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Imports from vLLM as module and name; the name is None where the module itself is imported."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "vllm")


def exists(module: str, name: str | None) -> bool:
    try:
        found = importlib.import_module(module)
        if name is not None and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


def own_attributes(path: str) -> Iterator[tuple[str, set[str]]]:
    """Each class of a file, with the attributes of `self` that it uses and does not define."""
    for node in ast.walk(sources()[path]):
        if isinstance(node, ast.ClassDef):
            attributes = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
            on_self = [each for each in attributes if isinstance(each.value, ast.Name) and each.value.id == "self"]
            written = {each.attr for each in on_self if isinstance(each.ctx, ast.Store)}
            defined = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            declared = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
            yield node.name, {each.attr for each in on_self} - written - defined - declared


def recorded_file() -> Path:
    """File of the installed vLLM's signatures."""
    return SIGNATURES / f"{'.'.join(str(compat.installed_vllm()).split('.')[:2])}.json"


def signatures() -> dict[str, list[str]]:
    """Parameters of every function that we call, override or replace; "=" follows those with a default."""
    found = {}
    for path, attributes in compat.TOUCHED.items():
        owner = compat.owner_of(path)
        for name in attributes:
            value = inspect.getattr_static(owner, name, None)
            if callable(value := getattr(value, "__func__", value)) and not inspect.isclass(value):
                found[f"{path}.{name}"] = _parameters(value)
    return found


def _parameters(function: Any) -> list[str]:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        marks.get(each.kind, "") + each.name + "=" * (each.default is not inspect.Parameter.empty)
        for each in inspect.signature(function).parameters.values()
    ]


if __name__ == "__main__":
    recorded_file().write_text(json.dumps(signatures(), indent=1) + "\n")
