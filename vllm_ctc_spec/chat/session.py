"""The conversation's loop: read a line, then run a command or stream an answer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_ctc_spec.chat.conversation import Conversation
from vllm_ctc_spec.chat.protocol import Chunk, Ended, Question, Sampling, VerifiedTree
from vllm_ctc_spec.chat.screen import Screen
from vllm_ctc_spec.inspection import DrawnTree

HELP = """\
/tree    the last token tree that the target verified: prefix probabilities and accepted tokens
/clear   begin a new conversation
/help    this text
/exit    end, as Ctrl-D does
Ctrl-C stops an answer. Each decoding step's tokens have their own background colour.
tokens/s counts from the question to the answer's last token; the acceptance length is the mean number of tokens per
decoding step, steps without a draft included."""


class Engine(Protocol):
    """What a session needs of `ChatEngine`."""

    def answer(self, question: Question) -> Iterator[Chunk | Ended]: ...

    def stop_answer(self) -> None: ...

    def last_tree(self) -> VerifiedTree | None: ...


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    num_steps: int
    """Decoding steps that emitted tokens; the first one read the prompt."""
    end: Ended

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per decoding step, without the step that read the prompt, which cannot draft."""
        return (self.num_tokens - 1) / (self.num_steps - 1) if self.num_steps > 1 else 1.0

    def __str__(self) -> str:
        if not self.num_tokens:
            return "no tokens"
        noun = "token" if self.num_tokens == 1 else "tokens"
        return (
            f"{self.num_tokens} {noun}, {self.num_tokens / self.end.seconds:.1f} tokens/s, "
            f"acceptance length {self.acceptance_length:.2f}"
        )


class Session:
    """max_model_len: the context, in tokens; a message that does not fit is left out."""

    def __init__(
        self, engine: Engine, conversation: Conversation, screen: Screen, sampling: Sampling, max_model_len: int
    ) -> None:
        self._engine = engine
        self._conversation = conversation
        self._screen = screen
        self._sampling = sampling
        self._max_model_len = max_model_len

    def run(self, read: Callable[[], str]) -> None:
        """Runs until /exit or the end of the input. read: see `screen.line_reader`."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            if line == "/exit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, name: str) -> None:
        if name == "/tree":
            self._show_tree()
        elif name == "/clear":
            self._conversation.clear()
            self._screen.note("new conversation")
        elif name == "/help":
            self._screen.show_text(HELP)
        else:
            self._screen.note(f"{name.split()[0]} is no command; /help lists them.")

    def _show_tree(self) -> None:
        tree = self._engine.last_tree()
        if tree is None:
            self._screen.note("no step has drafted a tree yet")
        else:
            self._screen.show_tree(drawn(tree, self._conversation.tokenizer))

    def _answer(self, message: str) -> None:
        prompt = self._conversation.prompt(message)
        if len(prompt) >= self._max_model_len:
            self._screen.note(
                f"With this message the conversation has {len(prompt)} tokens, and the context holds "
                f"{self._max_model_len}. The message is left out; /clear begins a new conversation."
            )
            return
        answer = self._stream(Question(prompt, self._sampling))
        self._conversation.add(message, answer.text)
        self._screen.end_answer(f"{answer}{self._ending(answer, len(prompt))}")

    def _stream(self, question: Question) -> Answer:
        text: list[str] = []
        num_tokens = 0
        is_stopped = False
        self._screen.begin_answer()
        # Without a terminal, Ctrl-C ends the whole command.
        with interrupts() if self._screen.is_interactive else nullcontext(lambda: False) as wants_stop:
            for message in self._engine.answer(question):
                if isinstance(message, Ended):
                    return Answer("".join(text), num_tokens, len(text), message)
                text.append(message.text)
                num_tokens += message.num_tokens
                self._screen.show_step(message.text)
                if wants_stop() and not is_stopped:
                    self._engine.stop_answer()
                    is_stopped = True
        raise AssertionError("an answer without an end")

    def _ending(self, answer: Answer, prompt_length: int) -> str:
        if answer.end.reason == "abort":
            return "; stopped by Ctrl-C"
        if answer.end.reason != "length":
            return ""
        if prompt_length + answer.num_tokens >= self._max_model_len:
            return (
                f"; cut because the context of {self._max_model_len} tokens is full: /clear begins a new conversation"
            )
        return f"; cut at --max-tokens {self._sampling.max_tokens}"


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; a second press raises KeyboardInterrupt.

    Raising at the first press could leave a message of the engine's process half read.
    """
    num_presses = 0

    def press(*_: Any) -> None:
        nonlocal num_presses
        num_presses += 1
        if num_presses > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: num_presses > 0
    finally:
        signal.signal(signal.SIGINT, previous)


def drawn(tree: VerifiedTree, tokenizer: Any) -> DrawnTree:
    """`tree` with decoded tokens, for `Screen.show_tree`."""
    return DrawnTree(
        [tokenizer.decode([token]) for token in (tree.anchor, *tree.tokens)],
        [0, *tree.parents],
        [0, *tree.depths],
        [1.0, *tree.probabilities],
        {0, *tree.accepted},
        tokenizer.decode(tree.emitted),
    )
