#!/usr/bin/env bash
# Sets everything up and checks everything: ruff, mypy, import-linter, then the tests, which
# start real Megatron ranks and the real vLLM. Ends with pytest's summary; fails if anything did.
#
#   bash tests/run.sh                     all of it
#   bash tests/run.sh tests/unit -k loss  the same checks, then pytest with these arguments
#   bash tests/run.sh -m slow            the same checks, then sweeps that take minutes each
#   PYTHON=python3.12 bash ...            another interpreter for the installation
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/install.sh eval || exit
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

failed=()
check() {
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        echo "$name: ok"
    else
        printf '%s\n' "$output"
        echo "$name: FAILED"
        failed+=("$name")
    fi
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy nemo_spin
check "import-linter" lint-imports
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "whatever the tests say, this run fails: ${failed[*]}"
fi

pytest --color=no "$@"
status=$?
[[ $status -eq 0 && ${#failed[@]} -gt 0 ]] && status=1
exit $status
