"""Which number type is fast here."""

from __future__ import annotations

import torch


def bf16_is_fast() -> bool:
    """True where matrix products have native bfloat16 instructions; emulated, they are slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def target_dtype() -> torch.dtype:
    """Of a target where the user names none."""
    return torch.bfloat16 if bf16_is_fast() else torch.float32
