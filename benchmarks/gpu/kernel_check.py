"""Are the GPU kernels right, and how far are they from the chip's limits? Needs torch and triton only.

    python -m benchmarks.gpu.kernel_check [--json PATH] [--tune]

Correctness against the plain twins in float64 comes first. Then tree attention (Llama-3-8B's heads: 32 query, 8
key-value, size 128, bfloat16, blocks of 16) is timed, replayed from a CUDA graph with a cold L2 cache, against

* floor: the bytes it must move at the device's copy bandwidth, or the arithmetic it must do at the rate of a large
  matrix product, whichever takes longer, both measured here;
* SDPA with an explicit mask over keys and values that lie gathered, and with the gathering;
* xformers' `tree_attention` over a gathered cache, what the engine does with attention_kernel="xformers" (paged), and
  FlashAttention (causal: it knows no trees), where they are installed.

`--tune` tries other launch parameters instead; what wins belongs into vllm_ctc_spec/ops/triton/launch.py.
Exit status: 1 if a kernel is wrong, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.attention_steps import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, Step, make_step
from benchmarks.gpu.baselines import BASELINES, paged_xformers
from vllm_ctc_spec.ops import kv_move, reference
from vllm_ctc_spec.ops.triton.attention import tree_attention
from vllm_ctc_spec.ops.triton.launch import Launch

BATCHES = (1, 8, 32, 64)
CONTEXTS = (1024, 8192, 32768)
NODES = (8, 31, 32, 63)
TUNED = ((1, 32768, 31), (8, 8192, 8), (8, 8192, 31), (8, 8192, 63), (64, 8192, 31))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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


def run(step: Step, launch: Launch, softcap: float = 0.0) -> torch.Tensor:
    out = torch.empty_like(step.query)
    batch = dataclasses.replace(step.batch, launch=launch)
    own = step.query, step.key, step.value
    return tree_attention(*own, step.kv_cache, batch, SCALE, out, softcap, step.k_scale, step.v_scale)


def exact_attention(step: Step, softcap: float = 0.0) -> torch.Tensor:
    """By the plain twin, in float64."""
    own = step.query.double(), step.key, step.value
    out = torch.zeros_like(own[0])
    return reference.tree_attention(*own, step.kv_cache, step.batch, SCALE, out, softcap, step.k_scale, step.v_scale)


def verdict(case: str, found: torch.Tensor, exact: torch.Tensor) -> dict[str, Any]:
    error = (found.double() - exact).abs().max().item()
    return {"case": case, "error": error, "ok": error <= TOLERANCE[found.dtype]}


def check_attention() -> list[dict[str, Any]]:
    """Ragged steps of every dtype and head size, with the planned launch and with three splits."""
    rows = []
    dtypes = [(dtype, dtype) for dtype in TOLERANCE]
    if torch.cuda.get_device_capability() >= (8, 9):
        dtypes += [(torch.bfloat16, torch.float8_e4m3fn), (torch.float16, torch.float8_e5m2)]
    for dtype, cache_dtype in dtypes:
        for head_size in (64, 96, 128, 256):
            shape = {"dtype": dtype, "cache_dtype": cache_dtype, "head_size": head_size}
            for num_rows, contexts in (((64, 1, 0, 33), (1000, 4097, 50, 0)), ((1, 1), (77, 3000))):
                step = make_step(num_rows, contexts, **shape)
                for softcap in (0.0, 20.0):
                    exact = exact_attention(step, softcap)
                    for num_splits in {step.batch.launch.num_splits, 3}:
                        launch = dataclasses.replace(step.batch.launch, num_splits=num_splits)
                        case = f"{dtype} {cache_dtype} D={head_size} rows={num_rows} softcap={softcap} S={num_splits}"
                        rows.append(verdict(case, run(step, launch, softcap), exact))
    return rows


def check_xformers() -> list[dict[str, Any]]:
    """attention_kernel="xformers", whose requests all have rows and a context; nothing where it is not installed."""
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        for num_rows, contexts in (((64, 1, 33), (1000, 50, 4097)), ((9,) * 5, (77, 3000, 1, 16, 17))):
            step = make_step(num_rows, contexts, dtype)
            try:
                call = paged_xformers(step)
            except ImportError:
                return []
            rows.append(verdict(f"xformers {dtype} rows={num_rows}", call(), exact_attention(step)))
    return rows


def check_move() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Correctness and time of a move of 8 places for 64 requests in 32 layers."""
    shape = (64 * 4, NUM_KV_HEADS, 16, 2 * HEAD_SIZE)
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(32)]
    nodes = torch.stack([torch.randperm(62, device="cuda")[:8].sort().values + 1 for _ in range(64)])
    starts = torch.arange(64, device="cuda")[:, None] * 64
    sources, targets = starts + nodes, starts + torch.arange(1, 9, device="cuda")
    sources[:, 6:] = -1
    expected = [cache.clone() for cache in caches]
    reference.move_slots(expected, sources, targets)
    table = kv_move.CacheTable.of(caches)
    kv_move.move_slots(table, sources, targets)
    wrong = max((found - wanted).abs().max().item() for found, wanted in zip(caches, expected))
    time = milliseconds(lambda: kv_move.move_slots(table, sources, targets))
    moved = int((sources >= 0).sum()) * len(caches) * 2 * caches[0].stride(1) // 16 * NUM_KV_HEADS * 2
    return [{"case": "K/V move", "error": wrong, "ok": wrong == 0}], {"ms": time, "bytes": moved}


