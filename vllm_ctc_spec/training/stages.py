"""The stages of `vllm-ctc-spec train`: regenerate, fit, evaluate, or all. A killed stage resumes where it stopped.

Each function imports what its stage needs when it runs, so that no stage loads another's libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ctc_spec.command_line import given_engine_options

if TYPE_CHECKING:
    from vllm_ctc_spec.training.fit import FitSettings
    from vllm_ctc_spec.training.prompts import Question
    from vllm_ctc_spec.training.regenerate import RegenerateSettings

HELD_OUT_SHARE = 20
"""`train all` keeps one prompt of so many for the evaluation, at most MAX_HELD_OUT."""

MAX_HELD_OUT = 200

RATE_AFTER_INIT = 2e-3
"""Default of `--learning-rate` with `--init`.

That of other trainings first undoes what a trained drafter has learnt: in a second training of SmolLM2's drafter the
loss rose from 31 to 36, and came below 31 again after a third of the steps.
"""


def regenerate_stage(options: argparse.Namespace) -> None:
    from vllm_ctc_spec.training.regenerate import regenerate

    prompts = _all_turns(options, _given_questions(options), options.rows)
    prompts += _own_prompts(options, options.rows)
    regenerate(options.target, prompts, options.rows, _regenerate_settings(options), **_engine(options))


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    from vllm_ctc_spec.vllm_keys import check_engine_keys

    engine = given_engine_options(options)
    if options.engine:
        check_engine_keys("--engine", engine)
    if "seed" in engine:
        raise ValueError(f"--engine seed={engine['seed']}: use --seed {engine['seed']}.")
    return engine


def _given_questions(options: argparse.Namespace) -> list[Question]:
    if options.prompts is not None:
        return _read_questions(options, options.prompts)
    if not options.own_prompts:
        raise ValueError("no prompts: name a file or a data set, or let the target write some with --own-prompts.")
    return []


def _all_turns(options: argparse.Namespace, questions: list[Question], rows: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    from vllm_ctc_spec.training.regenerate import all_turns

    tokenizer = AutoTokenizer.from_pretrained(options.target, trust_remote_code=options.trust_remote_code)
    return all_turns(options.target, questions, tokenizer, rows, _regenerate_settings(options), **_engine(options))


def _own_prompts(options: argparse.Namespace, rows: Path) -> list[list[int]]:
    """Prompts that the target writes. They are kept beside the rows, so that a resumed run has the same ones."""
    if not options.own_prompts:
        return []
    from vllm_ctc_spec.training.regenerate import write_own_prompts

    path = rows.with_suffix(".own-prompts.jsonl")
    write_own_prompts(
        options.target, options.own_prompts, path, options.seed, options.chat_template_kwargs, **_engine(options)
    )
    return [list(question.first) for question in _read_questions(options, path)[: options.own_prompts]]


def _read_questions(options: argparse.Namespace, source: str | Path) -> list[Question]:
    from transformers import AutoConfig, AutoTokenizer

    from vllm_ctc_spec.training.prompts import read_questions
    from vllm_ctc_spec.training.sources import read_lines

    text = AutoConfig.from_pretrained(options.target, trust_remote_code=options.trust_remote_code).get_text_config()
    skipped: list[str] | None = [] if options.skip_bad_lines else None
    tokenizer = AutoTokenizer.from_pretrained(options.target, trust_remote_code=options.trust_remote_code)
    questions = read_questions(
        read_lines(source),
        tokenizer,
        skipped,
        vocab_size=text.vocab_size,
        chat_template_kwargs=options.chat_template_kwargs,
    )
    context = _engine(options).get("max_model_len", text.max_position_embeddings)
    for number, question in enumerate(questions, start=1):
        if len(question.first) >= context:
            problem = f"prompt {number} has {len(question.first)} tokens, and the target's context holds {context}"
            if skipped is None:
                raise ValueError(f"{problem}. Leave it out, or use --skip-bad-lines.")
            skipped.append(problem)
    _report_skipped(skipped)
    return [question for question in questions if len(question.first) < context]


def _report_skipped(skipped: list[str] | None) -> None:
    if skipped:
        print(f"{len(skipped)} faulty lines left out; the first: {skipped[0]}")


def _regenerate_settings(options: argparse.Namespace) -> RegenerateSettings:
    from vllm_ctc_spec.training.regenerate import RegenerateSettings

    return RegenerateSettings(
        temperatures=tuple(options.temperatures),
        samples=options.samples or len(options.temperatures),
        max_tokens=options.max_tokens,
        seed=options.seed,
        chat_template_kwargs=options.chat_template_kwargs,
    )


def fit_stage(options: argparse.Namespace) -> None:
    _run_fit(options, options.rows, options.drafter)


def _run_fit(options: argparse.Namespace, rows: str | Path | None, drafter: Path) -> None:
    from vllm_ctc_spec.training.fit import dry_run, fit
    from vllm_ctc_spec.training.loop import processes

    skipped: list[str] | None = [] if options.skip_bad_lines else None
    if options.dry_run or rows is None:
        written = dry_run(options.target, rows, drafter, _fit_settings(options), skipped)
        print(f"all checks passed; {written} holds an untrained drafter that vLLM can serve")
    else:
        fit(options.target, rows, drafter, _fit_settings(options), skipped)
    if processes().is_main_process:
        _report_skipped(skipped)


def _fit_settings(options: argparse.Namespace) -> FitSettings:
    from vllm_ctc_spec.training.fit import FitSettings
    from vllm_ctc_spec.training.loop import Budget

    vocab = {} if options.draft_vocab_size is None else {"draft_vocab_size": options.draft_vocab_size or None}
    layers = {} if options.target_layers is None else {"target_layers": _target_layers(options.target_layers)}
    limit = {} if options.minutes is None else {"max_seconds": options.minutes * 60}
    rate = FitSettings.learning_rate if options.init is None else RATE_AFTER_INIT
    return FitSettings(
        budget=Budget(options.steps, **limit),
        learning_rate=rate if options.learning_rate is None else options.learning_rate,
        batch_size=options.batch_size,
        anchors_per_row=options.anchors_per_row,
        max_length=options.max_length,
        label_decay=options.label_decay,
        label_temperature=options.label_temperature,
        save_steps=options.save_steps,
        seed=options.seed,
        cache=options.cache,
        hidden_from_engine=None if options.hidden_from_engine is None else dict(options.hidden_from_engine),
        init=options.init,
        replay=options.replay,
        replay_share=options.replay_share,
        chat_template_kwargs=options.chat_template_kwargs,
        trust_remote_code=options.trust_remote_code,
        drafter={
            "num_frames": options.frames,
            "label_length": options.label_length or options.frames,
            "num_hidden_layers": options.layers,
            "condition_rank": options.rank,
            "emission": options.emission,
            **vocab,
            **layers,
        },
        trainer=dict(options.trainer),
    )


def _target_layers(arguments: list[str]) -> list[int]:
    if arguments == ["none"]:
        return []
    if not all(argument.isdecimal() for argument in arguments):
        raise ValueError(f"--target-layers {' '.join(arguments)}: write layer numbers, or none.")
    return sorted(set(map(int, arguments)))


def evaluate_stage(options: argparse.Namespace) -> None:
    _run_evaluate(options, options.drafter, named_sets(options.sets), options.text, options.paper)


def named_sets(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> rows. The default name is that of the file or data set."""
    sets: dict[str, str] = {}
    for argument in arguments:
        name, equals, rows = argument.partition("=")
        if not equals or Path(argument).exists():
            name, rows = Path(argument).stem, argument
        if not name or not rows:
            raise ValueError(f"{argument!r}: write NAME=ROWS.")
        if name in sets:
            raise ValueError(f"two sets are called {name!r}: write NAME=ROWS with another name.")
        sets[name] = rows
    return sets


