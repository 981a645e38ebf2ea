"""slurm.sh as a task of an array, as sbatch starts it, beside another process on the same folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY


def test_array_tasks_share_the_folds_and_the_report_is_of_all(tmp_path, data, scripts):
    shutil.copytree(data, tmp_path / "data")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "ASSETS": str(tmp_path), "ENVIRONMENT": "/nowhere"}
    env |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "1"}
    flags = ("--epochs", "3", "--batch_size", "8")
    command = ["bash", "research/slurm.sh", *flags]
    with subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as task:
        printed = ""
        while "epoch 1/3" not in printed:
            printed += (line := task.stdout.readline())
            assert line
        other = scripts.run("train", *flags, "--assets_dir", tmp_path)
        printed += task.communicate()[0]
    assert (task.returncode, other.returncode) == (0, 0)
    tested = [re.findall(r"^fold (\d): tested", text, re.M) for text in (printed, other.stdout)]
    assert sorted(tested[0] + tested[1]) == ["0", "1", "2"] and tested[0]
    assert "3 of 3 folds, " in printed + other.stdout
    assert (tmp_path / "results" / "report.md").is_file()
