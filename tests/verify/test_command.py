"""Bad input is refused before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from vllm_ctc_spec.cli import main

NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'


@pytest.fixture
def target(tmp_path: Path) -> Path:
    words = Tokenizer(models.WordLevel({str(index): index for index in range(30)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "target")
    LlamaConfig(vocab_size=30, max_position_embeddings=128).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the method to verify, for example --speculative-config"),
        (["--speculative-config", "{method: ngram}"], "is not JSON"),
        (["--speculative-config", "[]"], "must be a JSON object"),
        (["--speculative-config", '{"method": "ngram", "tokens": 3}'], "unknown key 'tokens' in --speculative-config"),
        (["--speculative-config", '{"method": "ctc", "num_speculative_tokens": 3}'], "no CTC drafter on this machine"),
        (["--speculative-config", NGRAM, "--engine", "dtyp=float16"], "unknown key 'dtyp' in --engine"),
        (["--speculative-config", NGRAM, "--engine", "model=x"], "--engine model: verify sets it itself"),
        (["--speculative-config", NGRAM, "--max-tokens", "3"], "--max-tokens 3: use at least 16"),
        (["--speculative-config", NGRAM, "--num-prompts", "0"], "--num-prompts 0"),
        (["--speculative-config", NGRAM, "--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--speculative-config", NGRAM, "--prompts", "/dev/null"], "holds no prompts"),
        (["--speculative-config", NGRAM, "--engine", "max_model_len=70"], "prompt 1 has"),
    ],
)
def test_what_is_wrong_is_named(
    target: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(target), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_target_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nothing"), "--speculative-config", NGRAM]) == 2
    assert "cannot be read" in capsys.readouterr().err
