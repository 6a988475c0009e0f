"""Are the GPU kernels right, and how far are they from the chip's limits? Needs torch and triton only.

    python -m benchmarks.gpu.kernel_check [--json PATH] [--seconds N] [--tune]

Correctness against the plain versions in float64 comes first, for the kernels that are timed; `tests/ops/test_gpu.py`
covers all dtypes and head sizes. Then tree attention (Llama-3-8B's heads: 32 query, 8 key-value, size 128, bfloat16,
blocks of 16) is timed, replayed from a CUDA graph with a cold L2 cache, against

* floor: the bytes it must move at the device's copy bandwidth, or the arithmetic it must do at the rate of a large
  matrix product, whichever takes longer, both measured here;
* the other design, two passes: dense attention over a contiguous context by torch's FlashAttention or cuDNN, then the
  step's own keys and a merge (flash+tail, cudnn+tail); and the first of the two passes alone (flash ctx);
* SDPA with an explicit mask over keys and values that were gathered before (sdpa) or are gathered in the timed call;
* xformers' `tree_attention` over a contiguous context, what the engine does with attention_kernel="xformers" (paged),
  and FlashAttention (causal, as it cannot mask a tree), where they are installed.

At the end it says which design is faster, and where. `--tune` measures other launch parameters instead; those that win
belong into vllm_ctc_spec/ops/triton/launch.py. With `--seconds` it begins no further measurement after that time. PATH
is rewritten after each measurement, so that a run that is cut off leaves its results.
Exit status: 1 if a kernel is wrong, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu import two_pass
from benchmarks.gpu.attention_steps import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, Step, make_step
from benchmarks.gpu.baselines import BASELINES, paged_xformers
from vllm_ctc_spec.ops import reference
from vllm_ctc_spec.ops.triton.attention import tree_attention
from vllm_ctc_spec.ops.triton.launch import Launch, candidates
from vllm_ctc_spec.ops.triton.move import CacheTable, move_slots

BATCHES = (1, 8, 32, 64)
CONTEXTS = (1024, 8192, 32768)
NODES = (8, 31, 32, 63)
TUNED = ((1, 32768, 31), (1, 1024, 31), (8, 8192, 8), (8, 8192, 31), (8, 8192, 63), (64, 8192, 31))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TWO_PASSES = ("flash+tail", "cudnn+tail")

Row = dict[str, Any]


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a replay, the L2 cache emptied before each."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=40, return_mode="median")


def device_limits() -> dict[str, float]:
    """Copy bandwidth in bytes/s and bfloat16 matrix rate in operations/s, as torch reaches them."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / milliseconds(lambda: left @ right) * 1e3
    return {"copy_bytes_per_s": bandwidth, "matrix_operations_per_s": rate}


def run(step: Step, launch: Launch) -> torch.Tensor:
    batch = dataclasses.replace(step.batch, launch=launch)
    own, out = (step.query, step.key, step.value), torch.empty_like(step.query)
    return tree_attention(*own, step.kv_cache, batch, SCALE, out, k_scale=step.k_scale, v_scale=step.v_scale)


def exact_attention(step: Step) -> torch.Tensor:
    """By the plain version, in float64."""
    own = step.query.double(), step.key, step.value
    out = torch.zeros_like(own[0])
    scales = {"k_scale": step.k_scale, "v_scale": step.v_scale}
    return reference.tree_attention(*own, step.kv_cache, step.batch, SCALE, out, **scales)


def verdict(case: str, found: torch.Tensor, exact: torch.Tensor) -> Row:
    error = (found.double() - exact).abs().max().item()
    return {"case": case, "error": error, "ok": error <= TOLERANCE[found.dtype]}


def check_attention() -> Iterator[Row]:
    """Requests of different sizes, with the planned launch and with three splits."""
    cache_dtypes = [torch.bfloat16]
    if torch.cuda.get_device_capability() >= (8, 9):
        cache_dtypes.append(torch.float8_e4m3fn)
    for cache_dtype in cache_dtypes:
        for num_rows, contexts in (((64, 1, 0, 33), (1000, 4097, 50, 0)), ((1, 1), (77, 3000))):
            step = make_step(num_rows, contexts, cache_dtype=cache_dtype)
            exact = exact_attention(step)
            for num_splits in {step.batch.launch.num_splits, 3}:
                launch = dataclasses.replace(step.batch.launch, num_splits=num_splits)
                yield verdict(f"{cache_dtype} rows={num_rows} S={num_splits}", run(step, launch), exact)


