"""The drafter's products by vLLM's kernels are those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.engine.packed_linear import PackedLinear, pack_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 11, 64)])
def test_a_packed_product_is_that_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96, bias=False).to(dtype), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))


def test_all_products_of_a_drafter_are_packed_and_its_tables_stay() -> None:
    torch.manual_seed(0)
    config = CTCDrafterConfig(
        hidden_size=64, vocab_size=11, num_attention_heads=2, num_key_value_heads=1, head_dim=32, condition_rank=32
    )
    drafter = CTCDrafter(config).eval().requires_grad_(False)
    inputs = torch.tensor([[3, 4]]), torch.randn(1, 64), torch.randn(1, 64), torch.tensor([5])

    def outputs() -> list[torch.Tensor]:
        context = drafter.context(inputs[2], inputs[3])
        return [
            *drafter(*inputs, lambda layer, query, own: query),
            *context[0],
            *drafter.conditioning.__dict__.values(),
        ]

    expected, names = outputs(), set(drafter.state_dict())
    pack_linears(drafter)
    assert not any(isinstance(module, nn.Linear) for module in drafter.modules())
    assert set(drafter.state_dict()) == names
    for output, own in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(output, own)
