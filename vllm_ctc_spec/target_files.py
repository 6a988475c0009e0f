"""Reads a target's config and tokenizer for the commands, with one clear error where that fails, or where a drafter is
not the target's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from vllm_ctc_spec.config import CTCDrafterConfig


def read_text_config(target: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Of the part of the target that reads text.

    target: folder, or name on the Hugging Face hub. trust_remote_code: run the code that it brings. Raises ValueError.
    """
    with _one_error(target):
        return AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code).get_text_config()


def read_tokenizer(target: str, trust_remote_code: bool = False) -> Any:
    """Arguments and errors as of `read_text_config`."""
    with _one_error(target):
        return AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code)


def check_sizes(drafter: str, config: CTCDrafterConfig, target: str, text: PretrainedConfig) -> None:
    """Raises ValueError where the drafter cannot be the target's. text: from `read_text_config`."""
    for size in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(config, size), getattr(text, size)
        if ours != theirs:
            raise ValueError(
                f"drafter {drafter!r} has {size} {ours}, but the target {target!r} has {theirs}: it was trained for "
                "another target. Name a drafter of this target."
            )


@contextmanager
def _one_error(target: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "Give a model folder, or a name on the Hugging Face hub."
        if "trust_remote_code" in str(error):
            remedy = "If you trust this code, add --trust-remote-code."
        raise ValueError(f"target {target!r} cannot be read ({reason}). {remedy}") from error
