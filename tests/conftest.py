"""The order of all tests."""

import pytest

LONG = ("chain", "server")  # markers
LONGEST = "test_sabotage.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole chains first, the longest of them before all, so that no process is alone with one at the end."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path not in long))
