#!/usr/bin/env bash
# Step 0: find conda, or install Miniforge (a free conda) if there is none.
#
#     bash 00_setup.sh                  # if conda is there: print its path and change nothing
#     bash 00_setup.sh --print_conda    # print the path of conda, or nothing (exit status 1); never install
#
# Looks on PATH, at $CONDA_EXE and in the usual folders. Miniforge (120 MB; Linux and macOS, x86-64 and ARM) is compared
# with its published SHA-256 before it runs. It needs no root and goes to ~/miniforge3. This step is optional: without
# conda, 01_setup.sh uses any installed Python 3.11 or newer.
#
# Environment variables, all optional:
#     MINIFORGE_DIR        the folder to install to (default: ~/miniforge3)
#     MINIFORGE_VERSION    a release such as 26.7.2-0 (default: the newest)
#     MINIFORGE_URL        a mirror of https://github.com/conda-forge/miniforge/releases
#
# Exit status 0: conda is there. 2: it is not; one line says why and what to do.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh knows no pipefail
set -euo pipefail

MINIFORGE_DIR="${MINIFORGE_DIR:-$HOME/miniforge3}"
MINIFORGE_URL="${MINIFORGE_URL:-https://github.com/conda-forge/miniforge/releases}"
RELEASE='^[0-9]+(\.[0-9]+)+-[0-9]+$' # as in 26.7.2-0
TIMEOUT_S=20                        # for a server's first answer

scratch=""        # folder of the download
unfinished_dir="" # an installation in progress

fail() {
  echo "error: $*" >&2
  exit 2
}

# However the script ends, it leaves no partial download and no partial installation.
clean_up() {
  if [ -n "$scratch" ]; then rm -rf -- "$scratch"; fi
  if [ -n "$unfinished_dir" ]; then rm -rf -- "$unfinished_dir"; fi
}

works() {
  [ -x "$1" ] && "$1" --version >/dev/null 2>&1
}

# Print the first conda that runs.
find_conda() {
  local conda
  for conda in "$(type -P conda || true)" "${CONDA_EXE:-}" "$MINIFORGE_DIR/bin/conda" \
    "$HOME"/{,opt/}{miniforge3,mambaforge,miniconda3,anaconda3,miniforge,miniconda,anaconda}/bin/conda \
    /opt/{conda,miniforge3,mambaforge,miniconda3,anaconda3}/bin/conda \
    /opt/homebrew/{Caskroom/miniforge/base,Caskroom/miniconda/base,anaconda3}/bin/conda \
    /usr/local/{Caskroom/miniforge/base,Caskroom/miniconda/base,anaconda3}/bin/conda; do
    if works "$conda"; then echo "$conda" && return; fi
  done
  return 1
}

# Print the system as in Miniforge's file names: Linux-x86_64, Linux-aarch64, MacOSX-x86_64 or MacOSX-arm64.
system_name() {
  local system processor
  system="$(uname -s)"
  processor="$(uname -m)"
  # A terminal under Rosetta calls an ARM Mac x86_64, but PyTorch has no packages for Intel Macs.
  if [ "$system" = Darwin ] && [ "$(sysctl -n hw.optional.arm64 2>/dev/null)" = 1 ]; then processor=arm64; fi
  case "$system $processor" in
    "Linux x86_64" | "Linux aarch64") echo "Linux-$processor" ;;
    "Darwin x86_64" | "Darwin arm64") echo "MacOSX-$processor" ;;
    *) fail "Miniforge has no installer for $system on $processor: install conda or Python 3.11 yourself, then: bash 01_setup.sh" ;;
  esac
}

