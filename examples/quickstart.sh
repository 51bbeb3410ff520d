#!/usr/bin/env bash
# The whole of nemo_spin on a small task, on a machine without a GPU: installs, makes data and
# a model, fine-tunes it to theta_0, runs self-play at tensor_model_parallel_size=2, and prints
# how well every model answers, next to continued fine-tuning for as many optimizer steps.
# Interrupt it at any time: the same command goes on from there. Whatever is done stays done.
#
#   bash examples/quickstart.sh
#   QUICKSTART_DIR=/somewhere/else bash ...   results lie there (default: runs/quickstart)
#   QUICKSTART_SMALL=1 bash ...               one iteration on a handful of rows, to see it work
#   PYTHON=python3.12 bash ...                another interpreter for the installation
set -euo pipefail

called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
quickstart=examples/quickstart
if [[ -n ${QUICKSTART_SMALL:-} ]]; then
    sizes=(--pretrain 512 --train 128 --heldout 64)
    overrides=(spin.iterations=1)
    default=runs/quickstart-small
else
    sizes=()
    overrides=()
    default=runs/quickstart
fi
out=${QUICKSTART_DIR:-$PWD/$default}
[[ $out == /* ]] || out=$called_from/$out
export QUICKSTART_DIR=$out

step() { printf '\n== %s\n' "$*"; }
python() { .venv/bin/python "$@"; }
nemo_spin() {
    local command=$1 config=$2
    shift 2
    .venv/bin/nemo-spin "$command" --config "$quickstart/$config.yaml" "$@"
}

step "Environments"
bash examples/install.sh

step "Task, tokenizer and a model with random weights"
mkdir -p "$out"
if [[ ! -d $out/data ]]; then
    rm -rf "$out/.data"
    python $quickstart/task.py "$out/.data" "${sizes[@]}"
    mv "$out/.data" "$out/data"
fi
if [[ ! -d $out/random ]]; then
    rm -rf "$out/.random"
    python $quickstart/base_model.py "$out/data/train.jsonl" "$out/.random"
    mv "$out/.random" "$out/random"
fi
head -n 3 "$out/data/train.jsonl"

step "Base model: fine-tuning of random weights on unreliable text"
nemo_spin sft pretrain

step "theta_0: a short fine-tuning on the demonstrations"
nemo_spin sft sft

step "Self-play"
nemo_spin run quickstart "${overrides[@]}"

steps=$(python $quickstart/compare.py "$out" --steps)
# Evaluates model.path alone, into the run directory $1.
evaluate() {
    local run_dir=$1
    shift
    [[ -e $run_dir/iter_00/opponent_evaluation/manifest.json ]] && return
    nemo_spin prepare quickstart run_dir="$run_dir" "$@"
    nemo_spin evaluate quickstart run_dir="$run_dir" "$@"
}

steps=$(python $quickstart/compare.py "$out" --steps)
step "For comparison: fine-tuning of theta_0, continued for $steps steps"
nemo_spin sft continued_sft sft.max_steps="$steps"
evaluate "$out/continued_sft/evaluated" model.path="$out/continued_sft/model"

step "For comparison: theta_0 at half the temperature"
evaluate "$out/theta_0/evaluated_cooler" generation.temperature=0.5 evaluation.greedy=false

step "Results"
python $quickstart/compare.py "$out"