def _run_evaluate(
    options: argparse.Namespace, drafter: Path, sets: Mapping[str, str], text: str | None, paper: bool = False
) -> None:
    from vllm_ctc_spec.files import write_atomically
    from vllm_ctc_spec.tables import console
    from vllm_ctc_spec.training.card import CardDetails, write_card
    from vllm_ctc_spec.training.evaluate import PAPER_TREE, TREES, evaluate
    from vllm_ctc_spec.training.report import to_json, to_png, to_table

    trees = (*TREES, PAPER_TREE) if paper else TREES
    evaluations = {}
    for name, rows in sets.items():
        skipped: list[str] | None = [] if options.skip_bad_lines else None
        evaluations[name] = evaluate(
            options.target,
            str(drafter),
            rows,
            trees,
            seed=options.seed,
            skipped=skipped,
            chat_template_kwargs=options.chat_template_kwargs,
            trust_remote_code=options.trust_remote_code,
        )
        _report_skipped(skipped)
        console().print(to_table(evaluations[name], name))
    if options.json is not None:
        fields = {name: to_json(evaluation) for name, evaluation in evaluations.items()}
        write_atomically(options.json, json.dumps(fields, indent=2).encode())
    if options.png is not None:
        to_png(evaluations, options.png)
    card = options.card or drafter / "README.md"
    write_card(card, drafter, options.target, CardDetails(options.target_name, text), evaluations)
    print(f"written: {card}")


