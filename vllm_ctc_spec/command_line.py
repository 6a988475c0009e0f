"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the target's folder or repository brings"
    )


def given_engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `vllm.LLM` that were given with --engine and --trust-remote-code."""
    trust = {"trust_remote_code": True} if options.trust_remote_code else {}
    return {**dict(options.engine), **trust}


def setting(text: str) -> tuple[str, Any]:
    """(key, value) of KEY=VALUE; the value is parsed as JSON, or a string if it is no JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: write '{{\"NAME\": VALUE}}'")
    return value
