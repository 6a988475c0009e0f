"""The reference loop, and `vllm-ctc-spec inspect`, which draws its trees."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_pair import TinyPair
from vllm_ctc_spec.cli import main
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.reference import decode


@pytest.mark.parametrize("tree", ["prefix", "template", "chain"])
def test_the_reference_loop_writes_what_greedy_decoding_writes(
    pair: TinyPair, prompts: list[list[int]], tree: str
) -> None:
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()
    drafter = load_drafter(str(pair.drafter), torch.float32)
    for prompt in prompts[3:6]:
        steps = list(islice(decode(target, drafter, prompt, 16, SpecOptions(tree=tree)), 10))
        written = [token for step in steps for token in step.tokens]
        plain = target.generate(
            torch.tensor([prompt]), max_new_tokens=len(written), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        assert written == plain[0, len(prompt) :].tolist()
        assert all(len(step.tokens) == len(step.accepted_nodes) + 1 for step in steps)
        assert len(written) > len(steps)


def test_inspect_draws_the_tree_into_the_terminal_and_a_file(
    pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "tree.png"
    arguments = ["inspect", str(pair.target), str(pair.drafter), "--prompt", "import os\n", "--nodes", "9"]
    assert main([*arguments, "--png", str(png)]) == 0
    shown = capsys.readouterr().out
    assert "anchor" in shown
    assert "9 nodes, expected tokens this step" in shown
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x", "--nodes", "70"], "num_speculative_tokens=70"),
        (["--prompt", "x", "--tree", "bush"], "tree='bush'"),
    ],
)
def test_inspect_refuses_invalid_arguments(
    pair: TinyPair, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["inspect", str(pair.target), str(pair.drafter), *arguments]) == 2
    assert message in capsys.readouterr().err