# download URL FILE: prints the URL after redirects. What curl or wget says goes to a log, so that a failure is one line.
download() {
  local log="$scratch/log"
  if type -P curl >/dev/null; then
    curl -fsSL --retry 3 --connect-timeout "$TIMEOUT_S" -o "$2" -w '%{url_effective}' "$1" 2>"$log"
  else
    wget -nv --tries=3 --timeout="$TIMEOUT_S" -O "$2" "$1" 2>"$log" && sed -n 's/.*URL: *\([^ ]*\) .*/\1/p' "$log"
  fi || fail "can't download $1 ($(grep -v '^ *$' "$log" | tail -n 1)): check the network or proxy and run this again;" \
    "without conda, bash 01_setup.sh uses an installed Python 3.11 or newer"
}

# Download the installer to $scratch/installer.sh and compare it with its published checksum.
download_installer() {
  local url="${MINIFORGE_URL%/}" version="${MINIFORGE_VERSION:-}" latest checksum="sha256sum" actual published
  # Installer and checksum must come from one release: "latest" may change between two downloads.
  if [ -z "$version" ]; then
    latest="$(download "$url/latest" "$scratch/page")"
    version="${latest##*/}"
  fi
  # The sign-in page of a hotel or a company answers every address.
  if ! [[ "$version" =~ $RELEASE ]]; then
    fail "'$version' is no release of Miniforge: check the network, or set MINIFORGE_VERSION (for example to 26.7.2-0)"
  fi
  url="$url/download/$version/Miniforge3-$version-$1.sh"
  echo "No conda found. Downloading ${url##*/} (120 MB, may take some minutes) ..."
  download "$url.sha256" "$scratch/sha256" >/dev/null
  download "$url" "$scratch/installer.sh" >/dev/null
  if ! type -P sha256sum >/dev/null; then checksum="shasum -a 256"; fi
  published="$(head -n 1 "$scratch/sha256" | cut -d ' ' -f 1)"
  actual="$($checksum "$scratch/installer.sh" | cut -d ' ' -f 1)"
  if [ "$actual" != "$published" ]; then
    fail "${url##*/} has SHA-256 $actual, published is '$published': it was not run; try again"
  fi
}

install_miniforge() {
  local system shell_name
  case "$MINIFORGE_DIR" in /*) ;; *) MINIFORGE_DIR="$PWD/$MINIFORGE_DIR" ;; esac
  if [ -e "$MINIFORGE_DIR" ]; then
    fail "$MINIFORGE_DIR exists but has no conda that runs: remove it, or set MINIFORGE_DIR to a different folder"
  fi
  if ! type -P curl >/dev/null && ! type -P wget >/dev/null; then
    fail "neither curl nor wget is installed: install one, or conda itself (https://conda-forge.org/download/)"
  fi
  system="$(system_name)"
  scratch="$(mktemp -d)"
  download_installer "$system"

  echo "Its SHA-256 is correct. Installing to $MINIFORGE_DIR ..."
  unfinished_dir="$MINIFORGE_DIR"
  bash "$scratch/installer.sh" -b -p "$MINIFORGE_DIR" >"$scratch/log" 2>&1 \
    || fail "the installer of Miniforge failed ($(tail -n 1 "$scratch/log")): it needs 1 GB of disk space"
  works "$MINIFORGE_DIR/bin/conda" || fail "Miniforge was installed to $MINIFORGE_DIR, but its conda does not run"
  unfinished_dir=""

  shell_name="$(basename -- "${SHELL:-bash}")"
  if "$MINIFORGE_DIR/bin/conda" init "$shell_name" >"$scratch/log" 2>&1; then
    echo "Miniforge is installed. Open a new terminal to have conda in $shell_name."
  else
    echo "Miniforge is installed, but not set up for $shell_name: see $MINIFORGE_DIR/bin/conda init --help"
  fi
}

main() {
  local conda
  case "${1:-}" in
    "") ;;
    --print_conda) find_conda && exit 0 || exit 1 ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) fail "unknown option $1: see bash 00_setup.sh --help" ;;
  esac
  if conda="$(find_conda)"; then
    echo "Found conda: $conda ($("$conda" --version)). Nothing to do."
  else
    trap clean_up EXIT
    trap 'exit 130' INT TERM
    install_miniforge
  fi
  echo "Next: bash 01_setup.sh"
}

main "$@"
