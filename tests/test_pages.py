"""Pages name what is there: files, folders, tests, and the supported versions of vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOVE = ("", "vllm_ctc_spec", "vllm_ctc_spec/engine", "vllm_ctc_spec/engine/adaptive", "tests/engine")
"""Folders below which pages name files."""

_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*(/|\.(py|json|md|toml|yaml|sh))")
_LINK = re.compile(r"\]\(([^):#]+)[^):]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = [word for word in _CODE.findall(page.read_text()) if _PATH.fullmatch(word)]
    ours = [path for path in named if not path.startswith("vllm/")]
    assert ours
    assert [path for path in ours if not any((ROOT / folder / path).exists() for folder in ABOVE)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = _LINK.findall(page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_tests_that_a_page_names_are_there() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))
    named = {word for page in PAGES for word in _CODE.findall(page.read_text()) if re.fullmatch(r"test_\w+", word)}
    assert len(named) > 20
    assert named - defined == set()


def test_the_readme_names_the_supported_vllm() -> None:
    """As the pins of pyproject.toml do (tests/engine/test_contract.py)."""
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| vLLM ")]
    minors = re.findall(r"\d+\.\d+", row.split("|")[1])
    assert minors == sorted(path.stem for path in (ROOT / "tests/engine/vllm_signatures").iterdir())
