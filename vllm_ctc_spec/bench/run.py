"""A benchmark run: engines start once, and each cell (prompts, batch size, sampling) is written once it is measured."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.bench.cells import Cell, Measurement, Prompt, Report, spread, workload
from vllm_ctc_spec.bench.config import PLAIN, BenchConfig, PromptSource
from vllm_ctc_spec.bench.processes import Fleet
from vllm_ctc_spec.bench.records import Pass, Sampling
from vllm_ctc_spec.files import claim, write_atomically
from vllm_ctc_spec.kv_cache import engine_options, fitting_model_len
from vllm_ctc_spec.machine import this_machine
from vllm_ctc_spec.target_files import read_text_config, read_tokenizer
from vllm_ctc_spec.training.prompts import Question, read_questions, turn_prompt
from vllm_ctc_spec.training.sources import Line, read_dataset, read_lines
from vllm_ctc_spec.vllm_keys import check_engine_keys, check_speculative_keys

TEMPLATE_TOKENS = 64
"""Allowance for the tokens that the chat template puts around a turn."""


class Turn(NamedTuple):
    question: int
    """Index of the question in its set."""
    number: int
    """Turns before this one."""


class Bench:
    """One run. Its constructor checks everything that can be checked before an engine starts, and raises ValueError."""

    def __init__(self, config: BenchConfig, output: Path) -> None:
        self.config, self.output = config, output
        trust = bool(config.engine.get("trust_remote_code"))
        self.tokenizer: PreTrainedTokenizerBase = read_tokenizer(config.target, trust)
        if config.chat_template is not None:
            self.tokenizer.chat_template = config.chat_template
        text = read_text_config(config.target, trust)
        self.context: int = config.engine.get("max_model_len", text.max_position_embeddings)
        self.questions = {name: select_questions(name, each, self.tokenizer) for name, each in config.prompts.items()}
        for name, questions in self.questions.items():
            self._check_prompts(name, questions)
        if "max_model_len" not in config.engine:
            self.context = fitting_model_len(config.target, max(self._lengths()), trust)
        check_vllm_keys(config)
        claim(output / "cells", self._settings())

    def cells(self) -> list[Cell]:
        config = self.config
        return [
            Cell(name, batch_size, sampling)
            for name in config.prompts
            for sampling in config.sampling
            for batch_size in config.batch_sizes
        ]

    def path(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.file_name

    def pending(self) -> list[Cell]:
        return [cell for cell in self.cells() if not self.path(cell).exists()]

    def num_passes(self) -> int:
        """Passes of one cell, if no method fails."""
        methods = [method for method in self.config.methods if method.missing is None]
        return len(methods) * (1 + self.config.rounds) + sum(method.is_ctc for method in methods)

    def run(self, report: Report) -> dict[str, Any]:
        """Measure the pending cells, and return the contents of results.json."""
        pending = self.pending()
        if pending:
            with Fleet(self._with_cache(), self.output / "logs") as fleet:
                fleet.start(lambda method: report(f"starting {method.name}", 0))
                prompts = {name: self._prompts(name, fleet, report) for name in self.config.prompts}
                for cell in pending:
                    turns = self._turns(cell.prompts, cell.batch_size)
                    here = [prompts[cell.prompts][turn] for turn in turns if turn in prompts[cell.prompts]]
                    measured = Measurement(self.config, self.context, cell, here, fleet, report).measure()
                    write_atomically(self.path(cell), json.dumps(measured, indent=1).encode())
        results = as_json(
            {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "machine": dataclasses.asdict(this_machine()),
                "config": dataclasses.asdict(self.config),
                "cells": [json.loads(self.path(cell).read_text()) for cell in self.cells()],
            }
        )
        write_atomically(self.output / "results.json", json.dumps(results, indent=1).encode())
        return results

    def _with_cache(self) -> BenchConfig:
        """The configuration with a KV cache that the largest batch needs, unless the user has set its size."""
        config, in_flight = self.config, max(self.config.batch_sizes)
        methods = []
        for method in config.methods:
            given = {"max_model_len": self.context, **config.engine, **method.engine, "max_num_seqs": in_flight}
            methods.append(dataclasses.replace(method, engine=engine_options(config.target, self._lengths(), given)))
        return dataclasses.replace(config, methods=tuple(methods))

    def _lengths(self) -> list[int]:
        """For each turn of each question, most tokens of the conversation at the end of its answer."""
        lengths = []
        for questions in self.questions.values():
            for question in questions:
                lengths.append(len(question.first) + self.config.max_tokens)
                for text in question.later_turns:
                    added = len(self.tokenizer(text)["input_ids"]) + TEMPLATE_TOKENS + self.config.max_tokens
                    lengths.append(lengths[-1] + added)
        return lengths

    def _check_prompts(self, name: str, questions: Sequence[Question]) -> None:
        for question in questions:
            if not 0 < len(question.first) < self.context - 1:
                raise ValueError(
                    f"prompts.{name}: question {question.name} has {len(question.first)} tokens, and the context "
                    f"holds {self.context}. Leave it out, or raise engine.max_model_len."
                )
        count = sum(1 + len(question.later_turns) for question in questions)
        if count < max(self.config.batch_sizes):
            raise ValueError(
                f"prompts.{name} has {count} prompts, fewer than the batch size {max(self.config.batch_sizes)}. "
                "Select more, or leave the batch size out."
            )

    def _settings(self) -> dict[str, Any]:
        hashes = {
            f"prompts.{name}.sha256": hashlib.sha256(repr(questions).encode()).hexdigest()
            for name, questions in self.questions.items()
        }
        return as_json(flatten(dataclasses.asdict(self.config)) | hashes | this_machine().versions)

    def _turns(self, name: str, batch_size: int) -> list[Turn]:
        """The turns that a cell measures: `num_prompts` of its questions' turns, or as many as are in flight."""
        turns = [
            Turn(index, turn)
            for index, question in enumerate(self.questions[name])
            for turn in range(1 + len(question.later_turns))
        ]
        count = max(self.config.num_prompts or len(turns), batch_size)
        return spread(turns, min(count, len(turns)))

    def _prompts(self, name: str, fleet: Fleet, report: Report) -> dict[Turn, Prompt]:
        """The turns of all cells that fit into the context. Later turns follow plain vLLM's greedy answers, for every
        method."""
        turns = {turn for batch_size in self.config.batch_sizes for turn in self._turns(name, batch_size)}
        answers = self._earlier_answers(name, turns, fleet, report)
        prompts = {turn: self._prompt(name, turn, answers[turn.question]) for turn in turns}
        return {turn: prompt for turn, prompt in prompts.items() if prompt is not None}

    def _prompt(self, name: str, turn: Turn, answers: Sequence[Sequence[int]]) -> Prompt | None:
        """None if an earlier answer is missing, or the prompt leaves no room for an answer."""
        if len(answers) < turn.number:
            return None
        prompt = next_turn(name, self.questions[name][turn.question], answers[: turn.number], self.tokenizer)
        return prompt if prompt is not None and len(prompt.token_ids) < self.context - 1 else None

    def _earlier_answers(
        self, name: str, turns: Collection[Turn], fleet: Fleet, report: Report
    ) -> list[list[list[int]]]:
        """For each question, the answers (token ids) that `turns` follow; kept on disk for a resumed run."""
        path = self.output / "cells" / f"{name}-turns.json"
        if path.exists():
            return list(json.loads(path.read_text()))
        answers: list[list[list[int]]] = [[] for _ in self.questions[name]]
        for number in range(max(turn.number for turn in turns)):
            report(f"plain vLLM answers turn {number + 1} of {name}", 0)
            followed = sorted({turn.question for turn in turns if turn.number > number})
            prompts = ((index, self._prompt(name, Turn(index, number), answers[index])) for index in followed)
            asked = {index: prompt for index, prompt in prompts if prompt is not None}
            work = workload(self.config, self.context, [*asked.values()], max(self.config.batch_sizes), Sampling())
            done: Pass = fleet.call(PLAIN, "run", workload=work)
            for index, request in zip(asked, done.requests):
                answers[index].append(list(request.token_ids))
        write_atomically(path, json.dumps(answers).encode())
        return answers


