"""What our source takes of vLLM, read from the source itself.

`python -m tests.engine.surface` writes the signatures of the installed vLLM, for a new version that has been looked at.
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
"""A file for each minor version of vLLM that we support."""


def sources() -> dict[str, ast.Module]:
    """By path below the package."""
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Modules of vLLM and the names that are taken from them; None for the module itself."""
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
    """Classes of ours in a file, and what they read of `self` without having it from themselves."""
    for node in ast.walk(sources()[path]):
        if isinstance(node, ast.ClassDef):
            attributes = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
            on_self = [each for each in attributes if isinstance(each.value, ast.Name) and each.value.id == "self"]
            written = {each.attr for each in on_self if isinstance(each.ctx, ast.Store)}
            defined = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            declared = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
            yield node.name, {each.attr for each in on_self} - written - defined - declared


def recorded_file() -> Path:
    """That of the installed vLLM."""
    return SIGNATURES / f"{'.'.join(str(compat.installed_vllm()).split('.')[:2])}.json"


def signatures() -> dict[str, list[str]]:
    """Of every function that we call, override or replace: its parameters, "=" after those that have a default."""
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
