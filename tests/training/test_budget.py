"""The schedule ends with the budget, whichever of its two ends comes first."""

from types import SimpleNamespace

import pytest

from vllm_ctc_spec.training.budget import FINAL_RATE, Budget, BudgetBar, BudgetCallback


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