def as_json(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` as written to JSON and read again, with lists in place of tuples."""
    return dict(json.loads(json.dumps(fields)))


def flatten(fields: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a list of records with a "name" is flattened as a mapping by name."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict) and "name" in value[0]:
            value = {each["name"]: each for each in value}
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{above}{key}.")
        else:
            flat[above + key] = value
    return flat


def check_vllm_keys(config: BenchConfig) -> None:
    """Raises ValueError that names an option that vLLM does not have."""
    check_engine_keys("engine", config.engine)
    for method in config.methods:
        check_engine_keys(f"methods.{method.name}.engine", method.engine)
        if method.speculative_config is not None and not method.is_ctc:
            check_speculative_keys(f"methods.{method.name}", method.speculative_config, config.target)


def select_questions(name: str, source: PromptSource, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The rows that `source` selects; see `read_questions`. Raises ValueError that names the faulty line."""
    lines = list(_lines(source))
    stop = None if source.limit is None else source.skip + source.limit
    chosen = lines[-source.last :] if source.last is not None else lines[source.skip : stop]
    if not chosen:
        raise ValueError(f"prompts.{name}: none of its {len(lines)} rows is selected. Change skip, limit or last.")
    return read_questions(chosen, tokenizer, prefix=source.prefix)


def _lines(source: PromptSource) -> Iterator[Line]:
    if source.subset is None and source.split is None:
        return read_lines(source.source)
    return read_dataset(source.source, source.split or "test", source.subset)


def next_turn(
    name: str, question: Question, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    """The prompt of turn len(answers) + 1; None if there is no such turn.

    name: of the prompt set; the category of questions without one. answers: plain vLLM's, token ids.
    """
    token_ids = turn_prompt(question, answers, tokenizer)
    if token_ids is None:
        return None
    turn = f"{question.name}, turn {len(answers) + 1}" if question.later_turns else question.name
    return Prompt(turn, question.category or name, token_ids)
