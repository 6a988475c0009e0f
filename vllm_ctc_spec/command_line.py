"""Argument types that several commands share."""

from __future__ import annotations

import argparse
import json
from typing import Any


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
