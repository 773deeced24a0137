"""The order of all tests."""

import pytest

LONG = ("chain", "server")  # markers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole chains first, so that no process is alone with one at the end."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    items.sort(key=lambda item: item.path not in long)
