"""The drafter's modules on vLLM's CPU kernels equal those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.drafter.modeling import RMSNorm, Rotary
from vllm_ctc_spec.engine.cpu_modules import FusedRMSNorm, PackedLinear, TabledRotary, use_vllms_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 11, 64)])
def test_packed_linear_equals_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96, bias=False).to(dtype), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 11, 64)])
def test_fused_norm_equals_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-5).to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)
    norm.weight.copy_(torch.rand(64))
    torch.testing.assert_close(FusedRMSNorm(norm)(x), norm(x))
    wider = torch.randn(*shape[:-1], 128).to(dtype)
    torch.testing.assert_close(FusedRMSNorm(norm)(wider[..., :64]), norm(wider[..., :64]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 11)])
def test_rotary_by_table_equals_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rotary, positions = Rotary(64, 10_000.0), torch.randint(0, 500, shape)
    x = torch.randn(*shape, 3, 64).to(dtype)
    before = x.clone()
    # The kernel rounds to bfloat16 once, at the end.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(TabledRotary(rotary, 500, dtype)(x, positions), rotary(x, positions), **close)
    assert torch.equal(x, before)


def test_all_modules_of_a_drafter_are_replaced_and_its_tables_stay() -> None:
    torch.manual_seed(0)
    config = CTCDrafterConfig(
        hidden_size=64, vocab_size=11, num_attention_heads=2, num_key_value_heads=1, head_dim=32, condition_rank=32
    )
    drafter = CTCDrafter(config).eval().requires_grad_(False)
    drafter.set_tables(torch.randn(11, 64), torch.randn(11, 64))
    inputs = torch.randn(1, 2, 64), torch.randn(1, 64), torch.tensor([5])

    def outputs() -> list[torch.Tensor]:
        context = drafter.context(inputs[1], inputs[2])
        return [
            *drafter(*inputs, lambda layer, query, own: query),
            *context[0],
            *drafter.conditioning.__dict__.values(),
        ]

    expected, names = outputs(), set(drafter.state_dict())
    use_vllms_kernels(drafter, num_positions=6)
    assert not any(isinstance(module, nn.Linear | RMSNorm | Rotary) for module in drafter.modules())
    assert set(drafter.state_dict()) == names
    for output, own in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(output, own)
