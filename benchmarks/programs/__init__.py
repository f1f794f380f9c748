"""Programs that the cases run in processes of their own: the ceilings, the plain scripts, the peers.

None of them imports kindling (but for `weigh`, which measures its workers): they are what one would write without it.
Each takes one JSON object as the first line of its standard input, prints `ready` when it has prepared, waits for
another line, works, and prints one JSON object last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def spec() -> dict[str, Any]:
    """What the runner asks for."""
    asked: dict[str, Any] = json.loads(sys.stdin.readline())
    return asked


def wait_for_go() -> None:
    """Tell the runner that preparing is over, and wait until every process of the group has said so."""
    print("ready", flush=True)
    sys.stdin.readline()


def answer(result: Mapping[str, Any]) -> None:
    """The last line of the program."""
    print(json.dumps(result), flush=True)
