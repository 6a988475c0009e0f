"""The target's own continuations as training rows, written as they come and resumed without loss."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RegenerateSettings:
    temperatures: tuple[float, ...] = (0.0,)
    """A prompt's continuations take them in turn. Those to be served, and around them what varies the text."""
    samples: int = 1
    """Continuations of each prompt."""
    max_tokens: int = 256
    chunk_size: int = 512
    """Rows that are generated together, and lost together when the process is killed."""
    seed: int = 0


def regenerate(
    target_path: str,
    prompts: Sequence[list[int]],
    output: Path,
    settings: RegenerateSettings | None = None,
    **engine_options: Any,
) -> None:
    """Continue `prompts` (token ids) with plain vLLM and write `prompt_token_ids`, `token_ids` lines to `output`.

    Line i belongs to prompt i modulo their number; lines that `output` already holds are kept. `engine_options` go
    to `vllm.LLM`.
    """
    settings = settings or RegenerateSettings()
    prompts = [list(prompt) for prompt in prompts]
    num_rows = len(prompts) * settings.samples
    num_done = resume_rows(output, prompts, num_rows)
    if num_done == num_rows:
        return
    # Training must be importable without vLLM's start-up time and plugins.
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started

    # A resumed engine must not draw again what the killed one drew for other copies of the same prompts.
    with started(target_path, seed=settings.seed + num_done, **engine_options) as llm:
        for start in range(num_done, num_rows, settings.chunk_size):
            chunk = range(start, min(start + settings.chunk_size, num_rows))
            continued = [prompts[i % len(prompts)] for i in chunk]
            parameters = [
                SamplingParams(temperature=_temperature(i, len(prompts), settings), max_tokens=settings.max_tokens)
                for i in chunk
            ]
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in continued], parameters)
            rows = [
                {"prompt_token_ids": prompt, "token_ids": list(done.outputs[0].token_ids)}
                for prompt, done in zip(continued, outputs, strict=True)
            ]
            append_rows(output, rows)


def _temperature(row: int, num_prompts: int, settings: RegenerateSettings) -> float:
    """Neighbours differ, and so do the continuations of one prompt, whatever the number of prompts."""
    return settings.temperatures[(row % num_prompts + row // num_prompts) % len(settings.temperatures)]


def resume_rows(path: Path, prompts: Sequence[list[int]], num_rows: int) -> int:
    """Count the whole lines of `path`, cutting off a last line that a kill left incomplete.

    Raises ValueError if a line belongs to another prompt than its number says: the file is another run's.
    """
    lines = whole_lines(path)
    for number, line in enumerate(lines):
        prompt = prompts[number % len(prompts)]
        if number >= num_rows or json.loads(line)["prompt_token_ids"] != prompt:
            raise ValueError(
                f"{path}, line {number + 1} continues another prompt than number {number + 1} of this run. "
                "Write to a new file, or use the prompts that it was started with."
            )
    return len(lines)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of `path`, none if it does not exist; a last line that a kill left incomplete is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return whole.splitlines()


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one line per row; on return they are on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
