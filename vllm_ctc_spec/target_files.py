"""Reads a target's config and tokenizer for the commands, with one clear error where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig


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
