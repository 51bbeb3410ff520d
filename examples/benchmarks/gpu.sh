#!/usr/bin/env bash
# Runs tests/gpu on one GPU, then measures training there: tokens/s, share of the card's measured
# matmul rate and memory, for models of 0.5B to 8B in bf16 and rows of 4k to 32k tokens, with
# Megatron's local layers and Transformer Engine's, and by TRL's DPOTrainer, with whatever of
# Transformer Engine, vLLM, Apex, TRL, FlashAttention and Liger the interpreter has. Ends within
# 8 minutes, the table last.
#
#   bash examples/benchmarks/gpu.sh
#   PYTHON=python3.12 bash ...      another interpreter (default: python3)
#   WHEELS=DIR bash ...             wheels to use beside what is installed (default: wheels/ beside
#                                   this file); they go to a temporary directory, nothing else does
#   GPU_BENCH_SECONDS=300 bash ...  another limit for all of it (default: 450)
#   GPU_BENCH_JSON=FILE bash ...    where numbers go (default: runs/benchmarks/gpu.json)
#   GPU_BENCH_TINY=1 bash ...       a rehearsal with tiny models, which runs without a GPU
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$here/../.." && pwd -P)
python=${PYTHON:-python3}
wheels=${WHEELS:-$here/wheels}
limit=${GPU_BENCH_SECONDS:-450}
json=${GPU_BENCH_JSON:-$root/runs/benchmarks/gpu.json}
tiny=${GPU_BENCH_TINY:-}

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    [[ $# -eq 0 ]] || printf '  %s\n' "$@" >&2
    exit 2
}

work=$(mktemp -d) || fail "no temporary directory"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl ||
        fail "the wheels in $wheels cannot be installed" "remedy: one version of each, for this Python"
    export PYTHONPATH=$work/site:$PYTHONPATH
fi
export PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # the peer would spread over all that it sees
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

missing=$("$python" - <<'EOF'
import importlib.util
wanted = ["torch", "megatron", "omegaconf", "numpy", "pyarrow", "safetensors", "transformers", "pytest"]
print(*[name for name in wanted if importlib.util.find_spec(name) is None])
EOF
) || fail "$python does not run"
[[ -z $missing ]] || fail "$python has no $missing" \
    "remedy: name an interpreter that has them (PYTHON=...), or put their wheels into $wheels"
if [[ -z $tiny ]]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "no GPU" "remedy: GPU_BENCH_TINY=1 rehearses the script without one"
fi

cd "$root" || exit
tests=0
timeout -k 10 $((limit * 2 / 5)) "$python" -m pytest -q -p no:cacheprovider -W ignore --color=no tests/gpu || tests=$?
[[ $tests -ne 124 ]] || echo "tests/gpu: ended after $((limit * 2 / 5)) s"
"$python" -m examples.benchmarks.gpu --seconds $((limit - SECONDS)) --json "$json" ${tiny:+--tiny}
measured=$?
[[ $tests -eq 0 ]] || echo "tests/gpu: FAILED"
exit $((tests ? tests : measured))
