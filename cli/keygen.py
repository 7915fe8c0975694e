"""`rostra keygen`: a new cluster secret, for -encrypt."""

from __future__ import annotations

import binascii
import os

from rostra.cli.command import Call, Command, say


def _keygen(_call: Call) -> None:
    say(binascii.b2a_base64(os.urandom(32), newline=False).decode())


COMMANDS = {"": Command("keygen", "Generates a new cluster secret of 32 random bytes, for -encrypt", _keygen, takes=0)}
