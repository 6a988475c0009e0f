"""`vllm-ctc-spec chat` as a process with the real engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from tests.engine.conftest import complete
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.chat.conversation import Conversation
from vllm_ctc_spec.chat.engine import ChatEngine

ENGINE = ["--engine", "dtype=float32", "enforce_eager=true", "max_model_len=512"]
SAMPLING = ["--temperature=0.8", "--top-p=0.9", "--seed=5", "--max-tokens=60"]


@pytest.mark.slow
def test_the_answers_of_a_conversation_are_plain_vllms(pair: TinyPair, plain: LLM) -> None:
    messages = ["import os", "def main():"]
    command = [sys.executable, "-m", "vllm_ctc_spec.cli", "chat", str(pair.target), str(pair.drafter)]
    result = subprocess.run(
        [*command, "--no-adaptive-budget", *SAMPLING, *ENGINE],
        input="\n".join([*messages, "/tree"]),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=60)
    conversation = Conversation(AutoTokenizer.from_pretrained(pair.target))
    answers = []
    for message in messages:
        [answer] = complete(plain, [conversation.prompt(message)], params)
        conversation.add(message, answer.text)
        answers.append(answer.text if answer.text.endswith("\n") else f"{answer.text}\n")
    printed, tree = result.stdout[: len("".join(answers))], result.stdout[len("".join(answers)) :]
    assert printed == "".join(answers)
    assert "  anchor\n" in tree and "32 nodes, expected tokens this step" in tree
    assert result.stderr.count("acceptance length") == 2
    assert "\x1b" not in result.stdout + result.stderr


def test_an_invalid_setting_is_reported_in_one_sentence(pair: TinyPair, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    engine = ChatEngine(log)
    try:
        with pytest.raises(ValueError, match=r"^num_speculative_tokens=64: .* 1 to 63\. \(vLLM's log: .*vllm\.log\)$"):
            spec = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": 64}
            engine.start(str(pair.target), {"speculative_config": spec})
    finally:
        engine.close()
