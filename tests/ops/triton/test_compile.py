"""The kernels compile for GPUs that need not be present, with the expected instructions and memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu.compiled import POINTEES, compile_attention, compile_kernel, usage
from vllm_ctc_spec.ops.triton import attention, move
from vllm_ctc_spec.ops.triton.launch import HOPPER, plan_launch, plan_tile, resident_programs

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes per program, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


@pytest.fixture(autouse=True)
def own_compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("capability", "dtype", "cache", "head_size"),
    [(90, "bf16", "bf16", 128), (90, "bf16", "fp8e4nv", 128), (80, "fp16", "fp16", 96), (89, "bf16", "bf16", 256)],
)
def test_tiles_are_loaded_while_others_are_computed(capability: int, dtype: str, cache: str, head_size: int) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tile = plan_tile(128, head_size, torch_dtype, SHARED_MEMORY[capability] - 8 * 1024)
    compiled = compile_attention(tile, 32, capability, head_size=head_size, dtype=dtype, cache=cache)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    loop = compiled.asm["ttgir"].partition("scf.for")[2]
    still_flying = [int(count) for count in re.findall(r"async_wait.*?num = (\d+)", loop)]
    assert still_flying[0] >= 2, "keys and values of the next tile, while this one is waited for"
    assert ("wgmma" in compiled.asm["ptx"]) == (capability == 90)


@pytest.mark.parametrize("nodes", [8, 31, 32, 63])
def test_on_hopper_nothing_is_spilled_and_the_planned_programs_are_resident(nodes: int) -> None:
    launch = plan_launch(1, nodes + 1, 8192, 32, 8, 128, torch.bfloat16, HOPPER)
    used = usage(compile_attention(launch, nodes + 1))
    assert used.spilled == 0
    assert used.resident * HOPPER.num_processors >= resident_programs(launch, HOPPER)


GPT_OSS: dict[str, Any] = {"group": 8, "head_size": 64, "sliding_window": 128, "has_sinks": True}
GEMMA_2: dict[str, Any] = {"group": 2, "head_size": 256, "sliding_window": 4096, "has_soft_cap": True}


@pytest.mark.parametrize("heads", [GPT_OSS, GEMMA_2], ids=str)
def test_windows_soft_caps_and_sinks_spill_nothing_either(heads: dict[str, Any]) -> None:
    launch = plan_launch(1, 64, 8192, 8 * heads["group"], 8, heads["head_size"], torch.bfloat16, HOPPER)
    assert usage(compile_attention(launch, 64, **heads)).spilled == 0


def test_the_merge_compiles() -> None:
    constants = {"NUM_HEADS": 32, "HEAD_SIZE": 128, "MIN_TILES": 4, "BLOCK_N": 64, "BLOCK_S": 16, "BLOCK_D": 128}
    constants["WINDOW"] = 0
    compile_kernel(attention._merge_kernel, constants, POINTEES | {"out_ptr": "bf16"}, 90, num_warps=1)


def test_the_move_reads_sixteen_bytes_at_a_time_and_waits_before_it_writes() -> None:
    constants = {"BLOCK_SIZE": 16, "ROW_WORDS": 128, "BLOCK_P": move.NUM_PLACES, "BLOCK_W": 128}
    ptx = compile_kernel(move._move_kernel, constants, POINTEES, 80, num_warps=4).asm["ptx"]
    # Only words of the cache are loaded four at a time; slots are 64 bits wide.
    assert ptx.rindex("ld.global.v4.b32") < ptx.rindex("bar.sync") < ptx.index("st.global.v4.b32")
