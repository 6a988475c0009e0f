#!/usr/bin/env bash
# Tests and measures the kernels and steps on a GPU, without vLLM, in at most eight minutes, and then, where vLLM can be
# imported, whole engines in at most four. Called by `make gpu-check`.
#
#     benchmarks/gpu/check.sh [RESULTS]
#
# A stage that fails or exceeds its time limit does not keep the next from running. RESULTS (default: gpu-check) gets
# each stage's log and JSON results, and `summary.txt` with the exit statuses; 124 means that a time limit was exceeded.
# STAGES chooses some of them (default: "tests kernel_check step_cost engine_check"). PYTHON names the interpreter, which
# needs torch, triton, transformers, numba, pytest and hypothesis. Wheels in `wheels/`, as `make gpu-bundle` packs them,
# are unpacked into RESULTS/site and used from there.
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
    [[ " ${STAGES:-$name} " == *" $name "* ]] || return
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
if compgen -G 'wheels/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$results/site" wheels/*.whl
fi
[[ -d $results/site ]] && export PYTHONPATH="$results/site${PYTHONPATH:+:$PYTHONPATH}"
# Most of the tests' time is Triton's compiler, which runs on one core for each kernel.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(--numprocesses 8)
tests=(tests/ops tests/algorithm tests/training/test_evaluate.py)
stage tests 150 -m pytest -m gpu -p no:cacheprovider "${parallel[@]}" "${tests[@]}"
stage kernel_check 170 -m benchmarks.gpu.kernel_check --seconds 140 --json "$results/kernel_check.json"
stage step_cost 140 -m benchmarks.gpu.step_cost --json "$results/step_cost.json"
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
    stage engine_check 240 -m benchmarks.gpu.engine_check "$results/engine_check"
fi
exit "$failed"
