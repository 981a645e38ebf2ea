"""slurm.sh with stand-ins for the cluster's own commands: what it would start, on the nodes it would start it on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

STAND_INS = {
    "scontrol": "#!/bin/sh\necho 127.0.0.1\n",  # show hostnames: the job's nodes, one a line
    "srun": '#!/bin/sh\nexec "$@"\n',  # the job of one node
}
FLAGS = ("--epochs", "2", "--batch_size", "8", "--folds", "0,1")


@pytest.fixture
def slurm(tmp_path, data):
    """A function that runs slurm.sh as a job: slurm(SLURM_NNODES=1) -> CompletedProcess."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    shutil.copytree(data, tmp_path / "assets" / "data")

    def run(*flags, **variables):
        path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "ASSETS": str(tmp_path / "assets"), "ENVIRONMENT": "/nowhere", **variables}
        command = ["bash", "research/slurm.sh", *flags]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPOSITORY)

    return run


def test_a_job_for_a_fold_and_the_report_of_all(slurm, tmp_path, run_script):
    done = slurm("--epochs", "2", "--batch_size", "8", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 folds" in done.stdout
    assets = tmp_path / "assets"
    joined = run_script("evaluate.py", "--join", assets / "fold_1", "--assets_dir", assets)
    assert joined.returncode == 0, joined.stderr
    (line,) = re.findall("^1 of 3 folds.*", joined.stdout, re.M)
    assert line in done.stdout


def test_one_job(slurm, tmp_path):
    done = slurm(*FLAGS, SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_JOB_NODELIST="node1")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 folds" in done.stdout
    assert (tmp_path / "assets" / "results" / "report.md").is_file()
