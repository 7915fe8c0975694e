"""Real processes for the attacks; whatever a test starts is gone when it ends, or it fails."""

from tests.e2e.conftest import module_processes, processes

__all__ = ["module_processes", "processes"]
