#!/usr/bin/env bash
# What only a GPU can show, one command each; without a GPU the same commands run small, on the CPU.
#
#     on_gpu.sh head     the head's tests on the device, and its benchmark at the widths of Qwen2.5
#     on_gpu.sh learn    SA-AH-GRPO against GRPO in one learner, for each of our heads
#     on_gpu.sh train    the embedded default end to end, and steps by turns with TRL
#     on_gpu.sh throughput   steps by turns with TRL at the shapes of Qwen2.5, within 40 GiB, and 4 and 16 x the batch
#
# head needs torch, triton and rich alone; learn no Ray and no vLLM; the others the whole environment. PYTHON names the
# interpreter (default: .venv's), HEAD_ROWS the scored tokens of the head's benchmark.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    rows=${HEAD_ROWS:-4000} widths="2048 1536" vocab=151936 backends="triton torch"
    models=(--model-shape=qwen2.5-1.5b --model-shape=qwen2.5-3b) work="--run.gpu_memory_gib 40 --actor.max_tokens 512 --batches 4 16 --steps 5"
else
    rows=${HEAD_ROWS:-64} widths="576" vocab=49152 backends="torch"
    models=("") work="--actor.max_tokens 16 --batches 2 --steps 1"
fi

case ${1:-} in
head)
    status=0
    if $python -c 'import pytest' 2>/dev/null; then
        $python -m pytest tests/learner/head || status=$?
    else
        echo "pytest is not installed: the head's tests were not run" >&2
    fi
    for width in $widths; do
        for temperature in 1.0 0.6; do
            $python launch/benchmark.py head --rows "$rows" --hidden "$width" --vocab $vocab --temperature $temperature
        done
    done
    exit $status
    ;;
learn)
    for backend in $backends; do
        $python launch/benchmark.py learn --learner.head_backend "$backend" "${@:2}"
    done
    ;;
train)
    folder=$(mktemp -d)
    $python launch/run.py --run.dir "$folder/default" "${@:2}"
    $python launch/benchmark.py train --peer trl --steps 3 "${@:2}"
    ;;
throughput)
    $python -m pytest tests/learner/policy/test_attention.py
    for model in "${models[@]}"; do  # an option of the benchmark, or none: the small model
        $python launch/benchmark.py train --peer trl $work --out "runs/throughput${model##*=}" $model "${@:2}"
    done
    ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
