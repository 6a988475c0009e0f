#!/usr/bin/env bash
# All that a GPU can say about this project without vLLM, in at most eight minutes; `make gpu-check` calls it.
#
#     benchmarks/gpu/check.sh [RESULTS]
#
# A stage that fails or takes too long does not keep the next from running. RESULTS (default: gpu-check) gets a log and
# what the stage measured as JSON, as each one ends, and `summary.txt` with their exit statuses; 124 is the time limit.
# PYTHON names the interpreter, which needs torch, triton, transformers, numba, pytest and hypothesis.
#
# Exit status: 1 if a stage failed, 2 without a CUDA device.
set -uo pipefail
results=$(realpath -m "${1:-gpu-check}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
failed=0

stage() {
    local name=$1 seconds=$2 status
    shift 2
    printf '==> %s (at most %s s)\n' "$name" "$seconds"
    timeout --kill-after=5 "$seconds" "$python" "$@" >"$results/$name.log" 2>&1
    status=$?
    tail -n 40 "$results/$name.log"
    printf '%s: exit status %s\n' "$name" "$status" | tee -a "$results/summary.txt"
    [[ $status == 0 ]] || failed=1
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu-check: torch sees no CUDA device, or $python has no torch. Run this on a machine with an NVIDIA GPU." >&2
    exit 2
fi
mkdir -p "$results"
: >"$results/summary.txt"
stage tests 150 -m pytest -m gpu -p no:cacheprovider tests/ops tests/algorithm tests/training/test_evaluate.py
stage kernel_check 170 -m benchmarks.gpu.kernel_check --json "$results/kernel_check.json"
stage step_cost 140 -m benchmarks.gpu.step_cost --json "$results/step_cost.json"
exit "$failed"
