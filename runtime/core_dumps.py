"""No core dumps of processes that hold keys: the agent, the core, the proxies, and what they start.

A limit of 1 byte, not of 0: it is too little for a file, and at this value alone Linux starts no helper either. A
core_pattern that is a pipe takes no notice of 0. PR_SET_DUMPABLE would also hide /proc/self from the process's own
user, and debuggers with it, and is gone with every exec. The hard limit stays, for who needs a dump once.
"""

from __future__ import annotations

import contextlib
import resource


def switch_off() -> None:
    """For this process and all that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))
