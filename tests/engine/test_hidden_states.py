"""Hidden states from an engine are those of the model in the process, and train the same drafter. It may be killed."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import IN_CORE
from tests.engine.quantized import quantize
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.cli import main
from vllm_ctc_spec.files import write_atomically
from vllm_ctc_spec.training import fit as fit_module
from vllm_ctc_spec.training import hidden_cache, models
from vllm_ctc_spec.training.card import training_record
from vllm_ctc_spec.training.data import TrainingRow
from vllm_ctc_spec.training.hidden_cache import HiddenCache, plan_shards, write_cache
from vllm_ctc_spec.training.hidden_sources import FromEngine, InProcess
from vllm_ctc_spec.training.models import load_target, load_without_layers
from vllm_ctc_spec.training.objective import target_hidden

pytestmark = pytest.mark.slow

NUM_ROWS = 48
FIT = ["--steps=5", "--frames=4", "--rank=16", "--trainer", "bf16=false"]
# Longer rows are computed in several steps.
ENGINE = ["kv_cache_memory_bytes=134217728", "max_model_len=512", "max_num_batched_tokens=48"]
ONE_PROCESS, TWO_RANKS = f"distributed_executor_backend={IN_CORE}", "tensor_parallel_size=2"
SHARD_BYTES = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def float32_on_any_cores() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "target_dtype", lambda: torch.float32)
        # For two ranks vLLM would look for two NUMA nodes.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@dataclass
class Resumed:
    """A fit whose engine was killed once."""

    rows_file: Path
    cache: Path
    drafter: Path
    error: str = ""
    written: list[list[str]] = field(default_factory=list)
    """Names of the shards that each run wrote."""
    trained: list[TrainingRow] = field(default_factory=list)
    """The cache's rows, those to calibrate on among them."""
    layers: Sequence[int] = ()


@pytest.fixture(scope="module")
def resumed(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The engine is killed after two shards; the second run has two ranks."""
    folder = tmp_path_factory.mktemp("hidden")
    run = Resumed(folder / "rows.jsonl", folder / "cache", folder / "drafter")
    run.rows_file.write_text("".join(pair.rows.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    others = set(multiprocessing.active_children())

    def write(path: Path, contents: bytes) -> None:
        write_atomically(path, contents)
        if path.suffix == ".safetensors":
            run.written[-1].append(path.name)
        if len(run.written) == 1 and len(run.written[0]) == 2:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()

    def note(cache: Path, source: Any, target: str, rows: list[TrainingRow], layers: Sequence[int]) -> None:
        run.trained, run.layers = rows, layers
        write_cache(cache, source, target, rows, layers)

    command = ["train", "fit", str(pair.target), str(run.rows_file), str(run.drafter), *FIT, f"--cache={run.cache}"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed:
        patch.setattr(hidden_cache, "plan_shards", lambda lengths, size, most: plan_shards(lengths, size, SHARD_BYTES))
        patch.setattr(hidden_cache, "write_atomically", write)
        patch.setattr(fit_module, "write_cache", note)
        for ranks, result in ((ONE_PROCESS, 2), (TWO_RANKS, 0)):
            run.written.append([])
            assert main([*command, "--hidden-from-engine", *ENGINE, ranks]) == result, printed.getvalue()
            run.error = run.error or printed.getvalue()
    return run


def test_a_killed_engine_is_one_error_and_whole_shards_stay(resumed: Resumed) -> None:
    assert "vLLM's engine failed (EngineDeadError: " in resumed.error
    assert "run the same command again" in resumed.error
    first, second = resumed.written
    assert len(first) == 2 and len(second) > 2
    assert sorted(first + second) == sorted(path.name for path in resumed.cache.glob("hidden-*.safetensors"))


def test_the_states_are_those_of_the_model_in_the_process(pair: TinyPair, resumed: Resumed) -> None:
    target = load_target(str(pair.target))
    cached = HiddenCache(resumed.cache, str(pair.target), resumed.trained, torch.float32, resumed.layers, {})
    lengths = {len(row.token_ids) for row in resumed.trained}
    assert len(cached) == NUM_ROWS and len(lengths) > 5 and max(lengths) > 48
    assert len(resumed.layers) > 0
    for number, row in enumerate(resumed.trained):
        alone = target_hidden(target, row.token_ids[None], resumed.layers)[0]
        torch.testing.assert_close(cached[number], alone, atol=1e-4, rtol=1e-4)


def test_the_drafter_is_the_one_that_the_model_in_the_process_trains(
    pair: TinyPair, resumed: Resumed, tmp_path: Path
) -> None:
    command = ["train", "fit", str(pair.target), str(resumed.rows_file), str(tmp_path / "drafter"), *FIT]
    assert main(command) == 0
    ours, expected = (load_file(folder / "model.safetensors") for folder in (resumed.drafter, tmp_path / "drafter"))
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-3, rtol=1e-3)
    factors = [training_record(folder)["calibration_factor"] for folder in (resumed.drafter, tmp_path / "drafter")]
    assert factors[0] == pytest.approx(factors[1], rel=0.02) and factors[0] != 1
    few = tmp_path / "few.jsonl"
    few.write_text("".join(resumed.rows_file.read_text().splitlines(keepends=True)[:4]))
    evaluate = ["train", "evaluate", str(pair.target), str(resumed.drafter), str(few), f"--json={tmp_path / 'json'}"]
    assert main(evaluate) == 0
    assert json.loads((tmp_path / "json").read_text())["few"]["num_anchors"] > 0


def test_a_quantized_target_trains_by_its_own_states(pair: TinyPair, tmp_path: Path) -> None:
    path = str(tmp_path / "w8a8")
    quantize(pair.target, "compressed-tensors W8A8", tmp_path / "w8a8")
    with pytest.raises(ValueError, match=r"transformers misses 14 of its weights, .*--hidden-from-engine"):
        load_target(path)
    plain, quantized = load_target(str(pair.target)), load_without_layers(path)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(quantized, get)().weight, getattr(plain, get)().weight)
    with pair.rows.open() as lines:
        rows = [torch.tensor(json.loads(next(lines))["token_ids"]) for _ in range(4)]
    options = {"kv_cache_memory_bytes": 1 << 27, "max_model_len": 512, "distributed_executor_backend": IN_CORE}
    states, likelihoods = [], []
    for source in (FromEngine(quantized, path, options), InProcess(plain)):
        with source.started([len(row) for row in rows], (), lambda count: None) as compute:
            states.append(compute(rows))
        logp = plain.get_output_embeddings()(states[-1][:-1]).log_softmax(-1)
        likelihoods.append(float(logp.gather(1, torch.cat(rows)[1:, None]).detach().mean()))
    apart = (states[0] - states[1]).norm() / states[1].norm()
    # vLLM's kernels for a CPU round more than eight bits have to.
    assert 0.005 < apart < 0.4
    assert likelihoods[0] == pytest.approx(likelihoods[1], abs=0.1)
