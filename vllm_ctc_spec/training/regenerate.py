"""Lets the target write training rows and prompts, with vLLM. A killed run loses at most one chunk of lines."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_ctc_spec.files import claim_file, cut_incomplete_line
from vllm_ctc_spec.kv_cache import context_length
from vllm_ctc_spec.kv_cache import engine_options as complete_options
from vllm_ctc_spec.training.prompts import Question, turn_prompt
from vllm_ctc_spec.training.sources import ChatTemplate, FaultyLine, Line, parse_lines, token_ids_of


@dataclass(frozen=True)
class RegenerateSettings:
    temperatures: tuple[float, ...] = (0.0,)
    """The continuations of a prompt take them in turn. Use the temperatures that will be served."""
    samples: int = 1
    """Continuations of each prompt."""
    max_tokens: int = 256
    """Most tokens of a continuation."""
    chunk_size: int = 512
    """Rows that are generated together, and lost together when the process is killed."""
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template. `regenerate` only records them: its prompts are token ids."""


def regenerate(
    target_path: str,
    prompts: Sequence[list[int]],
    output: Path,
    settings: RegenerateSettings | None = None,
    **engine_options: Any,
) -> None:
    """Continue `prompts` (token ids) with plain vLLM and append JSON lines of `prompt_token_ids` and `token_ids`.

    Line i of `output` continues prompt i modulo the number of prompts; existing lines are kept. engine_options: of
    `vllm.LLM`; `kv_cache.engine_options` chooses the others. Raises ValueError if `output` holds rows of other prompts,
    another target or other settings.
    """
    settings = settings or RegenerateSettings()
    prompts = [list(prompt) for prompt in prompts]
    num_rows = len(prompts) * settings.samples
    num_done = resume_rows(output, prompts, num_rows)
    claim_file(output, _resumable(target_path, settings))
    if num_done == num_rows:
        return
    lengths = [len(prompts[i % len(prompts)]) + settings.max_tokens for i in range(num_done, num_rows)]
    options = complete_options(target_path, lengths, engine_options)
    # Importing vLLM takes seconds and loads its plugins, which training without it should not.
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started

    # With the same seed a resumed engine would repeat what the killed one drew for earlier copies of a prompt.
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
    """Token ids of the prompts of every turn of `questions`: all first turns, then all second turns and so on.

    A later turn follows the target's answers to the turns before it, at the first temperature. They are kept in
    `<output>.turn1.jsonl` and so on. A turn that does not fit into the context is left out, as are those after it.
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
        later = {i: turn_prompt(questions[i], answers[i], tokenizer, settings.chat_template_kwargs) for i in asked}
        fitting = {i: list(prompt) for i, prompt in later.items() if prompt is not None and len(prompt) < context}
        prompts += fitting.values()
        asked = {i: prompt for i, prompt in fitting.items() if len(questions[i].later_turns) > turn}
    return prompts


def _resumable(target_path: str, settings: RegenerateSettings) -> dict[str, Any]:
    """Settings that a resumed run must share with the killed one. Others may change: more samples only add rows."""
    fields = dataclasses.asdict(settings)
    names = ("temperatures", "max_tokens", "seed", "chat_template_kwargs")
    return {"target": str(target_path), **{name: fields[name] for name in names}}


def _temperature(row: int, num_prompts: int, settings: RegenerateSettings) -> float:
    """Temperature of a row, such that neighbours and continuations of one prompt differ for any number of prompts."""
    return settings.temperatures[(row % num_prompts + row // num_prompts) % len(settings.temperatures)]


def resume_rows(path: Path, prompts: Sequence[list[int]], num_rows: int) -> int:
    """The number of complete lines in `path`; an incomplete last line, left by a killed run, is cut off.

    Raises ValueError if a line is no row of this command, or continues another prompt than this run's line would.
    """
    lines = whole_lines(path)
    rows = parse_lines((Line(f"{path}, line {i}", line) for i, line in enumerate(lines, start=1)), _prompt_of, None)
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
    """The lines of `path`, none if it does not exist; an incomplete last line is cut off in the file."""
    if not path.exists():
        return []
    cut_incomplete_line(path)
    return path.read_bytes().splitlines()


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one JSON line per row; on return they are on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


PROMPT_TEMPERATURE = 0.8
MAX_PROMPT_TOKENS = 256
"""Prompts that do not end within so many tokens are dropped."""

MIN_CHUNK_SIZE, MAX_CHUNK_SIZE = 64, 1024
"""Prompts that are written together, and lost together when the process is killed."""

MIN_USABLE_SHARE = 0.05
"""Smallest share of usable prompts in a chunk. A target below it has not learned to write prompts."""

_PLACEHOLDER = "\N{WHITE SQUARE}"


def write_own_prompts(
    target_path: str,
    count: int,
    output: Path,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> None:
    """Let the target write `count` lines of `messages`, each with one user turn, to `output`; existing lines are kept.

    engine_options: of `vllm.LLM`; `kv_cache.engine_options` chooses the others. Raises ValueError if the target has no
    chat template or writes no usable prompts, or if `output` holds prompts of another run.
    """
    trust = engine_options.get("trust_remote_code", False)
    around = around_user_turn(target_path, chat_template_kwargs, trust)
    num_done = len(whole_lines(output))
    claim_file(output, {"target": str(target_path), "seed": seed, "chat_template_kwargs": chat_template_kwargs})
    if num_done >= count:
        return
    options = complete_options(target_path, [len(around.before) + MAX_PROMPT_TOKENS] * MAX_CHUNK_SIZE, engine_options)
    # Importing vLLM takes seconds and loads its plugins, which training without it should not.
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started

    parameters = SamplingParams(temperature=PROMPT_TEMPERATURE, max_tokens=MAX_PROMPT_TOKENS, stop=around.after)
    # With the same seed a resumed engine would write the killed one's prompts again.
    with started(target_path, seed=seed + num_done, **options) as llm:
        while num_done < count:
            size = min(max(2 * (count - num_done), MIN_CHUNK_SIZE), MAX_CHUNK_SIZE)
            outputs = llm.generate([{"prompt_token_ids": around.before}] * size, parameters)
            ended = {done.outputs[0].text.strip() for done in outputs if done.outputs[0].finish_reason == "stop"}
            texts = sorted(ended - {""})
            if len(texts) < MIN_USABLE_SHARE * size:
                raise ValueError(
                    f"--own-prompts {count}: of {size} user turns that target {target_path!r} was to write, it "
                    f"ended {len(texts)}. It has not learned to write them; give it prompts."
                )
            written = [{"messages": [{"role": "user", "content": text}]} for text in texts[: count - num_done]]
            append_rows(output, written)
            num_done += len(written)


@dataclass(frozen=True)
class AroundUserTurn:
    before: list[int]
    """Token ids that the chat template puts before the user's text."""
    after: list[str]
    """The first line of the text that it puts after it; empty if it puts none there."""


def around_user_turn(
    target_path: str, chat_template_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> AroundUserTurn:
    """Raises ValueError if the target has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(target_path, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"--own-prompts: target {target_path!r} has no chat template. Give it prompts instead.")
    messages = [{"role": "user", "content": _PLACEHOLDER}]
    try:
        text = ChatTemplate(tokenizer, chat_template_kwargs).render(messages, add_generation_prompt=True)
    except FaultyLine as error:
        raise ValueError(f"--own-prompts: {error}. Give the target prompts instead.") from error
    before, _, after = text.partition(_PLACEHOLDER)
    # Most tokenizers join a space with the word after it.
    token_ids = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    return AroundUserTurn(token_ids, after.strip().splitlines()[:1])
