#!/usr/bin/env bash
# Step 1: create the Python environment of the project and install requirements.txt into it.
#
#     bash 01_setup.sh                      # conda environment audio_env; without conda, a venv in .venv
#     bash 01_setup.sh --dev                # also what 03_test.sh needs (requirements-dev.txt)
#     bash 01_setup.sh --cpu                # PyTorch without CUDA: about 2 GB of disk instead of 6.3 on Linux
#     bash 01_setup.sh --torch_index URL    # a different build of PyTorch, such as an older CUDA or ROCm:
#                                           # https://download.pytorch.org/whl/cu126 (URL "default": pip's own again)
#     bash 01_setup.sh --print_python       # the same, but stdout is the path of the environment's Python alone
#
# Prints the environment, what pip installs, each package's version and the device. Leaves an active environment as it
# is. Run it again at any time: it resumes an interrupted installation and installs what has changed in the requirements
# files; if nothing has changed, it needs no network. The chosen build of PyTorch is kept.
#
# Exit status 0: every package can be imported. 2: one line says what failed and how to fix it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh knows no pipefail
set -euo pipefail

ENV_NAME="audio_env"
PYTHON_VERSION="3.11"              # of the conda environment
VENV_PYTHONS="3.11 3.12 3.13 3.14" # for a venv, in this order; then any python3 from 3.11 on
CPU_INDEX="https://download.pytorch.org/whl/cpu"
TIMEOUT_S=15                       # for the first answer of PyTorch's index
STAMP="audio_setup.txt"            # in the environment: what is completely installed there

project_dir="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
requirements=(requirements.txt)
is_dev=0
print_python=0
wanted_index="" # empty: keep what is installed
python=""       # the environment's interpreter
activate=""     # the command that activates the environment

fail() {
  echo "error: $*" >&2
  exit 2
}

parse_options() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --dev) is_dev=1 ;;
      --cpu) wanted_index="$CPU_INDEX" ;;
      --torch_index)
        case "${2:-}" in
          default | http://*/* | https://*/*) wanted_index="${2%/}" ;;
          *) fail "--torch_index is '${2:-}': give an address such as $CPU_INDEX, or default" ;;
        esac
        shift
        ;;
      --print_python) print_python=1 ;;
      -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
      *) fail "unknown option $1: see bash 01_setup.sh --help" ;;
    esac
    shift
  done
}

# --- The environment ---------------------------------------------------------------------------------------------

# Isolated (-I): the user's site-packages, PYTHON... variables and this folder must not replace pinned packages.
run_python() {
  "$python" -I "$@"
}

