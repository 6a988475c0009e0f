"""A conversation's messages, rendered to token ids by the target's chat template."""

from __future__ import annotations

from typing import Any


class Conversation:
    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        """tokenizer: from transformers. Raises ValueError if it has no chat template, or one that refuses `system`."""
        self.tokenizer = tokenizer
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, str]] = []
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"target {tokenizer.name_or_path!r} has no default chat template, so it cannot hold a conversation. "
                "Name a chat model, or put the model's chat_template.jinja into its folder."
            ) from error
        self._render([{"role": "user", "content": "?"}])

    def prompt(self, message: str) -> list[int]:
        """Token ids of the conversation with the user's next message, which is not kept before `add`."""
        text = self._render([*self._messages, {"role": "user", "content": message}])
        # The chat template writes the special tokens itself.
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def add(self, message: str, answer: str) -> None:
        self._messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self._messages.clear()

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [*self._opening, *messages],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # Templates raise what they like: jinja's errors, ValueError, TypeError.
            remedy = " Leave out --system." if self._opening else ""
            raise ValueError(
                f"the chat template of target {self.tokenizer.name_or_path!r} refuses the messages ({error}).{remedy}"
            ) from error
