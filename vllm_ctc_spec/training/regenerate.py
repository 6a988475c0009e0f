"""Rows and prompts that the target writes with vLLM. A killed run loses at most one chunk of lines."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_ctc_spec.files import claim_file
from vllm_ctc_spec.kv_cache import context_length
from vllm_ctc_spec.kv_cache import engine_options as complete
from vllm_ctc_spec.training.prompts import Question, turn_prompt
from vllm_ctc_spec.training.sources import FaultyLine, Line, each_line, token_ids_of


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
    to `vllm.LLM`; what they leave open is chosen by `kv_cache.engine_options`. Raises ValueError if `output` holds rows
    of other prompts, another target or other settings.
    """
    settings = settings or RegenerateSettings()
    prompts = [list(prompt) for prompt in prompts]
    num_rows = len(prompts) * settings.samples
    num_done = resume_rows(output, prompts, num_rows)
    claim_file(output, _resumable(target_path, settings))
    if num_done == num_rows:
        return
    lengths = [len(prompts[i % len(prompts)]) + settings.max_tokens for i in range(num_done, num_rows)]
    options = complete(target_path, lengths, engine_options)
    # Training must be importable without vLLM's start-up time and plugins.
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started

    # A resumed engine must not draw again what the killed one drew for other copies of the same prompts.
    with started(target_path, seed=settings.seed + num_done, **options) as llm:
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


def all_turns(
    target_path: str,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: RegenerateSettings,
    **engine_options: Any,
) -> list[list[int]]:
    """Prompts of every turn of `questions`, all first turns first.

    Between the turns stand the target's answers at the first temperature, which are kept in `<output>.turn1.jsonl` and
    so on. A turn that does not fit into the context is left out, and those after it.
    """
    served = dataclasses.replace(settings, temperatures=settings.temperatures[:1], samples=1)
    trust = engine_options.get("trust_remote_code", False)
    context = engine_options.get("max_model_len") or context_length(target_path, trust)
    prompts = [list(question.first) for question in questions]
    asked = {i: prompts[i] for i, question in enumerate(questions) if question.later_turns}
    answers: dict[int, list[list[int]]] = {i: [] for i in asked}
    turn = 0
    while asked:
        turn += 1
        path = output.with_suffix(f".turn{turn}.jsonl")
        regenerate(target_path, list(asked.values()), path, served, **engine_options)
        for i, line in zip(asked, whole_lines(path)):
            answers[i].append(json.loads(line)["token_ids"])
        later = {i: turn_prompt(questions[i], answers[i], tokenizer) for i in asked}
        fitting = {i: list(prompt) for i, prompt in later.items() if prompt is not None and len(prompt) < context}
        prompts += fitting.values()
        asked = {i: prompt for i, prompt in fitting.items() if len(questions[i].later_turns) > turn}
    return prompts


def _resumable(target_path: str, settings: RegenerateSettings) -> dict[str, Any]:
    """What must not change between a killed run and the one that goes on; more samples only add rows."""
    fields = dataclasses.asdict(settings)
    return {"target": str(target_path), **{name: fields[name] for name in ("temperatures", "max_tokens", "seed")}}


def _temperature(row: int, num_prompts: int, settings: RegenerateSettings) -> float:
    """Neighbours differ, and so do the continuations of one prompt, whatever the number of prompts."""
    return settings.temperatures[(row % num_prompts + row // num_prompts) % len(settings.temperatures)]


def resume_rows(path: Path, prompts: Sequence[list[int]], num_rows: int) -> int:
    """Count the whole lines of `path`, cutting off a last line that a kill left incomplete.

    Raises ValueError if a line is no row, or belongs to another prompt than its number says: the file is another run's.
    """
    lines = whole_lines(path)
    rows = each_line((Line(f"{path}, line {i}", line) for i, line in enumerate(lines, start=1)), _prompt_of, None)
    for number, continued in enumerate(rows):
        if number >= num_rows or continued != prompts[number % len(prompts)]:
            raise ValueError(
                f"{path}, line {number + 1} continues another prompt than number {number + 1} of this run. "
                "Write to a new file, or use the prompts that it was started with."
            )
    return len(lines)


def _prompt_of(line: Line) -> list[int]:
    try:
        fields = line.fields()
        token_ids_of(fields, "token_ids")
        return token_ids_of(fields, "prompt_token_ids")
    except FaultyLine as error:
        raise FaultyLine(f"{error}, so it is no row of this command. Repair it, or write to a new file") from error


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


TEMPERATURE = 0.8
MAX_TOKENS = 256
"""Of a prompt; one that does not end by then is dropped."""

SMALLEST_CHUNK, LARGEST_CHUNK = 64, 1024
"""Prompts written together, and lost together when the process is killed."""

SMALLEST_SHARE = 0.05
"""Of a chunk that must be usable: a target below it does not write prompts."""

_CONTENT = "\N{WHITE SQUARE}"


def write_own_prompts(target_path: str, count: int, output: Path, seed: int = 0, **engine_options: Any) -> None:
    """Write `count` lines of `messages`, each with one user turn, to `output`; lines that it already holds are kept.

    `engine_options` go to `vllm.LLM`; what they leave open is chosen by `kv_cache.engine_options`. Raises ValueError
    where the target has no chat template, or writes no prompts, or `output` holds those of another target or seed.
    """
    before, after = around_user_turn(target_path, engine_options.get("trust_remote_code", False))
    num_done = len(whole_lines(output))
    claim_file(output, {"target": str(target_path), "seed": seed})
    if num_done >= count:
        return
    options = complete(target_path, [len(before) + MAX_TOKENS] * LARGEST_CHUNK, engine_options)
    # Training must be importable without vLLM's start-up time and plugins.
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started

    parameters = SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_TOKENS, stop=after)
    # A resumed engine must not draw again what the killed one drew.
    with started(target_path, seed=seed + num_done, **options) as llm:
        while num_done < count:
            size = min(max(2 * (count - num_done), SMALLEST_CHUNK), LARGEST_CHUNK)
            outputs = llm.generate([{"prompt_token_ids": before}] * size, parameters)
            ended = {done.outputs[0].text.strip() for done in outputs if done.outputs[0].finish_reason == "stop"}
            texts = sorted(ended - {""})
            if len(texts) < SMALLEST_SHARE * size:
                raise ValueError(
                    f"--own-prompts {count}: of {size} user turns that target {target_path!r} was to write, it "
                    f"ended {len(texts)}. It has not learned to write them; give it prompts."
                )
            written = [{"messages": [{"role": "user", "content": text}]} for text in texts[: count - num_done]]
            append_rows(output, written)
            num_done += len(written)


def around_user_turn(target_path: str, trust_remote_code: bool = False) -> tuple[list[int], list[str]]:
    """Token ids that the chat template puts before a user's words, and how it goes on behind them: its first line, or
    nothing where only an end-of-text token stands there."""
    tokenizer = AutoTokenizer.from_pretrained(target_path, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"--own-prompts: target {target_path!r} has no chat template. Give it prompts instead.")
    messages = [{"role": "user", "content": _CONTENT}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, _, after = text.partition(_CONTENT)
    # Most tokenizers join a space with the word behind it.
    return tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"], after.strip().splitlines()[:1]
