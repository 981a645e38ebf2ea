"""The shell scripts, run by bash in a copy of the project, with only a few chosen programs on the PATH.

conda, uname and the interpreters on that PATH stand in for programs of other people; pip is real and installs tiny
wheels from a loopback server.
"""

import functools
import hashlib
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = ("00_setup.sh", "01_setup.sh", "02_demo.sh", "03_test.sh")
TOOLS = "basename bash cat chmod cksum cp curl cut dirname env grep head mkdir mktemp mv rm sed sha256sum tail wget"
RELEASE = "26.7.2-0"
INSTALLER = """mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$*" >>"%s/calls"\\n' "$3" >"$3/bin/conda"
chmod +x "$3/bin/conda"
"""
TORCH = "class cuda: is_available = lambda: False\nclass backends: mps = cuda"
TOOL = "import os, sys; print({0!r}, *sys.argv[1:]); sys.exit(int(os.environ.get({0!r}, 0)))"  # stand-in of a dev tool

EVALUATE = """import pathlib, sys
folder = pathlib.Path(sys.argv[2], "results")
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text('{{"accuracy_mean": {}}}')
"""
WHEELS = (  # index, name, version, source
    ("simple", "torch", "2.14.1", TORCH),
    ("simple", "torchaudio", "2.11.0", ""),
    ("simple", "tiny", "1.0", ""),
    ("simple", "ruff", "3.0", TOOL.format("RUFF")),
    ("simple", "pytest", "4.0", TOOL.format("PYTEST")),
    ("cpu", "torch", "2.14.1+cpu", TORCH),
    ("cpu", "torchaudio", "2.11.0+cpu", ""),
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the shell scripts are for Linux and macOS")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder that stands for GitHub, PyPI and PyTorch's index: a folder's listing is a package's page."""

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.server.interrupt_at and self.path.endswith(self.server.interrupt_at):
            os.killpg(self.server.script.pid, signal.SIGINT)  # Ctrl-C while the script waits for an answer
            return
        if self.path == "/releases/latest":
            self.send_response(302)
            self.send_header("Location", f"/releases/tag/{RELEASE}")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


def publish(world, path, text):
    file = world.root / "server" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def publish_miniforge(world, system="Linux-x86_64", installer=INSTALLER):
    """Put a release of Miniforge on the server and return the installer's file there."""
    publish(world, f"releases/tag/{RELEASE}", "a page")
    file = publish(world, f"releases/download/{RELEASE}/Miniforge3-{RELEASE}-{system}.sh", installer)
    publish(world, f"{file}.sha256", f"{hashlib.sha256(installer.encode()).hexdigest()}  ./{file.name}\n")
    return file


def publish_wheel(world, index, name, version, source=""):
    """Put a wheel of one module on an index of the server."""
    wheel = publish(world, f"{index}/{name}/{name}-{version}-py3-none-any.whl", "")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", source)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def venv_template(tmp_path_factory):
    """A new virtual environment with pip; copies of it stand for what `-m venv` and `conda create` make."""
    folder = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def world(tmp_path, venv_template):
    """A copy of the project in a folder with a space in its name, a PATH of a few programs, a home and the server."""
    handler = functools.partial(Handler, directory=tmp_path / "server")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    world = SimpleNamespace(root=tmp_path, project=tmp_path / "the project", template=venv_template, server=server)
    for name in ("home", "bin", "tmp", "elsewhere", "the project/.ci"):
        (tmp_path / name).mkdir(parents=True)
    for tool in filter(shutil.which, TOOLS.split()):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name in (*SCRIPTS, ".ci/run", ".gitattributes"):
        text = (PROJECT / name).read_text(encoding="utf-8")
        # A conda that this computer may have is out of sight, and so is PyTorch's own index.
        text = text.replace(" /opt/", f" {tmp_path}/opt/").replace(" /usr/local/", f" {tmp_path}/local/")
        (world.project / name).write_text(text.replace("https://download.pytorch.org/whl", url))
    (world.project / "requirements.txt").write_text("# one\ntorch==2.14.1\ntorchaudio==2.11.0\n\n# two\ntiny==1.0\n")
    (world.project / "requirements-dev.txt").write_text("ruff==3.0\npytest==4.0\n")
    for wheel in WHEELS:
        publish_wheel(world, *wheel)
    world.env = {
        "PATH": str(tmp_path / "bin"),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "MINIFORGE_URL": f"{url}/releases",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{url}/simple",
        "PIP_NO_CACHE_DIR": "1",
    }
    yield world
    server.shutdown()
    server.server_close()


def program(world, path, text):
    """Write a shell script to a path below the root: programs in bin/ are on the PATH."""
    path = world.root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def add_python(world, name="python3.11", before=""):
    """Put an interpreter on the PATH, whose `-m venv DIR` copies the template; `before` is shell text to run first."""
    copy = f'rm -rf "${{@: -1}}"; cp -a "{world.template}" "${{@: -1}}"'
    make_venv = f'case "$*" in *"-m venv"*) {copy}; exit ;; esac'
    return program(world, f"bin/{name}", f'{before}\n{make_venv}\nexec "{sys.executable}" "$@"')


def add_conda(world, path="bin/conda"):
    """Install a conda that writes down what it changes; its environments are copies of the template."""
    world.conda_env, world.conda_calls = world.root / "envs/audio_env", world.root / "calls"
    world.conda_env.parent.mkdir()
    world.conda_calls.touch()
    text = f"""case "$1 $2" in
      "env list") if [ -e "{world.conda_env}" ]; then echo "audio_env              {world.conda_env}"; fi ;;
      "create "* | "install "*) echo "$*" >>"{world.conda_calls}"; cp -a "{world.template}/." "{world.conda_env}" ;;
    esac"""
    return program(world, path, text)


def bash(world, script, *arguments, interrupt_at=None, **env):
    """Run a script of the copied project from a different folder; Ctrl-C at a request that ends with interrupt_at."""
    command = [shutil.which("bash"), world.project / script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = world.env | env
    process = subprocess.Popen(command, cwd=world.root / "elsewhere", env=env, start_new_session=True, **pipes)
    world.server.interrupt_at, world.server.script = interrupt_at, process
    stdout, stderr = process.communicate(timeout=120)
    return SimpleNamespace(status=process.returncode, stdout=stdout, stderr=stderr)


def assert_success(result, *parts):
    assert result.status == 0, result.stdout + result.stderr
    assert [part for part in parts if part not in result.stdout] == [], result.stdout


def assert_error(result, *parts):
    """Exit status 2 and one line that starts with 'error: ' and has all parts."""
    assert result.status == 2, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [part for part in parts if part not in line] == [], line


# --- 00_setup.sh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["bin/conda", "opt/conda/bin/conda", "my conda"])
def test_conda_is_found_on_path_in_usual_folder_and_at_conda_exe(world, path):
    conda_exe = {"CONDA_EXE": str(world.root / "my conda")}
    program(world, "bin/conda", "exit 1")
    assert bash(world, "00_setup.sh", "--print_conda", **conda_exe).status == 1
    conda = add_conda(world, path)
    assert_success(bash(world, "00_setup.sh", **conda_exe), str(conda), "Nothing to do")
    assert bash(world, "00_setup.sh", "--print_conda", **conda_exe).stdout == f"{conda}\n"
    assert world.server.requests == []


@pytest.mark.parametrize(
    ("system", "expected", "absent"),
    [
        ("Linux x86_64", "Linux-x86_64", "wget"),
        ("Linux aarch64", "Linux-aarch64", "curl"),
        ("Darwin x86_64", "MacOSX-arm64", "sha256sum"),  # a terminal under Rosetta; shasum takes the checksum
    ],
)
def test_miniforge_of_this_system_is_installed(world, system, expected, absent):
    if not all(map(shutil.which, ("curl", "wget", "shasum"))):
        pytest.skip("needs curl, wget and shasum")
    (world.root / "bin" / absent).unlink(missing_ok=True)
    kernel, processor = system.split()
    program(world, "bin/uname", f'[ "$1" = -s ] && echo {kernel} || echo {processor}')
    program(world, "bin/sysctl", "echo 1")
    program(world, "bin/shasum", f'PATH="{os.environ["PATH"]}" exec shasum "$@"')
    publish_miniforge(world, expected)
    result = bash(world, "00_setup.sh", MINIFORGE_DIR=str(world.root / "mine"), SHELL="/bin/zsh")
    assert_success(result, "Open a new terminal", "bash 01_setup.sh")
    assert result.stderr == "" and list((world.root / "tmp").iterdir()) == []
    assert "init zsh" in (world.root / "mine/calls").read_text()


@pytest.mark.parametrize("fault", ["has SHA-256", "404", "no space left", "Ctrl-C"])
def test_failed_miniforge_is_one_line_and_leaves_nothing(world, fault):
    program(world, "bin/uname", '[ "$1" = -s ] && echo Linux || echo x86_64')
    installer = publish_miniforge(world, installer="mkdir $3; echo no space left; exit 1")
    if fault == "has SHA-256":
        installer.write_text(f"touch '{world.root}/ran'\n")
    elif fault == "404":
        installer.unlink()
    if fault == "Ctrl-C":
        assert bash(world, "00_setup.sh", interrupt_at=installer.name).status == 130
    else:
        result = bash(world, "00_setup.sh")
        assert_error(result, fault)
        assert len(result.stderr.splitlines()) == 1 and not (world.root / "ran").exists()
    assert list((world.root / "home").iterdir()) == list((world.root / "tmp").iterdir()) == []


# --- 01_setup.sh ----------------------------------------------------------------------------------------------------


def test_no_conda_makes_venv_of_first_recent_python_once(world):
    add_python(world, "python3.11", before="exit 1")  # like a shim of pyenv without a version behind it
    chosen = add_python(world, "python3.12")
    add_python(world, "python3.13")
    first = bash(world, "01_setup.sh")
    assert_success(first, f"creating a venv in {world.project}/.venv", str(chosen), "device           cpu")
    assert_success(first, "torch            2.14.1", "torchaudio       2.11.0", "tiny             1.0")

    world.server.requests.clear()
    assert_success(bash(world, "01_setup.sh"), "Nothing has changed", "tiny             1.0")
    add_conda(world)
    assert bash(world, "01_setup.sh", "--print_python").stdout == f"{world.project}/.venv/bin/python\n"
    assert world.server.requests == [] and world.conda_calls.read_text() == ""


@pytest.mark.parametrize(("exists", "action"), [(False, "create"), (True, "install")])
def test_conda_makes_environment_once_and_active_one_is_left_alone(world, exists, action):
    add_conda(world)
    if exists:  # but without Python
        world.conda_env.mkdir()
    first = bash(world, "01_setup.sh", CONDA_DEFAULT_ENV="mine")
    assert_success(first, "conda activate audio_env", "active environment mine is left as it is")
    assert bash(world, "01_setup.sh", "--print_python").stdout == f"{world.conda_env}/bin/python\n"
    call = f"{action} -y -n audio_env --override-channels -c conda-forge python=3.11 pip\n"
    assert world.conda_calls.read_text() == call and not (world.project / ".venv").exists()


def test_unusable_python_is_error_with_remedy(world):
    assert_error(bash(world, "01_setup.sh"), "neither conda nor Python 3.11", "bash 00_setup.sh")
    add_python(world, "python3", before='case "$*" in *ensurepip*) exit 1 ;; esac')
    assert_error(bash(world, "01_setup.sh"), f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv")
    add_conda(world)
    program(world, world.conda_env / "bin/python", "exit 1")
    assert_error(bash(world, "01_setup.sh"), "not Python 3.11 or newer", "env remove -n audio_env")


def test_changed_requirements_are_installed_and_dev_is_kept(world):
    add_python(world)
    files = "Installing requirements.txt requirements-dev.txt"
    assert_success(bash(world, "01_setup.sh", "--dev"), files)
    publish_wheel(world, "simple", "tiny", "2.0")
    (world.project / "requirements.txt").write_text("torch==2.14.1\ntiny==2.0\n")
    assert_success(bash(world, "01_setup.sh"), files, "tiny             2.0")


def test_chosen_torch_build_is_kept_and_one_out_of_reach_is_not_taken(world):
    add_python(world)
    assert_error(bash(world, "01_setup.sh", "--torch_index", "cu126"), "'cu126'", "address")
    fallback = bash(world, "01_setup.sh", "--torch_index", "http://127.0.0.1:9/whl")
    assert_success(fallback, "http://127.0.0.1:9/whl can't be reached", "torch            2.14.1\n")
    assert_success(bash(world, "01_setup.sh", "--cpu"), "torch            2.14.1+cpu\n", "2.11.0+cpu\n")
    (world.project / "requirements.txt").open("a").write("# a change\n")
    assert_success(bash(world, "01_setup.sh"), "Installing", "2.14.1+cpu\n")
    assert_success(bash(world, "01_setup.sh", "--torch_index", "default"), "torch            2.14.1\n")


def test_interrupted_or_damaged_installation_is_resumed(world):
    add_python(world)
    assert bash(world, "01_setup.sh", interrupt_at="tiny-1.0-py3-none-any.whl").status == 130
    assert_success(bash(world, "01_setup.sh"), "Installing", "tiny             1.0")
    (package,) = (world.project / ".venv").glob("lib/*/site-packages/tiny-1.0.dist-info")
    shutil.rmtree(package)
    assert_success(bash(world, "01_setup.sh"), "Installing", "tiny             1.0")
    (world.project / ".venv/bin/python").unlink()
    assert_success(bash(world, "01_setup.sh"), "creating it again", "tiny             1.0")


def test_broken_or_unknown_package_is_named_with_remedy(world):
    add_python(world)
    (world.project / "requirements.txt").open("a").write("broken==1.0\n")
    assert_error(bash(world, "01_setup.sh"), "pip can't install", "check the network")
    publish_wheel(world, "simple", "broken", "1.0", "raise OSError('libbroken.so is missing')")
    result = bash(world, "01_setup.sh")
    fix = f"{world.project}/.venv/bin/python -m pip install --force-reinstall --no-deps broken==1.0"
    assert_error(result, "broken is missing or broken (OSError: libbroken.so is missing)", fix)
    assert "tiny             1.0" in result.stdout


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_scripts_keep_lf_line_ends_in_every_clone(world):
    subprocess.run(["git", "init", "-q", world.project], check=True)
    command = ["git", "check-attr", "eol", "--", *SCRIPTS, ".ci/run"]
    done = subprocess.run(command, cwd=world.project, check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == [f"{name}: eol: lf" for name in (*SCRIPTS, ".ci/run")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_started_by_sh_run_in_bash(world, script):
    command = ["/bin/sh", world.project / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(world.root / "bin"), "HOME": "/"})
    assert (done.returncode, done.stderr) == (0, "") and script in done.stdout


# --- 02_demo.sh, 03_test.sh, .ci/run --------------------------------------------------------------------------------


def add_stages(world, accuracy):
    """Write stage scripts that only leave the results of evaluate.py: .ci/run runs the demo with the real ones."""
    for name in ("download_data.py", "preprocess_data.py", "train.py", "predict.py"):
        (world.project / name).write_text("")
    (world.project / "evaluate.py").write_text(EVALUATE.format(accuracy))


def test_demo_with_failed_stage_stops(world):
    add_python(world)
    add_stages(world, accuracy=0.9)
    services = "HF_REPO_ID", "HF_MODEL_REPO_ID"  # of the real data set: the demo must not replace what they hold
    (world.project / "train.py").write_text(f"import os\nassert not any(map(os.environ.get, {services}))")
    demo = bash(world, "02_demo.sh", "my demo", **dict.fromkeys(services, "me/real"))
    assert_success(demo, "$ python train.py --epochs 8", "Held-out accuracy 90.0 %")
    assert (world.root / "elsewhere/my demo/results/results.json").exists()
    (world.project / "train.py").write_text("raise SystemExit(2)")
    stopped = bash(world, "02_demo.sh")
    assert stopped.status == 2 and "$ python evaluate.py" not in stopped.stdout


def test_ci_run_stops_at_first_failure_with_its_exit_status(world):
    add_python(world)
    add_stages(world, accuracy=0.95)
    program(world, "bin/shellcheck", "echo SHELLCHECK; exit ${SHELLCHECK:-0}")
    result = bash(world, ".ci/run")
    assert_success(result, "RUFF format --check .", "SHELLCHECK", "PYTEST -n 2 --dist loadfile", "accuracy 95.0 %")
    for tool in ("RUFF", "SHELLCHECK", "PYTEST"):
        result = bash(world, ".ci/run", **{tool: "5"})
        assert result.status == 5 and result.stdout.splitlines()[-1].startswith(tool)
    add_stages(world, accuracy=0.899)
    result = bash(world, ".ci/run")
    assert result.status == 2 and "89.9 %, below the demo's 90 %" in result.stdout
    assert list((world.root / "tmp").iterdir()) == []


# --- What is pinned -------------------------------------------------------------------------------------------------


def test_pinned_packages_are_those_that_are_imported():
    text = "".join((PROJECT / name).read_text() for name in ("requirements.txt", "requirements-app.txt"))
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    pins = {match[1] for line in lines if (match := re.fullmatch(r"([\w-]+)==[\d.]+", line))}
    assert len(pins) == len(lines)
    paths = [path for path in [*PROJECT.glob("*.py"), *PROJECT.glob("[!.]*/*.py")] if path.parent.name != "tests"]
    imports = re.compile(r'(?:^\s*import |^\s*from (?=\S+ import)|need\(")(\w+)', re.MULTILINE)
    imported = {name for path in paths for name in imports.findall(path.read_text(encoding="utf-8"))}
    own = {path.stem for path in paths} | {path.parent.name for path in paths}
    assert imported - own - set(sys.stdlib_module_names) == pins - {"scikit-learn"} | {"sklearn"}