def check_others() -> Iterator[Row]:
    """The two-pass designs, and attention_kernel="xformers" where it is installed."""
    for num_rows, contexts in (((33,) * 3, (700,) * 3), ((9,), (5000,))):
        step = make_step(num_rows, contexts)
        for dense in (two_pass.flash, two_pass.cudnn):
            name = f"{dense.__name__}+tail"
            try:
                found = two_pass.two_pass(step, dense)().flatten(0, 1)
            except RuntimeError as error:
                # A library that does not run here; its column of the table says so, too.
                print(f"{name} failed: {str(error).splitlines()[0]}")
                continue
            yield verdict(f"{name} rows={num_rows}", found, exact_attention(step))
    for dtype in (torch.float16, torch.bfloat16):
        for num_rows, contexts in (((64, 1, 33), (1000, 50, 4097)), ((9,) * 5, (77, 3000, 1, 16, 17))):
            step = make_step(num_rows, contexts, dtype)
            try:
                call = paged_xformers(step)
            except ImportError:
                return
            yield verdict(f"xformers {dtype} rows={num_rows}", call(), exact_attention(step))


def check_move() -> tuple[Row, dict[str, float]]:
    """Correctness and time of a move of 6 places for 64 requests in 32 layers."""
    shape = (64 * 4, NUM_KV_HEADS, 16, 2 * HEAD_SIZE)
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(32)]
    nodes = torch.stack([torch.randperm(62, device="cuda")[:8].sort().values + 1 for _ in range(64)])
    starts = torch.arange(64, device="cuda")[:, None] * 64
    sources, targets = starts + nodes, starts + torch.arange(1, 9, device="cuda")
    sources[:, 6:] = -1
    expected = [cache.clone() for cache in caches]
    reference.move_slots(expected, sources, targets)
    table = CacheTable.of(caches)
    move_slots(table, sources, targets)
    wrong = max((found - wanted).abs().max().item() for found, wanted in zip(caches, expected))
    ms = milliseconds(lambda: move_slots(table, sources, targets))
    moved = int((sources >= 0).sum()) * len(caches) * 2 * caches[0].stride(1) // 16 * NUM_KV_HEADS * 2
    return {"case": "K/V move", "error": wrong, "ok": wrong == 0}, {"ms": ms, "bytes": moved}


def floor_ms(step: Step, limits: dict[str, float]) -> float:
    rows, context = len(step.query), int(step.batch.context_lens.sum())
    per_row = context // len(step.batch.context_lens) + step.batch.max_rows
    num_bytes = 2 * HEAD_SIZE * 2 * (NUM_KV_HEADS * (context + rows) + NUM_HEADS * rows)
    operations = 4 * rows * NUM_HEADS * HEAD_SIZE * per_row
    return 1e3 * max(num_bytes / limits["copy_bytes_per_s"], operations / limits["matrix_operations_per_s"])


def time_attention(limits: dict[str, float]) -> Iterator[Row]:
    for num_requests, context in product(BATCHES, CONTEXTS):
        cache_bytes = num_requests * context * NUM_KV_HEADS * 2 * HEAD_SIZE * 2
        if 3 * cache_bytes > torch.cuda.mem_get_info()[0]:
            print(f"left out for want of memory: batch {num_requests}, context {context}")
            continue
        for nodes in NODES:
            step = make_step((nodes + 1,) * num_requests, (context,) * num_requests)
            row = {"batch": num_requests, "context": context, "nodes": nodes, "floor": floor_ms(step, limits)}
            row["ours"] = milliseconds(lambda step=step: run(step, step.batch.launch))
            row["launch"] = dataclasses.asdict(step.batch.launch)
            for name, prepare in BASELINES.items():
                row[name] = time_or_none(name, lambda step=step, prepare=prepare: prepare(step))
            yield row


FAILED: set[str] = set()