is_recent() {
  "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Print the folder of the conda environment, or nothing if it does not exist.
conda_env_dir() {
  "$1" env list | sed -n "s|^${ENV_NAME}[ *+]*\(/.*\)|\1|p" | head -n 1
}

use_conda() {
  local conda="$1" env_dir action="install"
  env_dir="$(conda_env_dir "$conda")"
  if [ -z "$env_dir" ]; then action="create"; fi
  if [ -z "$env_dir" ] || [ ! -x "$env_dir/bin/python" ]; then
    echo "Installing Python $PYTHON_VERSION into the conda environment $ENV_NAME ($conda) ..."
    # conda-forge by name: the default channels ask a person to accept terms, which stops a script.
    "$conda" "$action" -y -n "$ENV_NAME" --override-channels -c conda-forge "python=$PYTHON_VERSION" pip \
      || fail "conda can't $action $ENV_NAME (see its message above): check the network and run this again"
    env_dir="$(conda_env_dir "$conda")"
  fi
  python="$env_dir/bin/python"
  activate="conda activate $ENV_NAME"
  if ! is_recent "$python"; then
    fail "$python is not Python 3.11 or newer: remove it ($conda env remove -n $ENV_NAME) and run this again"
  fi
  echo "Environment: $ENV_NAME of conda, in $env_dir (to activate it: $activate)"
}

use_venv() {
  local base
  python="$project_dir/.venv/bin/python"
  activate="source $(printf '%q' "$project_dir/.venv/bin/activate")"
  if is_recent "$python" && { [ -f ".venv/$STAMP" ] || run_python -m pip --version >/dev/null 2>&1; }; then
    echo "Environment: $project_dir/.venv (to activate it: $activate)"
    return
  fi
  base="$(find_base_python)"
  if [ -e .venv ]; then echo "$project_dir/.venv is incomplete or too old: creating it again."; fi
  echo "No conda found: creating a venv in $project_dir/.venv with $("$base" --version) ($base)"
  "$base" -I -m venv --clear "$project_dir/.venv" \
    || fail "$base can't create a venv (see its message above): remove $project_dir/.venv, or install conda with bash 00_setup.sh"
}

# Print the first Python from 3.11 on that can create a venv.
find_base_python() {
  local name base incomplete=""
  for name in $VENV_PYTHONS "3" ""; do
    base="$(type -P "python$name" || true)"
    if [ -z "$base" ] || ! is_recent "$base"; then continue; fi
    if "$base" -I -c 'import ensurepip, venv' >/dev/null 2>&1; then echo "$base" && return; fi
    incomplete="$base"
  done
  if [ -n "$incomplete" ]; then
    name="$("$incomplete" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
    fail "$incomplete has no ensurepip and can't create a venv: sudo apt install $name-venv (Debian, Ubuntu), or bash 00_setup.sh"
  fi
  fail "found neither conda nor Python 3.11 or newer: bash 00_setup.sh installs conda"
}

# Set `python` and `activate`. conda comes first, but a complete .venv is not installed a second time.
find_environment() {
  local conda=""
  if ! conda="$(bash 00_setup.sh --print_conda)"; then
    use_venv
  elif [ -z "$(conda_env_dir "$conda")" ] && grep -qs ' requirements.txt$' ".venv/$STAMP"; then
    echo "Using the complete .venv (to move to conda: rm -r .venv, then run this again)."
    use_venv
  else
    use_conda "$conda"
  fi
}

# --- The packages ------------------------------------------------------------------------------------------------

# Print what the stamp of a complete installation contains.
describe_setup() {
  echo "torch_index $torch_index"
  cksum "${requirements[@]}"
}

# Set `torch_index`: where PyTorch comes from.
choose_index() {
  local installed_index=""
  if [ -f "$stamp" ]; then installed_index="$(sed -n 's|^torch_index ||p' "$stamp")"; fi
  torch_index="${wanted_index:-${installed_index:-default}}"
  if [ "$torch_index" = "$installed_index" ] || [ "$torch_index" = default ]; then return; fi
  if ! run_python -m pip index versions torch --index-url "$torch_index" --timeout "$TIMEOUT_S" --retries 1 >/dev/null 2>&1; then
    torch_index="${installed_index:-default}"
    echo "$wanted_index can't be reached or has no torch for this Python: using --torch_index $torch_index instead."
  fi
}

pip_install() {
  # People set these two to keep pip out of their other Pythons.
  PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0 run_python -m pip install --disable-pip-version-check --no-input "$@" \
    || fail "pip can't install the packages (see its message above): check the network and the disk space (7 GB; 2 GB with --cpu), then run this again"
}

install_packages() {
  if [ "$(run_python -c 'import platform; print(platform.system(), platform.machine())')" = "Darwin x86_64" ]; then
    fail "$python is for Intel Macs, and PyTorch has no packages for them: on an ARM Mac use a Python for ARM (bash 00_setup.sh)"
  fi
  # While packages change, the stamp names no requirements file: the next run resumes an interrupted one.
  # pip does not replace a different build of the same version, so that must go first.
  if ! grep -qsxF "torch_index $torch_index" "$stamp"; then
    rm -f -- "$stamp"
    run_python -m pip uninstall -qq -y torch torchaudio
  fi
  echo "torch_index $torch_index" >"$stamp"

  echo "Installing ${requirements[*]} (some minutes the first time) ..."
  if [ "$torch_index" != default ]; then
    # shellcheck disable=SC2046 # one word for each pin
    pip_install --index-url "$torch_index" $(grep -E '^(torch|torchaudio)==' requirements.txt)
  fi
  pip_install "${requirements[@]/#/--requirement=}"
  echo
  check_packages
  describe_setup >"$stamp.tmp"
  mv -f -- "$stamp.tmp" "$stamp"
}

# Import every pinned package and print its version, then Python and the device. Exit status 2: a package is broken.
check_packages() {
  run_python - <<'PYTHON'
import importlib, importlib.metadata, platform, re, sys

broken = False
for name, pin in re.findall(r"^([\w.-]+)==(\S+)", open("requirements.txt", encoding="utf-8").read(), re.MULTILINE):
    try:
        print(f"{name:<16} {importlib.metadata.version(name)}", flush=True)
        if name != "sounddevice":  # it needs PortAudio, which only sound devices need
            importlib.import_module({"scikit-learn": "sklearn"}.get(name, name))
    except Exception as error:  # a broken binary raises anything: OSError, RuntimeError, SystemError ...
        broken = True
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = f"{sys.executable} -m pip install --force-reinstall --no-deps {name}=={pin}"
        print(f"error: {name} is missing or broken ({reason}); fix it with: {fix}", file=sys.stderr)
print(f"{'Python':<16} {platform.python_version()} ({sys.executable})")
if broken:
    sys.exit(2)
import torch

device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
print(f"{'device':<16} {device}")
PYTHON
}

main() {
  parse_options "$@"
  cd -- "$project_dir"
  exec 3>&1
  if [ "$print_python" = 1 ]; then exec 1>&2; fi
  trap 'echo "Stopped. To resume: bash 01_setup.sh" >&2; exit 130' INT

  if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$project_dir/.venv" ]; then
    echo "The active environment $VIRTUAL_ENV is left as it is."
  elif [ -n "${CONDA_DEFAULT_ENV:-}" ] && [ "$CONDA_DEFAULT_ENV" != base ] && [ "$CONDA_DEFAULT_ENV" != "$ENV_NAME" ]; then
    echo "The active environment $CONDA_DEFAULT_ENV is left as it is."
  fi
  find_environment
  stamp="$(run_python -c 'import sys; print(sys.prefix)')/$STAMP"
  # Once the environment has the tools of --dev, they are kept up to date.
  if [ "$is_dev" = 1 ] || grep -qs ' requirements-dev.txt$' "$stamp"; then requirements+=(requirements-dev.txt); fi
  choose_index
  if [ ! -f "$stamp" ] || [ "$(describe_setup)" != "$(cat "$stamp")" ]; then
    install_packages
  elif [ "$print_python" = 0 ]; then
    echo "Nothing has changed since the last installation. Checking it ..."
    check_packages 2>/dev/null || install_packages
  fi
  if [ "$print_python" = 1 ]; then
    echo "$python" >&3
  else
    printf '\nReady. Next: bash 02_demo.sh. For single steps, activate the environment: %s\n' "$activate"
  fi
}

main "$@"
