import pytest
import torch
from torch import Tensor, nn

from vllm_ctc_spec.training import optimizer
from vllm_ctc_spec.training.optimizer import MuonAdamW

SIZES = (24, 40)


def first_update(learning_rate: float) -> tuple[Tensor, Tensor]:
    """Gradient and first update of a matrix, without weight decay."""
    torch.manual_seed(0)
    linear = nn.Linear(*SIZES)
    before = linear.weight.detach().clone()
    linear.weight.grad = torch.randn_like(before)
    MuonAdamW(linear, learning_rate, weight_decay=0.0).step()
    return linear.weight.grad, linear.weight.detach() - before


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five quintic Newton-Schulz iterations in float64, with the coefficients of Jordan et al. (2024)."""
    matrix = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix


@pytest.mark.parametrize(("fast", "tolerance"), [(True, 5e-2), (False, 1e-5)])
def test_muon_orthogonalises_in_float32_where_bfloat16_is_emulated(
    monkeypatch: pytest.MonkeyPatch, fast: bool, tolerance: float
) -> None:
    monkeypatch.setattr(optimizer, "bf16_is_fast", lambda: fast)
    gradient, update = first_update(learning_rate=0.1)
    expected = -0.1 * 0.2 * max(SIZES) ** 0.5 * orthogonalised(gradient)
    error = float((update - expected).norm() / expected.norm())
    assert error < tolerance
    assert fast == (error > 1e-4)  # bfloat16 has 8 bits.