def time_or_none(name: str, prepare: Callable[[], Callable[[], Any]]) -> float | None:
    """Milliseconds; None where it is not installed or fails for this shape. The first failure of a name is printed."""
    try:
        return milliseconds(prepare())
    except ImportError:
        return None
    except Exception as error:
        if name not in FAILED:
            print(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        FAILED.add(name)
        return None


def tune(limits: dict[str, float]) -> Iterator[Row]:
    """The candidates for each shape of TUNED, best first."""
    for num_requests, context, nodes in TUNED:
        step = make_step((nodes + 1,) * num_requests, (context,) * num_requests)
        planned = step.batch.launch
        timed = []
        for launch in candidates(planned):
            ms = time_or_none(str(launch), lambda step=step, launch=launch: lambda: run(step, launch))
            if ms is not None:
                timed.append({"ms": ms, "planned": launch == planned, **dataclasses.asdict(launch)})
        timed.sort(key=lambda row: row["ms"])
        floor = floor_ms(step, limits)
        print(f"batch {num_requests}, context {context}, nodes {nodes}: floor {floor:.3f} ms, planned {planned}")
        print(*(f"    {row}" for row in timed[:5]), sep="\n", flush=True)
        yield {"batch": num_requests, "context": context, "nodes": nodes, "floor": floor, "timed": timed}


def print_table(results: list[Row]) -> None:
    names = ["ours", *BASELINES]
    print(
        f"{'batch':>5} {'context':>7} {'nodes':>5} {'floor':>8} {'x floor':>7} " + " ".join(f"{n:>14}" for n in names)
    )
    for row in results:
        times = " ".join(f"{row[name]:>14.3f}" if row.get(name) is not None else f"{'-':>14}" for name in names)
        ratio = row["ours"] / row["floor"]
        print(f"{row['batch']:>5} {row['context']:>7} {row['nodes']:>5} {row['floor']:>8.3f} {ratio:>7.2f} {times}")


def design_verdict(results: list[Row]) -> str:
    """In how many shapes each design is the faster one, and the shapes in which two passes are."""
    lost = []
    for row in results:
        others = {name: row[name] for name in TWO_PASSES if row.get(name) is not None}
        best = min(others, key=others.__getitem__, default=None)
        if best is not None and others[best] < row["ours"]:
            ratio = row["ours"] / others[best]
            lost.append(
                f"  batch {row['batch']}, context {row['context']}, nodes {row['nodes']}: {best}, {ratio:.2f} x"
            )
    compared = sum(any(row.get(name) is not None for name in TWO_PASSES) for row in results)
    return "\n".join([f"one kernel is faster in {compared - len(lost)} of {compared} shapes; two passes in:", *lost])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no measurement after this time")
    parser.add_argument("--tune", action="store_true", help="measure other launch parameters instead of other kernels")
    options = parser.parse_args()
    started = time.monotonic()
    if not torch.cuda.is_available():
        print("kernel_check: torch sees no CUDA device; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    limits = device_limits()
    move_check, move_time = check_move()
    checks = [*check_attention(), *check_others(), move_check]
    wrong = [check for check in checks if not check["ok"]]
    device = torch.cuda.get_device_properties(0)
    results: list[Row] = []
    report = {"device": device.name, "torch": torch.__version__, "triton": triton.__version__, "limits": limits}
    report |= {"checks": checks, "move": move_time, "tuning" if options.tune else "times_ms": results}
    print(
        f"{device.name}, torch {torch.__version__}, triton {triton.__version__}: copy "
        f"{limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix {limits['matrix_operations_per_s'] / 1e12:.0f} TFLOP/s"
    )
    print(f"K/V move, 64 requests x 6 places x 32 layers: {move_time['ms']:.3f} ms")
    print(f"correctness: {len(checks) - len(wrong)} of {len(checks)} right", *wrong, sep="\n", flush=True)
    for row in tune(limits) if options.tune else time_attention(limits):
        results.append(row)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
        if time.monotonic() - started > options.seconds:
            print(f"stopped after {options.seconds:.0f} s; the remaining shapes were not measured")
            break
    if not options.tune:
        print_table(results)
        print(design_verdict(results))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
