#!/usr/bin/env bash
# What only a GPU can show: one command for each, within 10 minutes. Without a GPU the same runs small, on the CPU.
#
#     on_gpu.sh check                    the machine, the plan, the engine with its graphs, a verified start, three steps
#     on_gpu.sh head                     the kernels' and the head's tests, and the head's benchmark at Qwen2.5's widths
#     on_gpu.sh learn                    SA-AH-GRPO against GRPO in one learner, for each of our heads
#     on_gpu.sh train                    the default run, and steps interleaved with TRL's
#     on_gpu.sh throughput SHAPE [TIMES] steps at qwen2.5-1.5b or qwen2.5-3b and TIMES the paper's batch, within 40 GiB
#     on_gpu.sh profile SHAPE            a step's kernels by time
#     on_gpu.sh overlap SHAPE            sampling beside learning (run.max_staleness 1), with MPS and without, against 0
#
# Each part's output is a file in $OUT (default runs/on_gpu). A part whose file exists is not run again, so that an
# interrupted command resumes. head and learn need torch, triton, rich, no vLLM and no Ray. TRL runs if it is installed:
# beside our side if the GPU has 70 GiB, else after it. PYTHON names the interpreter (default: that of .venv).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/on_gpu}
export HF_HUB_OFFLINE=1
mkdir -p "$out"

has() { $python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

part() { # NAME COMMAND...: run it unless its output exists
    local file="$out/$1.txt"
    shift
    if [ -e "$file" ]; then
        echo "== $file exists; delete it to run this part again"
        return
    fi
    echo "== $*"
    "$@" 2>&1 | tee "$file.unfinished"
    mv "$file.unfinished" "$file"
}

run() { # NAME OPTIONS...: a run from its beginning
    rm -rf "$out/run-$1"
    $python launch/run.py --run.dir "$out/run-$1" "${@:2}"
    $python - "$out/run-$1/metrics.jsonl" <<'PYTHON'
import json, sys
names = "time/rollout_seconds time/learn_seconds time/publish_seconds time/step_seconds actor_learner_kl memory/peak_bytes"
for line in open(sys.argv[1]):
    step = json.loads(line)
    print("step", step["step"], *(f"{name} {step[name]:.6g}" for name in names.split()))
PYTHON
}

task=()
if ! has reasoning_gym; then # sums in GSM8K's form
    mkdir -p "$out/data"
    $python - "$out/data" <<'PYTHON'
import json, sys
for split, first in (("train", 10), ("test", 50)):
    with open(f"{sys.argv[1]}/{split}.jsonl", "w") as file:
        for n in range(first, first + 40):
            question = f"Tom has {n} apples and buys {n % 7 + 2} more. How many apples has he now?"
            print(json.dumps({"question": question, "answer": f"#### {n + n % 7 + 2}"}), file=file)
PYTHON
    task=(--task.name gsm8k --task.data "$out/data" --task.num_train 40 --task.num_eval 8)
fi

gib=$($python -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30 if torch.cuda.is_available() else 0)')
peer=()
if has trl; then
    peer=(--peer trl)
    if [ "$gib" -gt 0 ] && [ "$gib" -lt 70 ]; then peer+=(--peer-after); fi
fi
if [ "$gib" -gt 0 ]; then
    rows=4000 widths="2048 1536" vocab=151936 backends="triton torch" steps=5
    work=(--run.gpu_memory_gib "$((gib < 40 ? gib : 40))" --actor.max_tokens 512)
    shape=(--model-shape "${2:-qwen2.5-1.5b}")
else
    rows=64 widths=576 vocab=49152 backends=torch steps=1
    work=(--actor.max_tokens 16)
    shape=()
fi

case ${1:-} in
check)
    part machine $python launch/planning/checks.py
    part plan $python launch/run.py --dry-run --run.dir "$out/none" "${task[@]}"
    part steps run check --run.steps 3 --run.evaluate_every 0 "${task[@]}"
    ;;
head)
    if has pytest; then part head-tests $python -m pytest tests/learner/head tests/learner/policy/test_attention.py; fi
    for width in $widths; do
        for temperature in 1.0 0.6; do
            part "head-$width-$temperature" $python launch/benchmark.py head \
                --rows $rows --hidden "$width" --vocab $vocab --temperature $temperature
        done
    done
    ;;
learn)
    for backend in $backends; do
        part "learn-$backend" $python launch/benchmark.py learn --learner.head_backend "$backend" "${@:2}"
    done
    ;;
train)
    part train-default run default "${task[@]}" "${@:2}"
    part train-steps $python launch/benchmark.py train "${peer[@]}" --steps 3 "${task[@]}" "${@:2}"
    ;;
throughput)
    times=${3:-1}
    part "throughput-${2:-small}-x$times" $python launch/benchmark.py train "${peer[@]}" --steps $steps "${shape[@]}" \
        "${work[@]}" --run.prompts_per_step $((4 * times)) "${task[@]}"
    ;;
profile)
    part "profile-${2:-small}" $python launch/benchmark.py profile "${shape[@]}" "${work[@]}"
    ;;
overlap)
    folder=$out/${2:-small}
    if [ "$gib" -gt 0 ]; then
        if [ ! -e "$folder" ]; then
            $python -c "import pathlib, sys; from launch.planning.model_folder import random_weights as made; made(sys.argv[1], pathlib.Path(sys.argv[2]))" "${2:-qwen2.5-1.5b}" "$folder"
        fi
        work+=(--model.path "$folder" --model.max_length 1024)
    fi
    work+=(--run.steps 6 --run.evaluate_every 0 --actor.fixed_length "${task[@]}")
    part overlap-0 run overlap-0 "${work[@]}"
    part overlap-1 run overlap-1 --run.max_staleness 1 "${work[@]}"
    if command -v nvidia-cuda-mps-control >/dev/null; then
        export CUDA_MPS_PIPE_DIRECTORY=$PWD/$out/mps CUDA_MPS_LOG_DIRECTORY=$PWD/$out/mps
        mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
        nvidia-cuda-mps-control -d
        trap 'echo quit | nvidia-cuda-mps-control' EXIT
        part overlap-1-mps run overlap-1-mps --run.max_staleness 1 "${work[@]}"
    fi
    ;;
*)
    sed -n '2,14p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
    ;;
esac
