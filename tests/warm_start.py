"""Runs of the scripts which start at once: forks of one process that has imported them and has done all of it once.

Importing torch and what a training imports late takes eight seconds of every run. This file is both sides: a server
process that imports the scripts and forks a child for each request, which calls the script's main() as its command line
would; and `WarmScripts`, which starts the server and talks to it. The child is a process of its own, to be killed and
interrupted as any other.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "predict", "play_and_predict_random", "preprocess_data", "export", "onnxruntime", "hub_client")


class WarmScripts:
    """The server, as a context; folder: for what the runs print."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def __enter__(self):
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()

    def start(self, script, *arguments, env=None, cwd=None):
        """Start a script and return its Run. env: its environment, whole (default: the server's)."""
        self.count += 1
        request = {"script": script, "arguments": list(map(str, arguments)), "env": env, "cwd": str(cwd or REPOSITORY)}
        return Run(self.server.stdin, request, self.folder / f"run_{self.count}")

    def run(self, script, *arguments, **options):
        """Run a script to its end and return its CompletedProcess."""
        return self.start(script, *arguments, **options).wait()


class Run:
    """A script that runs; `wait` must follow."""

    def __init__(self, server, request, output):
        self.output = output
        os.mkfifo(output)
        print(json.dumps({**request, "to": str(output)}), file=server, flush=True)
        self.news = open(output, "rb", buffering=0)  # noqa: SIM115 (until `wait`)
        self.pid = int(self.news.readline())

    def printed(self, stream="stdout"):
        """Return what the run has printed so far."""
        path = self.output.with_suffix(f".{stream}")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def ended(self):
        """Return whether the run has ended; its status waits to be read."""
        return bool(select.select([self.news], [], [], 0)[0])

    def kill(self, how=signal.SIGKILL):
        """Send the run a signal. Return whether it was still running."""
        if self.ended():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)
        return True

    def wait(self):
        """Return the CompletedProcess of the run, its output as text; the status of a killed one is negative."""
        with self.news:
            status = int(self.news.readline())
        return subprocess.CompletedProcess(self.output, status, self.printed(), self.printed("stderr"))


def serve():
    """Fork for each line of JSON on stdin; write the process id and, when it has ended, its exit status to its pipe."""
    sys.path.insert(0, str(REPOSITORY))
    for name in SCRIPTS:
        importlib.import_module(name)
    rehearse()
    gc.freeze()
    running = {}  # {process id: pipe}

    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                with contextlib.suppress(BrokenPipeError), running.pop(found[0]) as pipe:
                    print(os.waitstatus_to_exitcode(found[1]), file=pipe, flush=True)

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pipe = open(request["to"], "w")  # noqa: SIM115 (until the child ends)
        child = os.fork()
        if not child:
            be_script(**request)
        running[child] = pipe
        print(child, file=pipe, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def rehearse():
    """Do once what the first epoch and the first report of a process wait for: imports, compiled loops, fonts."""
    import torch
    from result_files import write_run
    from untrained import SETTINGS

    import config
    import model
    import train
    from audio import AudioSettings
    from reports import tables

    settings = {**SETTINGS, "fast_blocks": True, "learning_rate": 0.1, "weight_decay": 0, "label_smoothing": 0}
    settings["precision"] = config.PRECISION
    for name in model.MODELS:
        network = model.build_model({**settings, "model": name}, 2, AudioSettings())
        inputs, targets = torch.ones(2, *AudioSettings().shape), torch.eye(2)
        train.train_step(network, train.make_optimizer(network, settings), inputs, targets, settings)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        tables.write_report(write_run(Path(folder)), Path(folder))


def be_script(to, script, arguments, env, cwd):
    """Be the script: its arguments, its output, its environment, its exit status."""
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{to}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os.chdir(cwd)
    sys.argv = [f"{script}.py", *arguments]
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
        sys.path[:0] = env.get("PYTHONPATH", str(REPOSITORY)).split(os.pathsep)
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
