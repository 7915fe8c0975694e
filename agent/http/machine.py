"""What an operator asks of a machine, for `/v1/agent/host`: from /proc, and what cannot be read is left out.

Reading the disk's usage may block; whoever asks does it in a thread. Nothing here knows the agent or HTTP.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from typing import Any


def describe(data_dir: str) -> dict[str, Any]:
    """The machine; `data_dir` lies on the disk that is meant."""
    errors: list[str] = []
    memory: dict[str, int] = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            memory = {k: int(v.split()[0]) * 1024 for k, v in (line.split(":") for line in lines)}
    except (OSError, ValueError) as error:
        errors.append(str(error))
    total, available = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    disk: dict[str, Any] = {}
    try:
        usage = shutil.disk_usage(data_dir)
        disk = {"path": data_dir, "total": usage.total, "free": usage.free, "used": usage.used}
    except OSError as error:
        errors.append(str(error))
    uptime = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    return {
        "Memory": {"total": total, "available": available, "used": total - available},
        "CPU": [{"cpu": i} for i in range(os.cpu_count() or 1)],
        "Host": {
            "hostname": platform.node(),
            "os": platform.system().lower(),
            "uptime": uptime,
            "bootTime": int(time.time()) - uptime,
            "kernelVersion": platform.release(),
            "kernelArch": platform.machine(),
        },
        "Disk": disk,
        "CollectionTime": time.time_ns(),
        "Errors": errors or None,
    }
