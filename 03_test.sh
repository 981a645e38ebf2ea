#!/usr/bin/env bash
# Lint and tests: what a change must pass.
#
#     bash 03_test.sh                       # everything
#     bash 03_test.sh -k predict            # arguments go to pytest (paths: from the project folder)
#
# Does the set-up first if needed (bash 01_setup.sh --dev). Prints what ruff, shellcheck and pytest print; the exit status
# is 0 when all of them pass.
set -euo pipefail

project_dir="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

main() {
  local python shellcheck
  if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
  fi
  python="$(bash "$project_dir/01_setup.sh" --dev --print_python)"
  cd -- "$project_dir"

  echo "ruff ..."
  "$python" -sE -m ruff check .
  "$python" -sE -m ruff format --check .

  echo "shellcheck ..."
  shellcheck="$(dirname -- "$python")/shellcheck"
  if [ ! -x "$shellcheck" ]; then shellcheck="$(type -P shellcheck || true)"; fi
  if [ -n "$shellcheck" ]; then
    "$shellcheck" ./*.sh .ci/run
  else
    echo "left out: pip has no shellcheck for this processor (Debian, Ubuntu: sudo apt install shellcheck)"
  fi

  echo "pytest ..."
  "$python" -sE -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
}

main "$@"
