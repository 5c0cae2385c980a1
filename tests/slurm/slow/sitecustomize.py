"""Imported by every Python whose PYTHONPATH names this folder: makes a run slow, for tests that act while it lasts.

SLOW_FILE names a JSON file {"step": seconds, "save": seconds, "cell": seconds}, read each time: what rank 0 waits after a step, before its
heartbeat, before a checkpoint gets its name, and before the needles of a cell are written down.
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
        kind = "save" if target.startswith("step_") else {"heartbeat.json": "step", "trials.jsonl": "cell"}.get(target)
        if kind is not None:
            with open(os.environ["SLOW_FILE"]) as stream:
                time.sleep(json.load(stream).get(kind, 0.0))

    sys.addaudithook(_wait)