def floor_ms(step: Step, limits: dict[str, float]) -> float:
    rows, context = len(step.query), int(step.batch.context_lens.sum())
    per_row = context // len(step.batch.context_lens) + step.batch.max_rows
    num_bytes = 2 * HEAD_SIZE * 2 * (NUM_KV_HEADS * (context + rows) + NUM_HEADS * rows)
    operations = 4 * rows * NUM_HEADS * HEAD_SIZE * per_row
    return 1e3 * max(num_bytes / limits["copy_bytes_per_s"], operations / limits["matrix_operations_per_s"])


def time_attention(limits: dict[str, float]) -> list[dict[str, Any]]:
    results = []
    for num_requests in BATCHES:
        for context in CONTEXTS:
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
                results.append(row)
                del step
    return results


FAILED: set[str] = set()


def time_or_none(name: str, prepare: Callable[[], Callable[[], Any]]) -> float | None:
    """None where it is not installed or does not take this shape, which is said once for each name."""
    try:
        return milliseconds(prepare())
    except ImportError:
        return None
    except Exception as error:
        if name not in FAILED:
            print(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        FAILED.add(name)
        return None


def tune(limits: dict[str, float]) -> list[dict[str, Any]]:
    """Other launch parameters around the planned ones, best first for each shape."""
    results = []
    for num_requests, context, nodes in TUNED:
        step = make_step((nodes + 1,) * num_requests, (context,) * num_requests)
        planned = step.batch.launch
        around = [
            Launch(block_m, block_n, num_warps, num_stages, num_splits)
            for block_m, num_warps in ((32, 4), (64, 4), (128, 8))
            for block_n in (32, 64, 128)
            for num_stages in (3, 4)
            for num_splits in sorted({planned.num_splits, 2 * planned.num_splits})
        ]
        timed = []
        for launch in [planned, *around]:
            ms = time_or_none(str(launch), lambda step=step, launch=launch: lambda: run(step, launch))
            if ms is not None:
                timed.append({"ms": ms, "planned": launch == planned, **dataclasses.asdict(launch)})
        timed.sort(key=lambda row: row["ms"])
        floor = floor_ms(step, limits)
        print(f"batch {num_requests}, context {context}, nodes {nodes}: floor {floor:.3f} ms, planned {planned}")
        for row in timed[:5]:
            print("   ", row)
        results.append({"batch": num_requests, "context": context, "nodes": nodes, "floor": floor, "timed": timed})
    return results


def print_table(results: list[dict[str, Any]]) -> None:
    names = ["ours", *BASELINES]
    print(
        f"{'batch':>5} {'context':>7} {'nodes':>5} {'floor':>8} {'x floor':>7} " + " ".join(f"{n:>14}" for n in names)
    )
    for row in results:
        times = " ".join(f"{row[name]:>14.3f}" if row.get(name) is not None else f"{'-':>14}" for name in names)
        ratio = row["ours"] / row["floor"]
        print(f"{row['batch']:>5} {row['context']:>7} {row['nodes']:>5} {row['floor']:>8.3f} {ratio:>7.2f} {times}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--tune", action="store_true", help="try other launch parameters instead of other kernels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernel_check: torch sees no CUDA device; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    limits = device_limits()
    checks = check_attention()
    move_checks, move_time = check_move()
    checks += check_xformers() + move_checks
    wrong = [check for check in checks if not check["ok"]]
    report = {"device": device.name, "torch": torch.__version__, "triton": triton.__version__, "limits": limits}
    report |= {"checks": checks, "move": move_time}
    report["tuning" if arguments.tune else "times_ms"] = tune(limits) if arguments.tune else time_attention(limits)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    print(
        f"{device.name}, torch {torch.__version__}, triton {triton.__version__}: copy "
        f"{limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix {limits['matrix_operations_per_s'] / 1e12:.0f} TFLOP/s"
    )
    if not arguments.tune:
        print_table(report["times_ms"])
    print(f"K/V move, 64 requests x 6 places x 32 layers: {move_time['ms']:.3f} ms")
    print(f"correctness: {len(checks) - len(wrong)} of {len(checks)} right", *(str(check) for check in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