def all_stages(options: argparse.Namespace) -> None:
    from vllm_ctc_spec.training.regenerate import around_user_turn, regenerate

    rows, held_out, drafter = (options.output / name for name in ("rows.jsonl", "heldout.jsonl", "drafter"))
    questions, engine = _given_questions(options), _engine(options)
    if options.dry_run:
        if options.own_prompts:
            around_user_turn(options.target, options.chat_template_kwargs, options.trust_remote_code)
        _run_fit(options, None, drafter)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    prompts = _all_turns(options, questions, rows)
    own_prompts = _own_prompts(options, rows)
    kept = held_out_prompts(prompts or own_prompts)
    settings = _regenerate_settings(options)
    served = dataclasses.replace(settings, temperatures=settings.temperatures[:1], samples=1)
    regenerate(options.target, kept, held_out, served, **engine)
    # The prompt of a later turn begins with the first turn's, so later turns of a kept prompt are left out too.
    remaining = [prompt for prompt in prompts + own_prompts if not any(prompt[: len(k)] == k for k in kept)]
    regenerate(options.target, remaining, rows, settings, **engine)
    _run_fit(options, rows, drafter)
    options.json, options.png = options.output / "evaluation.json", options.output / "evaluation.png"
    options.card = None
    _run_evaluate(options, drafter, {"held-out": str(held_out)}, _text(options, len(prompts), len(own_prompts)))


def _text(options: argparse.Namespace, num_prompts: int, num_own: int) -> str:
    """The training text, for the model card."""
    sources = [f"{num_prompts:,} prompts of {Path(options.prompts).name}"] if num_prompts else []
    sources += [f"{num_own:,} prompts that it wrote"] if num_own else []
    temperatures = ", ".join(f"{temperature:g}" for temperature in dict.fromkeys(options.temperatures))
    text = f"the target's own answers to {' and '.join(sources)}, at temperatures {temperatures}"
    return f"{text}. {options.text}" if options.text else text


def held_out_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Distinct prompts, evenly from the whole source, to be kept for the evaluation. Raises ValueError below two."""
    distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    if len(distinct) < 2:
        raise ValueError("needs at least two different prompts: some are kept for the evaluation.")
    return distinct[:: max(HELD_OUT_SHARE, len(distinct) // MAX_HELD_OUT)]


STAGES = {"regenerate": regenerate_stage, "fit": fit_stage, "evaluate": evaluate_stage, "all": all_stages}
