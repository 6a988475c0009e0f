"""Settings that the kernels do not support are refused by name, with a remedy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from vllm_ctc_spec.ops import support
from vllm_ctc_spec.ops.support import check_supported, check_xformers

GOOD: dict[str, Any] = {
    "head_size": 128,
    "num_heads": 32,
    "num_kv_heads": 8,
    "dtype": torch.bfloat16,
    "cache_dtype": torch.bfloat16,
    "block_size": 16,
    "capability": (9, 0),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_size": 80, "block_size": 48, "capability": (8, 0)},
        {"cache_dtype": torch.float8_e4m3fn, "capability": (8, 9)},
        {"dtype": torch.float32, "cache_dtype": torch.float32, "head_size": 256},
    ],
)
def test_what_is_supported_passes(change: dict[str, Any]) -> None:
    check_supported(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head_size": 32}, "head_size=32"),
        ({"head_size": 72}, "head_size=72"),
        ({"head_size": 288}, "head_size=288"),
        ({"num_heads": 30}, "num_heads=30"),
        ({"dtype": torch.float64, "cache_dtype": torch.float64}, "dtype=torch.float64"),
        ({"cache_dtype": torch.float16}, "kv_cache_dtype=torch.float16"),
        ({"cache_dtype": torch.uint8}, "kv_cache_dtype=torch.uint8"),
        ({"cache_dtype": torch.float8_e5m2, "capability": (8, 6)}, "kv_cache_dtype=torch.float8_e5m2.*8.9"),
        ({"block_size": 8}, "block_size=8"),
        ({"capability": (7, 5)}, "compute capability 7.5.*8.0"),
    ],
)
def test_what_is_not_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_supported(**{**GOOD, **change})


def test_missing_triton_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        check_supported(**GOOD)


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_xformers_supports_passes(head_size: int, dtype: torch.dtype) -> None:
    check_xformers(head_size, dtype, dtype)


@pytest.mark.parametrize(
    ("head_size", "dtype", "cache_dtype", "named"),
    [
        (80, torch.float16, torch.float16, "head_size=80"),
        (64, torch.float32, torch.float32, "dtype=torch.float32"),
        (64, torch.float16, torch.float8_e4m3fn, "kv_cache_dtype=torch.float8_e4m3fn"),
    ],
)
def test_what_xformers_lacks_is_refused_by_name(
    head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, named: str
) -> None:
    with pytest.raises(ValueError, match=f"^{named}.*attention_kernel='xformers'.*Leave it out"):
        check_xformers(head_size, dtype, cache_dtype)


def test_missing_xformers_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"attention_kernel='xformers'.*pip install xformers"):
        check_xformers(128, torch.bfloat16, torch.bfloat16)


def test_the_kernels_import_neither_vllm_nor_transformers() -> None:
    code = (
        "import sys, vllm_ctc_spec.ops.triton.move, vllm_ctc_spec.ops.triton.attention, vllm_ctc_spec.ops.reference\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'vllm', 'transformers'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
