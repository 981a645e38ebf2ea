"""A process that test_hub.py starts as a client of the Hub: calls of hub.py's functions, or a training's Publisher."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import config
from services import hub


def call(calls):
    """Call functions of hub.py as [[function, *arguments], ...] says; print what they return, or their errors."""
    hub.ANSWER_SECONDS = 3
    outcomes = []
    for function, *arguments in json.loads(calls):
        try:
            paths = [Path(value) if str(value).startswith("/") else value for value in arguments]
            outcomes.append(str(getattr(hub, function)(*paths)))
        except hub.UserError as error:
            outcomes.append(f"error: {error}")
    print(json.dumps(outcomes))


def publish(assets, fold, stalls=False):
    """Do what training does with a Publisher: two epochs, of which the first is pruned, then the fold's end.

    stalls: no fold ends, and the interval sends.
    """
    root, finished = Path(assets), False
    config.HF_COMMIT_MINUTES = 0.01 if stalls else config.HF_COMMIT_MINUTES
    publisher = hub.Publisher(SimpleNamespace(**{name: root / name for name in ("checkpoints", "models", "results")}))
    try:
        publisher.add_epoch(int(fold), 1)
        (root / f"checkpoints/fold_{fold}/epoch_1.safetensors").unlink()
        publisher.add_epoch(int(fold), 2)
        time.sleep(600 if stalls else 0)
        publisher.add_model(0)
        finished = True
    finally:
        publisher.close(finished)


def main():
    {"call": call, "publish": publish}[sys.argv[1]](*sys.argv[2:])
