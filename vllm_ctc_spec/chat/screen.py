"""What the user sees: with tints in a terminal that has colours, else the plain text."""

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
"""One for each step in turn; the text is black, so that they are legible whatever the terminal's own colours are."""

FEW_COLOURS = tuple(Style.parse(colour) for colour in ("cyan", "magenta"))
"""For terminals with 16 colours, which have no soft ones."""

DIM = Style(dim=True)

_BREAKS = re.compile(r"([\n\t]+)")


class Screen:
    """Answers and trees go to the standard output. So do notes in a terminal; else they go to the standard error, so
    that what a program reads are the answers.
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
        """One step's text, in the next tint."""
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
                # In the tint, a line break would colour the rest of the line.
                self._write(part)
            else:
                self.console.out(part, end="", style=tint)

    def _write(self, text: str) -> None:
        """As it is, where rich would put spaces in the place of tabs."""
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
    """A target may write what a terminal takes for a command."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def line_reader(is_interactive: bool) -> Callable[[], str]:
    """Each call returns the next line that the user writes, and raises EOFError after the last.

    What is not UTF-8 is replaced: no tokenizer takes it.
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
                # As in a shell, the line is dropped.
                continue

    return read


def _piped_line() -> Callable[[], str]:
    def read() -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode(errors="replace")

    return read
