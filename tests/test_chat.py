"""`vllm-ctc-spec chat` without an engine: its output, its conversation and its commands."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_ctc_spec.chat.conversation import Conversation
from vllm_ctc_spec.chat.protocol import Chunk, Ended, Question, Sampling, VerifiedTree
from vllm_ctc_spec.chat.screen import Screen
from vllm_ctc_spec.chat.session import Session
from vllm_ctc_spec.cli import main

CODES = re.compile(r"\x1b\[([0-9;]*)m")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and m.content == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    words = ["user", "assistant", "system", "a", "b", "c", "?", "[UNK]"]
    whole = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, chat_template=TEMPLATE)


class ScriptedEngine:
    """Emits the steps that it is told to, for every question the same."""

    def __init__(self, *steps: tuple[str, int], reason: Any = "stop", at_step: Callable[[], None] = lambda: None):
        self.steps, self.reason, self.at_step = steps, reason, at_step
        self.prompts: list[list[int]] = []
        self.tree: VerifiedTree | None = None

    def answer(self, question: Question) -> Iterator[Chunk | Ended]:
        self.prompts.append(question.prompt)
        reason = self.reason
        self.is_stopped = False
        for text, num_tokens in self.steps:
            if self.is_stopped:
                reason = "abort"
                break
            self.at_step()
            yield Chunk(text, num_tokens)
        yield Ended(reason, 2.0)

    def stop_answer(self) -> None:
        self.is_stopped = True

    def last_tree(self) -> VerifiedTree | None:
        return self.tree


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")


def talk(
    engine: ScriptedEngine, tokenizer: Any, *lines: str, is_interactive: bool = False, max_model_len: int = 100
) -> Conversation:
    conversation = Conversation(tokenizer)
    remaining = iter(lines)

    def read() -> str:
        for line in remaining:
            return line
        raise EOFError

    Session(engine, conversation, Screen(is_interactive), Sampling(), max_model_len).run(read)
    return conversation


def tints(output: str) -> list[tuple[str, str]]:
    """(codes, text) of each run of text that has a background."""
    parts = CODES.split(output)
    return [(codes, text) for codes, text in zip(parts[1::2], parts[2::2]) if text and ";48;" in f";{codes}"]


@pytest.mark.usefixtures("colours")
def test_each_step_has_another_tint_than_the_one_before_and_line_breaks_have_none(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [("one", 1), (" two three", 2), ("", 1), (" four\n\nfive", 4), (" six", 1)]
    talk(ScriptedEngine(*steps), tokenizer, "a", is_interactive=True)
    output = capsys.readouterr().out
    assert "one two three four\n\nfive six\n" in CODES.sub("", output)
    tinted = tints(output)
    assert [text for _, text in tinted] == ["one", " two three", " four", "five", " six"]
    one, two, four, five, six = (codes for codes, _ in tinted)
    assert one != two != four == five != six


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_gets_plain_text(
    tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    engine = ScriptedEngine(("one", 1), (" two", 2))
    engine.tree = VerifiedTree(3, [4, 5, 4], [0, 0, 1], [1, 1, 2], [0.5, 0.25, 0.2], [1, 3], [4, 4, 5])
    talk(engine, tokenizer, "a", "/tree", is_interactive=True)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.startswith("one two\n3 tokens, 1.5 tokens/s, acceptance length 2.00\n")
    assert "'b'  0.200, taken" in output and "'c'  0.250\n" in output


def test_what_a_program_reads_is_the_answers_alone(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    talk(ScriptedEngine(("one \x1b[31m", 1), ("two", 1)), tokenizer, "a\n", "\n", "/nothing\n", "b\n", "/exit", "c\n")
    output = capsys.readouterr()
    assert output.out == "one \x1b[31mtwo\n" * 2
    assert "/nothing is no command" in output.err
    assert output.err.count("2 tokens, 1.0 tokens/s, acceptance length 1.00") == 2


def test_a_terminal_is_spared_what_it_would_obey(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    talk(ScriptedEngine(("a\x1b[2Jb\tc\r\n👩‍🚀 ", 1)), tokenizer, "a", is_interactive=True)
    assert capsys.readouterr().out.startswith("a[2Jb\tc\n👩‍🚀 \n")


def test_the_target_reads_the_whole_conversation_until_it_is_cleared(tokenizer: Any) -> None:
    engine = ScriptedEngine(("b ", 1), ("c", 1))
    talk(engine, tokenizer, "a", "b", "/clear", "c")
    assert [tokenizer.decode(prompt) for prompt in engine.prompts] == [
        "user a",
        "user a assistant b c user b",
        "user c",
    ]


def test_a_message_that_does_not_fit_is_left_out_and_the_conversation_goes_on(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(("b", 1))
    talk(engine, tokenizer, "a", "a a a a", "b", "/clear", "a a a a", max_model_len=8)
    assert [tokenizer.decode(prompt) for prompt in engine.prompts] == [
        "user a",
        "user a assistant b user b",
        "user a a a a",
    ]
    assert "has 9 tokens, and the context holds 8. The message is left out; /clear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("max_model_len", "message"),
    [(100, "cut at --max-tokens 1024"), (4, "cut because the context of 4 tokens is full")],
)
def test_a_cut_answer_says_what_cut_it(
    tokenizer: Any, capsys: pytest.CaptureFixture[str], max_model_len: int, message: str
) -> None:
    talk(ScriptedEngine(("b", 2), reason="length"), tokenizer, "a", max_model_len=max_model_len)
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_what_was_said_stays(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    presses = iter([True])
    engine = ScriptedEngine(
        ("b", 1), ("c", 1), at_step=lambda: os.kill(os.getpid(), signal.SIGINT) if next(presses, False) else None
    )
    before = signal.getsignal(signal.SIGINT)
    talk(engine, tokenizer, "a", "b", is_interactive=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert tokenizer.decode(engine.prompts[1]) == "user a assistant b user b"
    assert "b\n1 token, 0.5 tokens/s, acceptance length 1.00; stopped by Ctrl-C\n" in capsys.readouterr().out


def test_without_a_terminal_ctrl_c_ends_the_command(tokenizer: Any) -> None:
    # Python leaves the signal alone where its parent ignores it, as shells do for commands in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = ScriptedEngine(("b", 1), at_step=lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            talk(engine, tokenizer, "a", "b")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_target_that_cannot_chat_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"refuses the messages \(no such role\)\. Leave out --system"):
        Conversation(tokenizer, "refused")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no default chat template"):
        Conversation(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=-1"], "--temperature -1.0: use 0 (greedy) or a positive number"),
        (["--temperature=nan"], "--temperature nan"),
        (["--top-p=0"], "--top-p 0.0: use a number above 0 and up to 1"),
        (["--nodes=64"], "num_speculative_tokens=64"),
        (["--max-tokens=0"], "--max-tokens 0: use at least 1"),
        (["no/such/target", "no/such/drafter"], "'no/such/drafter' is not a folder"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
