"""The agent's configuration: flags, JSON and HCL files → one frozen `Config`, or every problem at once.

`settings.py` is the table; `loading.py` reads, `found.py` collects, `rules.py` settles. It runs
before anything heavy is loaded: it imports the standard library, and of ours what imports no more either.
"""

from rostra.agent.config.found import ConfigErrors, Problem
from rostra.agent.config.loading import load, read_definitions, usage, validate
from rostra.agent.config.rules import host_addresses, pick_address
from rostra.agent.config.settings import SETTINGS, UNUSED, Config, Definition
from rostra.agent.values import Secret

__all__ = [
    "SETTINGS",
    "UNUSED",
    "Config",
    "ConfigErrors",
    "Definition",
    "Problem",
    "Secret",
    "host_addresses",
    "load",
    "pick_address",
    "read_definitions",
    "usage",
    "validate",
]
