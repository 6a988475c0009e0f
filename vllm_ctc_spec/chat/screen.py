"""Terminal output and input: a colour for each decoding step, or plain text without colours."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from itertools import cycle

from rich.console import Console
from rich.style import Style

from vllm_ctc_spec.inspection import DrawnTree, summary, to_terminal

TINTS = tuple(Style.parse(f"black on {colour}") for colour in ("#c8dcf4", "#f6dcc0", "#cfe8cc"))
"""Styles of successive steps. The text is black, so that it is legible on them in any colour scheme."""

FEW_COLOURS = tuple(Style.parse(colour) for colour in ("cyan", "magenta"))
"""For terminals with 16 colours, which have no light backgrounds."""

DIM = Style(dim=True)

_BREAKS = re.compile(r"([\n\t]+)")


class Screen:
    """Answers and trees go to the standard output. Notes do so only in a terminal; otherwise they go to the standard
    error, so that a program reads nothing but answers.
    """

    def __init__(self, is_interactive: bool) -> None:
        self.is_interactive = is_interactive
        found = Console(highlight=False)
        self.has_colours = found.color_system is not None and not found.no_color and not found.is_dumb_terminal
        # A console without a colour system writes no codes at all.
        self.console = found if self.has_colours else Console(highlight=False, color_system=None)
        self._notes = self.console if is_interactive else Console(highlight=False, color_system=None, stderr=True)
        self._tints = FEW_COLOURS if found.color_system == "standard" else TINTS
        self.begin_answer()

    def begin_answer(self) -> None:
        self._next_tint = cycle(self._tints)
        self._at_line_start = True

    def show_step(self, text: str) -> None:
        """Print the text of one step, in the next tint."""
        tint = next(self._next_tint)
        if self.is_interactive:
            text = without_control_characters(text)
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        if not self.has_colours:
            self._write(text)
            return
        for part in _BREAKS.split(text):
            if _BREAKS.match(part):
                # A line break within a tint would colour the rest of the line.
                self._write(part)
            else:
                self.console.out(part, end="", style=tint)

    def _write(self, text: str) -> None:
        """Without rich, which would replace tabs by spaces."""
        self.console.file.write(text)
        self.console.file.flush()

    def end_answer(self, note: str) -> None:
        if not self._at_line_start:
            self.console.out("")
        self.note(note)
        if self.is_interactive:
            self.console.out("")

    def note(self, text: str) -> None:
        self._notes.out(text, style=DIM if self.has_colours else None)

    def show_text(self, text: str) -> None:
        self.console.out(text)

    def show_tree(self, drawn: DrawnTree) -> None:
        self.console.print(to_terminal(drawn))
        self.console.print(summary(drawn), soft_wrap=True)


def without_control_characters(text: str) -> str:
    """Without characters that a terminal may take for a command; line breaks and tabs stay."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def line_reader(is_interactive: bool) -> Callable[[], str]:
    """Each call returns the next line that the user writes, and raises EOFError after the last.

    Bytes that are not UTF-8 are replaced, because no tokenizer takes them.
    """
    return _edited_line() if is_interactive else _piped_line()


def _edited_line() -> Callable[[], str]:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ")

    def read() -> str:
        while True:
            try:
                return session.prompt().encode(errors="replace").decode()
            except KeyboardInterrupt:
                # Ctrl-C drops the line, as in a shell.
                continue

    return read


def _piped_line() -> Callable[[], str]:
    def read() -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode(errors="replace")

    return read
