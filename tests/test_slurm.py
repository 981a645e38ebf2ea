"""slurm.sh as the tasks of an array: two processes at a time on one folder, as sbatch starts them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY


def start_task(task, assets):
    """Start slurm.sh as Slurm does: with the number of the task, on a node that has its own Python first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "ASSETS": str(assets), "ENVIRONMENT": "/nowhere"}
    env |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", "research/slurm.sh", "--epochs", "1", "--batch_size", "8"]
    return subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_array_tasks_share_the_folds_and_the_report_is_of_all(tmp_path, data):
    shutil.copytree(data, tmp_path / "data")
    tasks = [start_task(task, tmp_path) for task in range(2)]
    printed = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    tested = [re.findall(r"^fold (\d): tested", text, re.M) for text in printed]
    assert sorted(tested[0] + tested[1]) == ["0", "1", "2"]
    assert "3 of 3 folds, " in "".join(printed)  # twice, if one task starts after the other has finished
    assert (tmp_path / "results" / "report.md").is_file()
