"""The kernels compile for GPUs that are not here, and what the compiler makes of them is what was meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vllm_ctc_spec.ops.triton import attention, move  # noqa: E402
from vllm_ctc_spec.ops.triton.launch import plan_tile  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes per program, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
POINTEES = {
    "partial_ptr": "fp32",
    "lse_ptr": "fp32",
    "masks_ptr": "i64",
    "row_starts_ptr": "i32",
    "num_rows_ptr": "i32",
    "context_lens_ptr": "i32",
    "block_table_ptr": "i32",
    "addresses_ptr": "i64",
    "sources_ptr": "i64",
    "targets_ptr": "i64",
    "k_scale_ptr": "fp32",
    "v_scale_ptr": "fp32",
}
SCALARS = {"scale": "fp32", "softcap": "fp32", "num_splits": "i32", "num_places": "i32"}


@pytest.fixture(autouse=True)
def own_compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel: Any, constants: dict[str, Any], pointees: dict[str, str], capability: int, **options: int):
    """As a launch would with 16-byte aligned tensors and strides."""
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = f"*{pointees[name]}" if name.endswith("_ptr") else "i64"
            aligned[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "dtype", "cache", "head_size"),
    [(90, "bf16", "bf16", 128), (90, "bf16", "fp8e4nv", 128), (80, "fp16", "fp16", 96), (89, "bf16", "bf16", 256)],
)
def test_tiles_are_loaded_while_others_are_computed(capability: int, dtype: str, cache: str, head_size: int) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tile = plan_tile(128, head_size, torch_dtype, SHARED_MEMORY[capability] - 8 * 1024)
    constants = {
        "NUM_KV_HEADS": 8,
        "GROUP": 4,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": 16,
        "HAS_SOFTCAP": False,
        "FP8_MAX": 448.0 if cache != dtype else 0.0,
        "IS_SPLIT": True,
        "MIN_TILES": 4,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_T": 32,
        "BLOCK_D": triton.next_power_of_2(head_size),
    }
    if cache == dtype:
        constants |= {"k_scale_ptr": None, "v_scale_ptr": None}
    pointees = POINTEES | dict.fromkeys(("out_ptr", "query_ptr", "key_ptr", "value_ptr"), dtype) | {"cache_ptr": cache}
    kernel = attention._attend_kernel
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = compile_kernel(kernel, constants, pointees, capability, **options)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    loop = compiled.asm["ttgir"].partition("scf.for")[2]
    still_flying = [int(count) for count in re.findall(r"async_wait.*?num = (\d+)", loop)]
    assert still_flying[0] >= 2, "keys and values of the next tile, while this one is waited for"
    assert ("wgmma" in compiled.asm["ptx"]) == (capability == 90)


def test_the_merge_compiles() -> None:
    constants = {"NUM_HEADS": 32, "HEAD_SIZE": 128, "MIN_TILES": 4, "BLOCK_N": 64, "BLOCK_S": 16, "BLOCK_D": 128}
    compile_kernel(attention._merge_kernel, constants, POINTEES | {"out_ptr": "bf16"}, 90, num_warps=1)


def test_the_move_reads_sixteen_bytes_at_a_time_and_waits_before_it_writes() -> None:
    constants = {"BLOCK_SIZE": 16, "ROW_WORDS": 128, "BLOCK_P": move.NUM_PLACES, "BLOCK_W": 128}
    ptx = compile_kernel(move._move_kernel, constants, POINTEES, 80, num_warps=4).asm["ptx"]
    # Only words of the cache are loaded four at a time; slots are 64 bits wide.
    assert ptx.rindex("ld.global.v4.b32") < ptx.rindex("bar.sync") < ptx.index("st.global.v4.b32")
