from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from rostra.runtime import log


@pytest.fixture
def told() -> Iterator[io.StringIO]:
    """What is logged meanwhile."""
    stream = io.StringIO()
    log.configure("info", stream=stream)
    yield stream
    log.configure("info")
