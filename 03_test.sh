#!/usr/bin/env bash
# Lint and tests: what every change must pass.
#
#     bash 03_test.sh                       # everything
#     bash 03_test.sh -k predict            # arguments go to pytest (paths: from the project folder)
#
# Runs the set-up first if needed (bash 01_setup.sh --dev). Prints the output of ruff, shellcheck and pytest. Exit status
# 0: all of them pass.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh knows no pipefail
set -euo pipefail

project_dir="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

main() {
  local python shellcheck
  case "${1:-}" in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
  esac
  python="$(bash "$project_dir/01_setup.sh" --dev --print_python)"
  cd -- "$project_dir"

  echo "ruff ..."
  "$python" -sE -m ruff check .
  "$python" -sE -m ruff format --check .

  echo "shellcheck ..."
  shellcheck="$(dirname -- "$python")/shellcheck"
  if [ ! -x "$shellcheck" ]; then shellcheck="$(type -P shellcheck || true)"; fi
  if [ -n "$shellcheck" ]; then
    "$shellcheck" ./*.sh research/*.sh .ci/run
  else
    echo "skipped: pip has no shellcheck for this processor (Debian, Ubuntu: sudo apt install shellcheck)"
  fi

  echo "pytest ..."
  "$python" -sE -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

main "$@"
