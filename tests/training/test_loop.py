"""The schedule ends with the budget, and Muon orthogonalises in the precision that is fast."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from vllm_ctc_spec.training import loop
from vllm_ctc_spec.training.loop import FINAL_RATE, Budget, BudgetBar, BudgetCallback, MuonAdamW, drop_checkpoints


def test_the_rate_rises_then_falls_to_its_final_value():
    clock = BudgetCallback(Budget(max_steps=100, warmup=0.1))
    rates = [clock.rate(step) for step in range(101)]
    assert rates[10] == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(FINAL_RATE)


def test_time_alone_ends_training_at_the_final_rate():
    clock = BudgetCallback(Budget(max_steps=10**6, max_seconds=50))
    control = SimpleNamespace(should_training_stop=False)
    clock.elapsed = 60.0
    clock.on_step_end(None, SimpleNamespace(global_step=3), control)
    assert control.should_training_stop
    assert clock.rate(3) == pytest.approx(FINAL_RATE)


def test_the_bar_is_full_when_the_budget_ends():
    clock = BudgetCallback(Budget(max_steps=10**6, max_seconds=50))
    bar, state = BudgetBar(clock), SimpleNamespace(global_step=0, max_steps=10**6, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    for state.global_step, clock.elapsed, total in ((5, 10.0, 25), (20, 25.0, 40), (36, 51.0, 36)):
        bar.on_step_end(None, state, None)
        assert (bar.training_bar.n, bar.training_bar.total) == (state.global_step, total)


def test_an_empty_budget_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        Budget(max_steps=0)


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
    monkeypatch.setattr(loop, "bf16_is_fast", lambda: fast)
    gradient, update = first_update(learning_rate=0.1)
    expected = -0.1 * 0.2 * max(SIZES) ** 0.5 * orthogonalised(gradient)
    error = float((update - expected).norm() / expected.norm())
    assert error < tolerance
    assert fast == (error > 1e-4)  # bfloat16 has 8 bits.


def test_dropping_checkpoints_keeps_the_files_of_others(tmp_path):
    for name in ("empty", "logged"):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)
        (tmp_path / name / "settings.json").write_text("{}")
    (tmp_path / "logged" / "runs").mkdir()
    for name in ("empty", "logged"):
        drop_checkpoints(tmp_path / name)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == [Path("logged"), Path("logged/runs")]
