"""Checks that vLLM with trees says what plain vLLM says, on both model runners, and measures a step of both.

    python -m benchmarks.gpu.engine_check RESULTS [--pair FOLDER] [--cases NAME ...]

Each engine has a process of its own, several at a time: one that fails or hangs leaves its log and does not stop the
others. The target and drafter of the tests are used, from FOLDER (default: `pair/`, as the bundle has it); where they
are missing there they are trained, about a minute. In float32 tokens must be equal, greedy and seeded; in bfloat16,
greedy, equal up to near-ties of the top two logits. Times of so small a target are those of the host. Without a CUDA
device only the first case runs, on the CPU.

Exit status: 1 if a token differs, an engine fails or nothing was accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.gpu.engine_run import TEMPERATURES, Job
from vllm_ctc_spec.bench.equality import first_difference
from vllm_ctc_spec.tables import console

ROOT = Path(__file__).parents[2]
NUM_NODES = 32
BATCH = 8
NEAR_TIE = 0.25
"""Two steps of bfloat16 between 16 and 32, the largest logits of this target."""
METHODS = ("plain", "ctc")
TRITON = {"attention_backend": "TRITON_ATTN"}


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    is_v2: bool
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("float32-eager-V1", "float32", False, {**TRITON, "enforce_eager": True}),
    Case("float32-eager-V2", "float32", True, {**TRITON, "enforce_eager": True}),
    Case("float32-V1", "float32", False, TRITON),
    Case("float32-V2", "float32", True, TRITON),
    Case("bfloat16-V1", "bfloat16", False, TRITON),
    Case("bfloat16-V2", "bfloat16", True, TRITON),
    Case("bfloat16-flash-V1", "bfloat16", False, {"attention_backend": "FLASH_ATTN"}),
    Case("bfloat16-flash-V2", "bfloat16", True, {"attention_backend": "FLASH_ATTN"}),
)


def cases_here(on_gpu: bool) -> list[Case]:
    if not on_gpu:
        return [CASES[0]]
    folder = Path(importlib.util.find_spec("vllm").origin).parent / "vllm_flash_attn"
    has_flash = any(folder.glob("_vllm_fa*_C*.so"))
    return [case for case in CASES if has_flash or case.options["attention_backend"] != "FLASH_ATTN"]


class Runs:
    """Starts the engines of all cases, each in a process with a time limit, and collects what they write."""

    def __init__(self, options: argparse.Namespace, on_gpu: bool) -> None:
        self.results: Path = options.results.resolve()
        self.options, self.on_gpu = options, on_gpu
        self.deadline = time.monotonic() + options.seconds
        tokenizer = AutoTokenizer.from_pretrained(options.pair / "target")
        rows = (options.pair / "corpus" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:BATCH]
        self.prompts = [tokenizer(json.loads(row)["prompt"])["input_ids"] for row in rows]

    def run(self, case: Case, method: str) -> dict[str, Any]:
        """What engine_run wrote, or `error`, the last lines of its log."""
        name = f"{case.name}-{method}"
        answers, log = self.results / f"{name}.json", self.results / f"{name}.log"
        answers.unlink(missing_ok=True)
        job = self.results / f"{name}.job"
        self._job(case, method, answers).write(job)
        limit = min(self.options.engine_seconds, self.deadline - time.monotonic())
        if limit <= 0:
            return {"error": "not started: no time was left"}
        command = [sys.executable, "-m", "benchmarks.gpu.engine_run", str(job)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(case, name), stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
            try:
                status: int | str = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = f"longer than {limit:.0f} s"
            finally:
                # The compiler's processes too.
                kill_group(process)
        print(f"{name}: {status}", flush=True)
        if not answers.exists():
            return {"error": f"exit status {status}; {log}:\n{tail(log)}"}
        return dict(json.loads(answers.read_text(encoding="utf-8")))

    def _job(self, case: Case, method: str, answers: Path) -> Job:
        options = {
            "dtype": case.dtype, "max_model_len": 512, "max_num_seqs": BATCH, "kv_cache_memory_bytes": 1 << 28,
            "distributed_executor_backend": "uni", **case.options,
        }  # fmt: skip
        if self.on_gpu:
            # Of the device's memory, because several engines run at a time.
            options["gpu_memory_utilization"] = 0.05
        else:
            del options["attention_backend"]
        spec = {"method": "ctc", "model": str(self.options.pair / "drafter"), "num_speculative_tokens": NUM_NODES,
                "adaptive_budget": False}  # fmt: skip
        return Job(
            str(self.options.pair / "target"), None if method == "plain" else spec, options, self.prompts,
            self.options.max_tokens, str(self.results / "measuring.lock"), str(answers),
        )  # fmt: skip

    def _environment(self, case: Case, name: str) -> dict[str, str]:
        changed = {
            "VLLM_USE_V2_MODEL_RUNNER": str(int(case.is_v2)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.on_gpu:
            changed |= {"VLLM_CACHE_ROOT": str(self.results / "cache" / name), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        if case.dtype == "float32":
            # vLLM's attention in Triton would multiply float32 as TF32, which has ten bits.
            changed["TRITON_F32_DEFAULT"] = "ieee"
        return os.environ | changed


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, num_lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def judge(case: Case, plain: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for greedy and one for seeded, with `ok`; one with `error` if an engine failed."""
    errors = [f"{name}: {each['error']}" for name, each in zip(METHODS, (plain, ours)) if "error" in each]
    if errors:
        return [{"case": case.name, "error": "\n".join(errors), "ok": False}]
    rows = []
    for sampling in TEMPERATURES:
        partings = []
        pairs = zip(plain[sampling]["tokens"], ours[sampling]["tokens"], strict=True)
        for prompt, (expected, got) in enumerate(pairs):
            position = first_difference(expected, got)
            if position is not None:
                gap = plain["gaps"][prompt][position] if sampling == "greedy" else None
                partings.append({"prompt": prompt, "position": position, "gap": gap})
        near = case.dtype != "float32" and all(each["gap"] is None or each["gap"] <= NEAR_TIE for each in partings)
        rows.append(
            {
                "case": case.name,
                "sampling": sampling,
                "partings": partings,
                "repeats": plain[sampling]["repeats"],
                "acceptance_length": ours["acceptance_length"],
                "plain_ms": plain[sampling]["ms_per_step"],
                "ctc_ms": ours[sampling]["ms_per_step"],
                "graphs": [each["facts"]["graphs_captured"] for each in (plain, ours)],
                "ok": (not partings or near) and (ours["acceptance_length"] or 0) > 1,
            }
        )
    return rows


