"""Processes for the end-to-end tests; whatever a test starts is gone when it ends, or it fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import processes as support


@pytest.fixture
def processes() -> Iterator[support.Processes]:
    """Processes of one test."""
    with support.processes() as found:
        yield found


@pytest.fixture(scope="module")
def module_processes() -> Iterator[support.Processes]:
    """Processes that all tests of a module share."""
    with support.processes() as found:
        yield found
