"""Corrects two faults of Triton's interpreter, without which bfloat16 and float8 cannot be interpreted.

It multiplies the bit patterns of bfloat16 as integers, and when it rounds a float32 to a narrower type, it drops the
carry out of the mantissa (0.498 becomes 0.25 in float8).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ROUNDED_BY_TORCH = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8),
}


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        create_dot = InterpreterBuilder.create_dot

        def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            if a.dtype.scalar == tl.bfloat16:
                a, b = self.create_fp_ext(a, tl.float32), self.create_fp_ext(b, tl.float32)
            return create_dot(self, a, b, *rest)

        patch.setattr(InterpreterBuilder, "create_dot", dot)
        for name in ("create_fp_trunc", "create_fp_to_fp"):
            patch.setattr(InterpreterBuilder, name, _rounding(getattr(InterpreterBuilder, name)))
        yield


def _rounding(inner: Any) -> Any:
    def convert(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar not in ROUNDED_BY_TORCH:
            return inner(self, source, target, *rest)
        dtype, bits = ROUNDED_BY_TORCH[target.scalar]
        return TensorHandle(torch.tensor(source.data).to(dtype).view(bits).numpy(), target.scalar)

    return convert
