"""The target's own continuations as training rows, written as they come and resumed without loss."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, list[int]]


@dataclass(frozen=True)
class RegenerateSettings:
    temperatures: tuple[float, ...] = (0.8,)
    """Prompt i is continued at temperature i modulo their number; for the drafter, those that will be served."""
    samples: int = 1
    """Continuations of each prompt."""
    explore: float | None = None
    """Temperature at which all but a prompt's first continuation begin, up to a random token that only then is
    continued at the temperature to be served: a greedy target has one answer to a prompt, and many from within one."""
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
    from vllm_ctc_spec.engine.lifetime import started

    # A resumed engine must not draw again what the killed one drew for other copies of the same prompts.
    with started(target_path, seed=settings.seed + num_done, **engine_options) as llm:
        for start in range(num_done, num_rows, settings.chunk_size):
            chunk = range(start, min(start + settings.chunk_size, num_rows))
            begun = [prompts[i % len(prompts)] for i in chunk]
            if settings.explore is not None:
                copies = [k for k, i in enumerate(chunk) if i >= len(prompts)]
                temperatures = [settings.explore] * len(copies)
                explored = _continue(llm, [begun[k] for k in copies], temperatures, settings.max_tokens)
                for k, tokens in zip(copies, explored, strict=True):
                    begun[k] = begun[k] + tokens[: _cut(chunk[k], len(tokens), settings)]
            temperatures = [settings.temperatures[i % len(settings.temperatures)] for i in chunk]
            continued = _continue(llm, begun, temperatures, settings.max_tokens)
            append_rows(
                output,
                [
                    {"prompt_token_ids": prompt, "token_ids": tokens}
                    for prompt, tokens in zip(begun, continued, strict=True)
                ],
            )


def _cut(row: int, num_explored: int, settings: RegenerateSettings) -> int:
    return random.Random(f"{settings.seed} {row}").randrange(max(num_explored, 1))


def _continue(llm: Any, prompts: list[list[int]], temperatures: list[float], max_tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = [SamplingParams(temperature=temperature, max_tokens=max_tokens) for temperature in temperatures]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters)
    return [list(output.outputs[0].token_ids) for output in outputs]


def resume_rows(path: Path, prompts: Sequence[list[int]], num_rows: int) -> int:
    """Count the whole lines of `path`, cutting off a last line that a kill left incomplete.

    Raises ValueError if a line belongs to another prompt than its number says: the file is another run's.
    """
    if not path.exists():
        return 0
    whole = num_bytes = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            prompt = prompts[whole % len(prompts)]
            if whole >= num_rows or json.loads(line)["prompt_token_ids"][: len(prompt)] != prompt:
                raise ValueError(
                    f"{path}, line {whole + 1} continues another prompt than number {whole + 1} of this run. "
                    "Write to a new file, or use the prompts that it was started with."
                )
            whole += 1
            num_bytes += len(line)
        file.truncate(num_bytes)
    return whole


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append one line per row; on return they are on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
