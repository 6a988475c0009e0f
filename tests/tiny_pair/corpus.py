"""Training text: the source code of Python's standard library."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_ctc_spec.files import atomic_folder

SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "__pycache__",
    }
)
"""Installed packages, tests, and modules that are tables of data rather than code."""

MAX_CHARS = 400_000
HELD_OUT_SHARE = 16
"""One file in this many is held out."""
NUM_PROMPTS = 256
NUM_HELD_OUT_PROMPTS = 32
PROMPT_CHARS = (120, 360)


def write_corpus(folder: Path) -> None:
    """Write texts.jsonl (`text`), prompts.jsonl and heldout.jsonl (`prompt`) into `folder`, all or nothing."""
    trained, held_out = _split(dict(_read_sources()))
    with atomic_folder(folder) as partial:
        _write_rows(partial / "texts.jsonl", ({"text": text} for text in trained))
        _write_rows(partial / "prompts.jsonl", _prompts(trained, NUM_PROMPTS, seed=1))
        _write_rows(partial / "heldout.jsonl", _prompts(held_out, NUM_HELD_OUT_PROMPTS, seed=2))


def _read_sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED.intersection(relative.parts):
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):
                yield str(relative), _bare_code(path.read_text(encoding="utf-8"))


def _bare_code(source: str) -> str:
    """`source` in one uniform format, without comments and docstrings.

    Half of the library's text is English, which a model of this size cannot learn beside Python.
    """
    tree = ast.parse(source)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def _split(sources: dict[str, str]) -> tuple[list[str], list[str]]:
    # Hashes of names keep a file in its split, whatever else a Python version ships.
    digests = {name: hashlib.sha256(name.encode()).digest() for name in sources}
    trained: list[str] = []
    held_out: list[str] = []
    num_chars = 0
    for name in sorted(sources, key=digests.__getitem__):
        text = sources[name]
        if digests[name][-1] % HELD_OUT_SHARE == 0:
            held_out.append(text)
        elif num_chars < MAX_CHARS:
            trained.append(text)
            num_chars += len(text)
    return trained, held_out


def _prompts(texts: list[str], count: int, seed: int) -> Iterator[dict[str, str]]:
    """Runs of whole lines from random places; a continuation begins a new line."""
    random_source = random.Random(seed)
    weights = [len(text) for text in texts]
    while count:
        text = random_source.choices(texts, weights)[0]
        start = text.find("\n", random_source.randrange(len(text))) + 1
        end = text.rfind("\n", start, start + random_source.randint(*PROMPT_CHARS)) + 1
        if end - start >= PROMPT_CHARS[0] // 2:
            yield {"prompt": text[start:end]}
            count -= 1


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
