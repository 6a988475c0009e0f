"""What the fields of a line say: text, token ids, messages; rendered by the chat template and encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.training.sources import FaultyLine, Line

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
ANY_VOCAB_SIZE = 2**31

Read = TypeVar("Read")


def each_line(lines: Iterable[Line], read: Callable[[Line], Read], skipped: list[str] | None) -> Iterator[Read]:
    """`read` of each line. Raises ValueError at the first faulty one, or describes it in `skipped` and goes on."""
    for line in lines:
        try:
            result = read(line)
        except FaultyLine as error:
            message = f"{line.where}: {error}."
            if skipped is None:
                raise ValueError(message) from error
            skipped.append(message)
        else:
            yield result


def messages_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of `messages` or of ShareGPT's `conversations`, at least one."""
    sharegpt = "messages" not in fields
    key, role, content = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    messages = fields[key]
    if not isinstance(messages, list) or not all(_is_message(message, role, content) for message in messages):
        raise FaultyLine(f"{key!r} must be a list of objects with {role!r} and {content!r}")
    if not messages:
        raise FaultyLine(f"{key!r} is empty")
    if sharegpt:
        return [_from_sharegpt(message) for message in messages]
    # Data sets fill absent fields with None, and templates ask whether a field is there.
    return [{k: v for k, v in message.items() if v is not None or k == content} for message in messages]


def _is_message(message: Any, role: str, content: str) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get(role), str):
        return False
    # A turn that only calls tools says nothing; templates would print the None of any other.
    return isinstance(message.get(content), str | list) or bool(message.get("tool_calls"))


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    if message["from"] not in SHAREGPT_ROLES:
        raise FaultyLine(f"'conversations' has 'from' {message['from']!r}, must be one of {sorted(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[message["from"]], "content": message.get("value")}


def string_of(fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise FaultyLine(f"{key!r} must be a string, is {type(value).__name__}")
    if not value:
        raise FaultyLine(f"{key!r} is empty")
    return value


def token_ids_of(fields: dict[str, Any], key: str) -> list[int]:
    value = fields.get(key)
    # No isinstance: true and false are ints to it.
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise FaultyLine(f"{key!r} must be a list of token ids")
    return value


def checked(token_ids: list[int], vocab_size: int) -> list[int]:
    if not token_ids:
        raise FaultyLine("has no tokens")
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise FaultyLine(f"has token id {token}, must be from 0 to {vocab_size - 1}")
    return token_ids


def encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes.
        raise FaultyLine(f"has text that is not Unicode ({error.reason})") from error
    return tokenizer(text, **options)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:  # None at all, or several and no default.
        return False


def render(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, generate: bool) -> str:
    """The chat template's text, special tokens included. Raises ValueError where the tokenizer has no template."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no default chat template, which 'messages' and "
            "'conversations' need. Put the model's chat_template.jinja into the tokenizer's folder (or set "
            "'chat_template' in its tokenizer_config.json), or give rows of 'text' and prompts of 'prompt'."
        ) from error
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=generate
            )
        )
    except Exception as error:  # Templates raise what they like: jinja's errors, ValueError, TypeError.
        raise FaultyLine(f"the tokenizer's chat template refuses the messages ({error})") from error
