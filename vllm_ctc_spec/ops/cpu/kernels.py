"""Tree attention and the K/V move on a CPU. The C++ sources are compiled for this processor at first use.

A layer's cache is [blocks, K, B, 2 * D]. Of each block and head, the first half holds the keys as a matrix [D, B] and
the second half the values as [B, D]. A matrix [m, n] is stored row by row or, where AMX is used, in its tiles:
[n / 16, m / 2, 16, 2] (vLLM: csrc/cpu/cpu_attn_vec.hpp and csrc/cpu/cpu_attn_amx.hpp).

Letters: R requests, M query rows of the whole step, H query heads, K key-value heads, D head size, B block size.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_ctc_spec.files import user_cache
from vllm_ctc_spec.ops.tree_batch import TreeBatch

FOLDER = Path(__file__).parent
# Without -ffast-math: linking with it changes the floating-point mode of the whole process.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LANES = 16
"""Head size and block size are multiples of it."""


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> _Rows:
        return cls(tensor.data_ptr(), *tensor.stride()[:2])


class _TreeAttention(ctypes.Structure):
    _fields_ = (
        *((name, _Rows) for name in ("out", "query", "key", "value")),
        ("cache", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("cache_block_stride", "cache_head_stride")),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_starts", "num_rows", "context_lens", "ancestor_masks", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_requests", "max_rows", "num_heads", "num_kv_heads", "head_size", "block_size")
        ),
        ("sliding_window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "soft_cap")),
    )


class _Move(ctypes.Structure):
    _fields_ = (
        ("caches", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("num_caches", "cache_block_stride", "cache_head_stride")),
        *((name, ctypes.c_void_p) for name in ("sources", "targets")),
        *((name, ctypes.c_int64) for name in ("num_slots", "num_kv_heads", "head_size", "block_size", "is_tiled")),
    )


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    is_tiled: bool,
    batch: TreeBatch,
    scale: float,
    out: Tensor,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the tree rows of a step. Writes these rows of `out` and returns it.

    query, out: [M, H, D]; key, value: [M, K, D], of the step's rows; any strides over rows and heads.
    kv_cache: [blocks, K, B, 2 * D], of the same dtype, one of DTYPES. D and B are multiples of LANES.
    is_tiled: the cache is in AMX's layout. Needs `multiplies_tiles()`, bfloat16, and multiples of 2 * LANES.
    sliding_window, soft_cap, sinks: as `ops.triton.attention.tree_attention` takes them.
    """
    (_, num_heads, head_size), num_kv_heads = query.shape, key.shape[1]
    # Here, because it must live until the kernel has read it.
    sinks = None if sinks is None else sinks.float()
    step = _TreeAttention(
        *(_Rows.of(rows) for rows in (out, query, key, value)),
        kv_cache.data_ptr(),
        *kv_cache.stride()[:2],
        batch.block_table.data_ptr(),
        batch.block_table.stride(0),
        *(each.data_ptr() for each in (batch.row_starts, batch.num_rows, batch.context_lens, batch.ancestor_masks)),
        None if sinks is None else sinks.data_ptr(),
        len(batch.row_starts),
        batch.max_rows,
        num_heads,
        num_kv_heads,
        head_size,
        kv_cache.shape[2],
        sliding_window,
        scale,
        soft_cap,
    )
    kernels()["tree_attention_" + ("tiled" if is_tiled else DTYPES[query.dtype])](ctypes.byref(step))
    return out


def move_slots(kv_caches: list[Tensor], is_tiled: bool, sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values from slots `sources` to slots `targets`, both [n] int64 and contiguous, in every layer.

    kv_caches: one per layer, of the same shape, strides and dtype. In each, all slots are read before any is written,
    so sources and targets may overlap.
    """
    first = kv_caches[0]
    _, num_kv_heads, block_size, packed = first.shape
    move = _Move(
        (ctypes.c_void_p * len(kv_caches))(*(kv_cache.data_ptr() for kv_cache in kv_caches)),
        len(kv_caches),
        *first.stride()[:2],
        sources.data_ptr(),
        targets.data_ptr(),
        len(sources),
        num_kv_heads,
        packed // 2,
        block_size,
        is_tiled,
    )
    kernels()[f"move_slots_{first.itemsize}"](ctypes.byref(move))


def split_cache(kv_cache: Tensor, is_tiled: bool) -> tuple[Tensor, Tensor]:
    """Views of a layer's cache: keys [blocks, K, D / 2, 2, B / 16, 16], values [blocks, K, B / 2, 2, D / 16, 16]."""
    num_blocks, num_kv_heads, block_size, packed = kv_cache.shape
    keys, values = kv_cache.view(num_blocks, num_kv_heads, 2, -1).unbind(2)
    return _matrix(keys, is_tiled, packed // 2, block_size), _matrix(values, is_tiled, block_size, packed // 2)


def _matrix(flat: Tensor, is_tiled: bool, rows: int, columns: int) -> Tensor:
    if is_tiled:
        return flat.unflatten(-1, (columns // LANES, rows // 2, LANES, 2)).permute(0, 1, 3, 5, 2, 4)
    return flat.unflatten(-1, (rows // 2, 2, columns // LANES, LANES))


def joined_cache(kv_cache: Tensor, is_tiled: bool) -> tuple[Tensor, Tensor]:
    """Copies of a layer's keys [blocks, K, D, B] and values [blocks, K, B, D]."""
    keys, values = (half.flatten(4).flatten(2, 3) for half in split_cache(kv_cache, is_tiled))
    return keys, values


def multiplies_tiles() -> bool:
    """Whether processor and compiler support AMX with bfloat16."""
    return hasattr(kernels(), "tree_attention_tiled")


@cache
def kernels() -> ctypes.CDLL:
    """The compiled kernels, from the user's cache if they are there. Raises RuntimeError without a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    path = user_cache("kernels") / f"{_cache_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _cache_key(compiler: str) -> str:
    """Changes with every source and header, the compiler, its flags and the processor's instruction set."""
    files = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    sources = (text for file in files for text in (file.name, file.read_text()))
    return hashlib.sha256("\n".join((*sources, compiler, *FLAGS, _instruction_set())).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Workers that start at the same time each compile their own; the last one replaces the others'.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        try:
            command = [compiler, *FLAGS, *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f'speculative method "ctc" on a CPU needs a C++ compiler for its attention kernel, and {compiler!r} '
                f"failed: {getattr(error, 'stderr', None) or error}. Install g++ 12 or newer, or name one with CXX."
            ) from error
        made.replace(path)


def _instruction_set() -> str:
    """The processor's feature flags. The cache folder may be shared between machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
