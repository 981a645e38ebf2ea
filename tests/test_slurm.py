"""slurm.sh as the tasks of an array: two processes at a time on one folder, as sbatch starts them."""

import os
import re
import shutil
import subprocess

from conftest import REPOSITORY


def test_array_tasks_share_the_folds_and_the_report_is_of_all(tmp_path, data, scripts, words_of_python):
    """The words that the shell gives to Python, in two processes."""
    shutil.copytree(data, tmp_path / "data")
    env = {**os.environ, **words_of_python, "ASSETS": str(tmp_path), "ENVIRONMENT": "/nowhere"}
    env |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", "research/slurm.sh", "--epochs", "1", "--batch_size", "8"]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    script, *flags = done.stdout.splitlines()
    assert script == "train.py"
    tasks = [scripts.start("train", *flags, env={**env, "SLURM_ARRAY_TASK_ID": str(task)}) for task in range(2)]
    done = [task.wait() for task in tasks]
    assert [task.returncode for task in done] == [0, 0]
    tested = [re.findall(r"^fold (\d): tested", task.stdout, re.M) for task in done]
    assert sorted(tested[0] + tested[1]) == ["0", "1", "2"]
    assert "3 of 3 folds, " in done[0].stdout + done[1].stdout  # twice, if one task starts after the other has finished
    assert (tmp_path / "results" / "report.md").is_file()
