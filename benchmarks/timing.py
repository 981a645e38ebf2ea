"""What the benchmarks share: turns of timed functions, commands, the rows of their tables, and the machine's line."""

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import utils

REPOSITORY = Path(__file__).resolve().parent.parent
TURNS = 5  # of ours and the reference; each figure is the median


def median_times(*functions, turns=TURNS):
    """Return the median seconds of each function, run in turns after one call of each that is not counted."""
    times = [[] for _ in functions]
    for turn in range(turns + 1):
        for function, row in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                row.append(time.perf_counter() - start)
    return [statistics.median(row) for row in times]


def row(what, reference, ours, theirs, unit, reach="", faster=True):
    """Return one row of the table; its ratio is theirs / ours (how many times faster), or ours / theirs (a share)."""
    ratio = theirs / ours if faster else ours / theirs
    return {
        "what": what,
        "reference": reference,
        "ours": ours,
        "theirs": theirs,
        "unit": unit,
        "ratio": ratio,
        "reach": reach,
    }


def machine():
    """Return what the figures depend on, in one line."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    bf16 = ", bf16" if utils.computes_in_bfloat16(torch.device("cpu")) else ""
    capability = torch.backends.cpu.get_cpu_capability()
    python = platform.python_version()
    return f"{name}, {os.cpu_count()} cores, {capability}{bf16}, torch {torch.__version__}, Python {python}"


def run_command(command):
    subprocess.run(list(map(str, command)), cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)


def peak_memory(command):
    """Return the largest resident size of a command, in bytes. UserError if it fails."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise utils.UserError(f"{' '.join(map(str, command))} ended with exit status {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_row(values):
    """Return a row as a line of a Markdown table."""
    times = (values[key] for key in ("ours", "theirs"))
    ours, theirs = (f"{f'{time:,.0f}' if time >= 1000 else f'{time:.3g}'} {values['unit']}".strip() for time in times)
    cells = values["what"], values["reference"], ours, theirs, f"{values['ratio']:.2f}", values["reach"]
    return f"| {' | '.join(cells)} |"