def to_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "sampling", "tokens", "plain repeats", "β", "plain ms/step", "ctc ms/step", "graphs")
    for row in rows:
        if "error" in row:
            table.add_row(row["case"], "", "failed")
            continue
        partings = ", ".join(
            f"{each['prompt']}@{each['position']}" + ("" if each["gap"] is None else f" (gap {each['gap']:.2g})")
            for each in row["partings"]
        )
        table.add_row(
            row["case"], row["sampling"], partings or "equal", "yes" if row["repeats"] else "no",
            f"{row['acceptance_length'] or 0:.2f}", f"{row['plain_ms']:.2f}", f"{row['ctc_ms']:.2f}",
            "/".join(map(str, row["graphs"])),
        )  # fmt: skip
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--pair", type=Path, default=ROOT / "pair", help="folder of the tests' target and drafter")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=8, help="engines at a time (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=220, help="for all engines (default %(default)s)")
    parser.add_argument("--engine-seconds", type=float, default=110, help="for each engine (default %(default)s)")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    options.results.mkdir(parents=True, exist_ok=True)
    options.pair = options.pair.resolve()
    if not (options.pair / "drafter").exists():
        from tests.tiny_pair import build_tiny_pair

        build_tiny_pair(options.pair)
    cases = [case for case in CASES if case.name in options.cases] if options.cases else cases_here(on_gpu)
    runs = Runs(options, on_gpu)
    with ThreadPoolExecutor(options.at_once) as pool:
        started = {(case.name, method): pool.submit(runs.run, case, method) for case in cases for method in METHODS}
        found = {key: future.result() for key, future in started.items()}
    rows = [row for case in cases for row in judge(case, *(found[case.name, method] for method in METHODS))]
    facts = {f"{name}-{method}": result.get("facts") for (name, method), result in found.items()}
    (options.results / "engine_check.json").write_text(json.dumps({"rows": rows, "facts": facts}, indent=1))
    for row in rows:
        if "error" in row:
            print(f"{row['case']}: {row['error']}\n")
    console().print(to_table(rows))
    wrong = sum(not row["ok"] for row in rows)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}: {len(rows) - wrong} of {len(rows)} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
