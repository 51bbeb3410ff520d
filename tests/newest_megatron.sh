#!/usr/bin/env bash
# Runs the unit and the distributed tests with the newest megatron-core that pyproject.toml allows,
# on Python 3.12, in an environment of its own. It is not part of tests/run.sh because it takes
# 6 GB: there are releases of torch for which no index has a CPU build for this Python.
#
#   bash tests/newest_megatron.sh                          all of them
#   bash tests/newest_megatron.sh tests/distributed -k x   pytest with these arguments
#   PYTHON=... VENV=DIR bash ...                           interpreter (python3.12), place (.venv-newest)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv-newest}
list=conf/environments/train-cpu.txt
megatron=$(sed -n 's/^ *"\(megatron-core[^"]*\)",$/\1/p' pyproject.toml)
torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' "$list")
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

if [[ ! -e $venv/.installed ]]; then
    "${PYTHON:-python3.12}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -q "$torch"
    # The tested set, but for what belongs to torch or is asked for anew; no CUDA builds of anything else
    grep -vE '^#|^(torch|megatron-core|setuptools|aistore|cuda-bindings|cuda-pathfinder)==' "$list" >"$venv/others.txt"
    "$venv/bin/python" -m pip install -q --no-deps -r "$venv/others.txt" "$megatron"
    touch "$venv/.installed"
fi

[[ $# -gt 0 ]] || set -- tests/unit tests/distributed
"$venv/bin/python" -c 'from importlib.metadata import version as v; print("megatron-core", v("megatron-core"), "torch", v("torch"))'
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest --color=no "$@"
