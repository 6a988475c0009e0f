"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that at the end of a run of several processes none of them is left to one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
