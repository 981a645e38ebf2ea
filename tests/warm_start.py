"""Runs of the scripts that import torch, which start at once: forks of one process that has done the importing.

Importing torch takes two seconds of every run. This file is both sides: a server process that imports the scripts and
forks a child for each request, which calls the script's main() as its command line would; and `WarmScripts`, which
starts the server and talks to it. The child is a process of its own, to be killed and interrupted as any other.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "predict", "play_and_predict_random", "services.hub")
ALSO_SLOW = ("kernels", "matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.stats", "torch._dynamo")


class WarmScripts:
    """The server, as a context; folder: for what the runs print. One run at a time."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def __enter__(self):
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()

    def start(self, script, *arguments, env=None):
        """Start a script; `wait` must follow. env: its environment, whole (default: the server's)."""
        self.count += 1
        self.output = self.folder / f"run_{self.count}"
        request = {"script": script, "arguments": list(map(str, arguments)), "to": str(self.output), "env": env}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.child = int(self.server.stdout.readline())

    def printed(self, stream="stdout"):
        """Return what the run has printed so far."""
        path = self.output.with_suffix(f".{stream}")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def ended(self):
        """Return whether the run has ended; its status waits to be read."""
        return bool(select.select([self.server.stdout], [], [], 0)[0])

    def kill(self):
        """Kill the run, as kill -9 does. Return whether it was still running."""
        if self.ended():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        return True

    def wait(self):
        """Return the CompletedProcess of the run, its output as text; the status of a killed one is negative."""
        status = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(self.output, status, self.printed(), self.printed("stderr"))

    def run(self, script, *arguments, env=None):
        """Run a script to its end and return its CompletedProcess."""
        self.start(script, *arguments, env=env)
        return self.wait()


def serve():
    """Fork a child for each line of JSON on stdin; answer its process id and, when it has ended, its exit status."""
    sys.path.insert(0, str(REPOSITORY))
    for name in (*SCRIPTS, *ALSO_SLOW):
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            be_script(**json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def be_script(script, arguments, to, env):
    """Be the script: its arguments, its output, its environment, its exit status."""
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{to}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [f"{script}.py", *arguments]
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
        importlib.reload(importlib.import_module("config"))  # which reads it
    status = 1
    try:
        importlib.import_module("utils").run(importlib.import_module(script).main)
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
