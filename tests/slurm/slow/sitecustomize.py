"""Imported by every Python whose PYTHONPATH names this folder: makes training slow, for tests that act while it runs.

SLOW_FILE names a JSON file {"step": seconds, "save": seconds}, read each time: what rank 0 waits after a step, before its heartbeat, and
before a checkpoint gets its name.
"""

import json
import os
import sys
import time

if "SLOW_FILE" in os.environ and "RANK" in os.environ:

    def _wait(event: str, arguments: tuple) -> None:
        if event != "os.rename":  # os.replace raises it too
            return
        target = os.path.basename(os.fsdecode(arguments[1]))
        kind = "step" if target == "heartbeat.json" else "save" if target.startswith("step_") else None
        if kind is not None:
            with open(os.environ["SLOW_FILE"]) as stream:
                time.sleep(json.load(stream).get(kind, 0.0))

    sys.addaudithook(_wait)
