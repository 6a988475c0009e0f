"""Without the name of a drafter the engine uses the one that belongs to its target."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.engine.conftest import complete, engine
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.drafter.lookup import OWN
from vllm_ctc_spec.engine.metrics import read_tree_metrics


@pytest.fixture
def target(pair: TinyPair, tmp_path: Path) -> Path:
    """A target with its drafter in its folder."""
    folder = tmp_path / "target"
    shutil.copytree(pair.target, folder)
    shutil.copytree(pair.drafter, folder / OWN)
    return folder


def test_the_targets_own_drafter_is_used_and_changes_no_token(
    pair: TinyPair, target: Path, plain: LLM, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    with engine(dataclasses.replace(pair, target=target), {"model": None}) as llm:
        assert complete(llm, prompts, params) == complete(plain, prompts, params)
        metrics = read_tree_metrics(llm)
    assert metrics is not None and metrics.acceptance_length > 1.3


@pytest.mark.parametrize("spec", [{"method": "ctc"}, {"model": OWN}, {"method": "ctc", "model": OWN}])
def test_each_way_to_ask_for_the_targets_own_drafter_works(target: Path, spec: dict[str, Any]) -> None:
    config = EngineArgs(model=str(target), speculative_config=spec).create_engine_config()
    assert config.additional_config["ctc_spec"]["drafter"] == str(target / OWN)
    assert config.speculative_config.num_speculative_tokens == 32


def served(target: Path, *arguments: str) -> Any:
    """The engine's configuration of `vllm serve TARGET` with these arguments."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    options = parser.parse_args(["serve", str(target), *arguments])
    options.model = options.model_tag
    return AsyncEngineArgs.from_cli_args(options).create_engine_config()


@pytest.mark.parametrize("name", [OWN, "path"])
def test_vllm_serve_takes_speculative_model(pair: TinyPair, target: Path, name: str) -> None:
    drafter = target / OWN if name == OWN else pair.drafter
    named = OWN if name == OWN else str(pair.drafter)
    config = served(target, "--speculative-model", named)
    assert config.additional_config["ctc_spec"]["drafter"] == str(drafter)
    assert config.speculative_config.num_speculative_tokens == 32
    shorter = served(target, "--spec-model", named, "--spec-tokens", "5")
    assert shorter.additional_config["ctc_spec"]["drafter"] == str(drafter)
    assert shorter.speculative_config.num_speculative_tokens == 5
