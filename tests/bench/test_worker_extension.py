from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from vllm_ctc_spec.bench import worker_extension
from vllm_ctc_spec.bench.worker_extension import STAGES, BenchWorkerExtension


class Drafter:
    def propose(self) -> str:
        return "trees of " + self._build()

    def _build(self) -> str:
        return "frames"


class Runner:
    def __init__(self) -> None:
        self.drafter = Drafter()
        self.walker = lambda: "path"

    def _model_forward(self, row: int) -> int:
        return row + 1

    def _move_accepted(self) -> None:
        raise RuntimeError("full")


def test_stages_do_their_work_while_they_are_timed_and_are_themselves_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
):
    seconds = itertools.count()
    monkeypatch.setattr(worker_extension, "_now", lambda: next(seconds))
    worker, runner = BenchWorkerExtension(), Runner()
    worker.model_runner = runner
    before, walker = dict(vars(runner)), runner.walker
    worker.bench_start_clock()
    assert runner.walker is not walker
    assert (runner.drafter.propose(), runner.walker(), runner._model_forward(row=3)) == ("trees of frames", "path", 4)
    with pytest.raises(RuntimeError, match="full"):
        runner._move_accepted()
    times = worker.bench_stop_clock()
    assert tuple(times) == STAGES
    # Each reading of the clock adds a second. Drafting takes three seconds, and building, inside it, one of them.
    assert times == {"draft": 2000, "build": 1000, "verify": 1000, "walk": 1000, "K/V move": 1000}
    assert vars(runner) == before
    assert vars(runner.drafter) == {}


def test_a_runner_without_a_stage_is_left_as_it_was():
    worker = BenchWorkerExtension()
    worker.model_runner = SimpleNamespace(_model_forward=len, walker=len, drafter=None)
    with pytest.raises(AttributeError, match="_move_accepted"):
        worker.bench_start_clock()
    assert vars(worker.model_runner) == {"_model_forward": len, "walker": len, "drafter": None}
