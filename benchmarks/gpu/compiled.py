"""Compiles the Triton kernels for GPUs that need not be present, and reads what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_ctc_spec.ops.triton import attention
from vllm_ctc_spec.ops.triton.launch import Launch

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
    "sinks_ptr": "fp32",
}
SCALARS = {"scale": "fp32", "soft_cap": "fp32", "num_splits": "i32", "num_places": "i32"}

SM90_SHARED_MEMORY, SM90_RESERVED, SM90_REGISTERS, SM90_THREADS = 228 * 1024, 1024, 65536, 2048
"""Of a processor of compute capability 9.0: bytes in all and per resident program, registers, threads (CUDA C++
Programming Guide, technical specifications)."""


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel uses."""

    registers: int
    """Per thread"""
    spilled: int
    """Bytes of stack and local memory per thread: registers that did not fit."""
    shared: int
    """Bytes"""
    num_warps: int

    @property
    def resident(self) -> int:
        """Programs that fit on one processor of compute capability 9.0 at the same time."""
        threads = 32 * self.num_warps
        registers = -(-self.registers // 8) * 8 * threads
        return min(
            SM90_SHARED_MEMORY // (self.shared + SM90_RESERVED), SM90_REGISTERS // registers, SM90_THREADS // threads
        )


def compile_kernel(
    kernel: Any, constants: dict[str, Any], pointees: dict[str, str], capability: int, **options: int
) -> Any:
    """As a launch compiles it whose tensors and strides are multiples of 16 bytes."""
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


def compile_attention(
    launch: Launch,
    max_rows: int,
    capability: int = 90,
    group: int = 4,
    head_size: int = 128,
    dtype: str = "bf16",
    cache: str = "bf16",
    sliding_window: int = 0,
    has_soft_cap: bool = False,
    has_sinks: bool = False,
) -> Any:
    """The attention kernel of a split context. dtype, cache: Triton's names of the model's and the cache's dtype."""
    constants = {
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": 16,
        "HAS_SOFT_CAP": has_soft_cap,
        "FP8_MAX": 448.0 if cache != dtype else 0.0,
        "IS_SPLIT": True,
        "WINDOW": sliding_window,
        "MIN_TILES": launch.min_tiles,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_T": max(16, triton.next_power_of_2(max_rows)),
        "BLOCK_D": triton.next_power_of_2(head_size),
    }
    if cache == dtype:
        constants |= {"k_scale_ptr": None, "v_scale_ptr": None}
    if not has_sinks:
        constants |= {"sinks_ptr": None}
    pointees = POINTEES | dict.fromkeys(("out_ptr", "query_ptr", "key_ptr", "value_ptr"), dtype) | {"cache_ptr": cache}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return compile_kernel(attention._attend_kernel, constants, pointees, capability, **options)


def usage(compiled: Any) -> Usage:
    """By cuobjdump, which Triton's package carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return Usage(numbers["REG"], spilled, compiled.metadata.shared, compiled.metadata.num_warps)
