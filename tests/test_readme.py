"""Every example of the README runs as it stands, in a copy of the project whose data set is a miniature.

Each block of ```bash is one test, in a copy of its own after stages 1 to 3, without checkpoints. Changed is only this:
`python` is the interpreter that runs the tests, training takes one epoch, own recordings make three folds, and the
recordings that an example names are provided. Commands that can't run here stand in LEFT_OUT, each with the reason.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY

import demo_data

CLONES = "clones from GitHub: .ci/run does the rest of the block from a clean clone"
INSTALLS = "installs packages or takes minutes: tests/test_setup.py tests the set-up scripts, and .ci/run runs them"
NEEDS_ACCOUNT = "needs an account and the network: tests/test_hub.py and test_tracking.py test it without"
NEEDS_SOUND = "needs a loudspeaker or a microphone: tests/test_sound.py has files instead"
STAGES = ["python preprocess_data.py", "python train.py --folds 0,1 --validation none"]
LEFT_OUT = {
    **dict.fromkeys(STAGES, "the fixture `finished` runs it, before all examples"),
    "python train.py": "the commands below 'Your own sounds' run it, with the name of a folder alone",
    "git clone https://github.com/OWNER/audio_is_all_you_need && cd audio_is_all_you_need": CLONES,
    "bash 01_setup.sh": INSTALLS,
    "bash 02_demo.sh": INSTALLS,
    "bash 03_test.sh": INSTALLS,
    "conda activate audio_env": INSTALLS,
    "pip install -r requirements-app.txt": INSTALLS,
    "python app.py": "runs until it is stopped: tests/test_app.py drives it",
    "python download_data.py": "fetches 6 GB: tests/test_download_data.py tests it against loopback",
    "HF_REPO_ID=owner/data python preprocess_data.py": NEEDS_ACCOUNT,
    "HF_MODEL_REPO_ID=owner/model python train.py": NEEDS_ACCOUNT,
    "python predict.py recording.wav --model_dir hf://owner/model": NEEDS_ACCOUNT,
    "python -m services.hub push": NEEDS_ACCOUNT,
    "WANDB_PROJECT=urbansound python train.py": NEEDS_ACCOUNT,
    "python test_playsound_app.py": NEEDS_SOUND,
    "python predict.py --mic": NEEDS_SOUND,
}
KINDS = {"bash", "text", "python"}  # of the README's blocks
FORMATS = "wav|flac|ogg|mp3|aiff"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the examples are for bash")


def read_blocks():
    """Return [(kind, text)] of the README's fenced blocks."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """Return a block's commands, one a line, without comments; a line that ends in a backslash goes on."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def runnable():
    """Return [the commands to run] of each block that has some."""
    blocks = [commands(text) for kind, text in read_blocks() if kind == "bash"]
    kept = [[command for command in block if command not in LEFT_OUT] for block in blocks]
    return [block for block in kept if block]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment variables of the examples: `python` is this one, and nothing is sent or played."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python").chmod(0o755)
    (folder / "asound.conf").write_text("pcm.broken { type empty }\n")
    services = {"HF_REPO_ID": "", "HF_MODEL_REPO_ID": "", "WANDB_PROJECT": "", "WANDB_MODE": "disabled"}
    return {
        **os.environ,
        **services,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "ALSA_CONFIG_PATH": str(folder / "asound.conf"),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """A folder with a copy of the project and its assets after stages 1 to 3. Read it, don't write."""
    folder = tmp_path_factory.mktemp("readme")
    project, assets = folder / "audio_is_all_you_need", folder / "assets" / "audio_is_all_you_need"
    project.mkdir()
    for path in REPOSITORY.iterdir():
        if path.suffix in (".py", ".sh", ".txt", ".md", ".toml"):
            shutil.copy2(path, project)
    for name in ("reports", "services", "research", "models"):
        shutil.copytree(REPOSITORY / name, project / name)
    (project / "__pycache__").mkdir()
    for path in REPOSITORY.glob("__pycache__/kernels.*.nb[ci]"):  # the compiled loops, where there are some
        shutil.copy2(path, project / "__pycache__")
    config = project / "config.py"
    text = config.read_text(encoding="utf-8")
    for name, value in (("EPOCHS", 1), ("N_FOLDS", 3)):
        text, found = re.subn(rf"^{name}: int = \d+", f"{name}: int = {value}", text, flags=re.M)
        assert found == 1
    config.write_text(text, encoding="utf-8")
    demo_data.make_miniature(assets / "data" / "UrbanSound8K", folds=3, clips_per_class=1)
    run(STAGES, project, environment)
    shutil.rmtree(assets / "checkpoints")  # training is then a first one, whatever its flags
    return folder


def run(block, project, environment):
    """Run commands in the project's folder, in one bash that stops at the first to fail."""
    script = "\n".join(["set -euo pipefail", *block])
    script = re.sub(r"(--epochs) \d+", r"\1 1", script)
    done = subprocess.run(["bash", "-c", script], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def provide_recordings(block, project):
    """Write a recording for each audio file that the commands name and the project lacks, and one in each folder."""
    text = " ".join(block)
    names = re.findall(rf"(?<![\w/.~-])(?:[\w-]+/)*[\w.-]+\.(?:{FORMATS})\b", text)
    for folder in re.findall(r"(?<![\w/.~-])((?:[\w-]+/)+)(?:\*\S*)?(?=[\s'\"]|$)", text):
        names.append(f"{folder}1.wav")
    if "--data_dir my_sounds" in text:
        names += [f"my_sounds/{name}/{letter}.wav" for name in ("siren", "dog") for letter in "abc"]
    rate = 22_050  # Hz
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * rate)
    for path in (project / name for name in names):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise, rate)


@pytest.mark.parametrize("block", runnable(), ids=lambda block: block[0])
def test_example(block, finished, environment, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, copy_function=copy_or_link)
    project = folder / "audio_is_all_you_need"
    provide_recordings(block, project)
    done = run(block, project, {**environment, "HOME": str(tmp_path)})
    assert done.stdout + done.stderr


def copy_or_link(source, target):
    """Copy a file; the data set's clips, which are only read, as links."""
    return os.link(source, target) if f"{os.sep}audio{os.sep}fold" in source else shutil.copy2(source, target)


def test_examples_in_python(finished, environment, tmp_path):
    project = finished / "audio_is_all_you_need"
    code = "\n".join(text for kind, text in read_blocks() if kind == "python")
    assert "load()" in code and "onnxruntime" in code
    provide_recordings(["street.wav"], project)
    shutil.copy(project / "models" / "urban_sounds.onnx", project / "model.onnx")
    (tmp_path / "example.py").write_text(code)
    run([f"PYTHONPATH=. python {tmp_path / 'example.py'}"], project, environment)


@pytest.mark.parametrize("command", LEFT_OUT)
def test_command_left_out_is_in_the_readme(command):
    assert command in [command for kind, text in read_blocks() if kind == "bash" for command in commands(text)]


def test_no_block_escapes():
    assert {kind for kind, _ in read_blocks()} <= KINDS
    assert len(runnable()) >= 5


def test_files_that_the_readme_names_exist():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|yaml))`", text)) | set(re.findall(r"\]\(([\w/.]+)\)", text))
    names |= {f"{name}/" for name in re.findall(r"`(reports|services|benchmarks|research)/`", text)}
    assert len(names) >= 15
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 220
