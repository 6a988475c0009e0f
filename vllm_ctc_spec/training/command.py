"""`vllm-ctc-spec train`: regenerate, fit, evaluate, each alone or all in turn; every stage resumes where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ctc_spec.command_line import setting

if TYPE_CHECKING:
    from vllm_ctc_spec.training.prompts import Question
    from vllm_ctc_spec.training.regenerate import RegenerateSettings
    from vllm_ctc_spec.training.trainer import FitSettings

HELD_OUT_SHARE = 20
"""`train all` keeps one of so many prompts for the evaluation, and at most MAX_HELD_OUT."""

MAX_HELD_OUT = 200


def add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a drafter for any target: regenerate, fit, evaluate")
    stages = train.add_subparsers(required=True, metavar="STAGE")

    regenerate = stages.add_parser("regenerate", help="let the target continue prompts, with vLLM")
    _add_target(regenerate)
    _add_prompts(regenerate)
    regenerate.add_argument("rows", type=Path, help="JSONL to write; lines that it holds are kept")
    _add_regenerate(regenerate)
    regenerate.set_defaults(run=_regenerate)

    fit = stages.add_parser("fit", help="train the drafter")
    _add_target(fit)
    fit.add_argument("rows", help="file, local data set or hub name: regenerated rows, conversations or text")
    fit.add_argument("drafter", type=Path, help="folder to write")
    _add_fit(fit)
    fit.set_defaults(run=_fit)

    evaluate = stages.add_parser("evaluate", help="acceptance length, per depth, and calibration, on unseen rows")
    _add_target(evaluate)
    evaluate.add_argument("drafter", type=Path, help="folder of its CTC drafter")
    evaluate.add_argument(
        "sets", nargs="+", metavar="[NAME=]ROWS", help="rows that the target wrote and the drafter has not seen"
    )
    evaluate.add_argument("--paper", action="store_true", help="the paper's template tree too")
    evaluate.add_argument("--json", type=Path, metavar="PATH")
    evaluate.add_argument("--png", type=Path, metavar="PATH")
    evaluate.add_argument("--card", type=Path, metavar="PATH", help="model card (default: README.md of the drafter)")
    _add_words(evaluate)
    evaluate.set_defaults(run=_evaluate)

    everything = stages.add_parser("all", help="all stages in turn, from prompts to an evaluated drafter")
    _add_target(everything)
    _add_prompts(everything)
    everything.add_argument("output", type=Path, help="folder for rows.jsonl, heldout.jsonl, drafter and evaluation")
    _add_regenerate(everything)
    _add_fit(everything)
    _add_words(everything)
    everything.set_defaults(run=_all)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="folder or hub name of the target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave faulty lines out, and say how many")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="?", help="file, local data set or hub name: prompts or conversations")
    parser.add_argument(
        "--own-prompts", type=int, default=0, metavar="NUMBER", help="prompts, or more, that the target writes itself"
    )


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", help="for the model card: what the drafter was trained on, and its licence")
    parser.add_argument("--target-name", help="for the model card (default: the target's hub name or last folder)")


def _add_regenerate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0],
        help="those that will be served, one continuation at each in turn (default 0)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, help="continuations of each prompt (default: one per temperature)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a continuation (default %(default)s)")
    parser.add_argument("--engine", type=setting, nargs="+", default=[], metavar="KEY=VALUE", help="for vllm.LLM")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="end after so long, if that is earlier")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per device (default %(default)s)")
    parser.add_argument("--anchors-per-row", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row (default %(default)s)")
    parser.add_argument("--frames", type=int, default=8, help="frames of the drafter (default %(default)s)")
    parser.add_argument("--label-length", type=int, help="labels per anchor (default: one per frame)")
    parser.add_argument("--label-decay", type=float, help="weight of a label over the one before it (default 0.8)")
    parser.add_argument("--layers", type=int, default=1, help="layers of the drafter (default %(default)s)")
    parser.add_argument("--rank", type=int, default=256, help="of the conditioning table (default %(default)s)")
    parser.add_argument(
        "--emission", default="conditioned", choices=("conditioned", "independent"),
        help="independent is plain CTC, for comparison",
    )  # fmt: skip
    parser.add_argument(
        "--draft-vocab-size", type=int, metavar="NUMBER",
        help="draft the most frequent tokens of the rows alone (default: a quarter of all, at least 2048; 0: all)",
    )  # fmt: skip
    parser.add_argument(
        "--target-layers", nargs="+", metavar="LAYER",
        help="layers of the target that the drafter reads beside the last, or none (default: three if vLLM gives them)",
    )  # fmt: skip
    parser.add_argument("--init", metavar="DRAFTER", help="folder of a drafter whose weights are the first")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the target's hidden states on disk")
    parser.add_argument("--save-steps", type=int, default=500, help="between checkpoints (default %(default)s)")
    parser.add_argument(
        "--trainer", type=setting, nargs="+", default=[], metavar="KEY=VALUE",
        help="for transformers.TrainingArguments",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, write an untrained drafter, and stop")


def _regenerate(options: argparse.Namespace) -> int:
    from vllm_ctc_spec.training.regenerate import regenerate

    prompts = _all_turns(options, _given_questions(options), options.rows)
    prompts += _own_prompts(options, options.rows)
    regenerate(options.target, prompts, options.rows, _regenerate_settings(options), **_engine(options))
    return 0


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    engine = dict(options.engine)
    if engine:
        from vllm_ctc_spec.vllm_keys import check_engine_keys

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

    tokenizer = AutoTokenizer.from_pretrained(options.target)
    return all_turns(options.target, questions, tokenizer, rows, _regenerate_settings(options), **_engine(options))


def _own_prompts(options: argparse.Namespace, rows: Path) -> list[list[int]]:
    """They are kept beside the rows, so that a run that goes on continues the same ones."""
    from vllm_ctc_spec.training.regenerate import write_own_prompts

    if not options.own_prompts:
        return []
    path = rows.with_suffix(".own-prompts.jsonl")
    write_own_prompts(options.target, options.own_prompts, path, options.seed, **_engine(options))
    return [list(question.first) for question in _read_questions(options, path)[: options.own_prompts]]


def _read_questions(options: argparse.Namespace, source: str | Path) -> list[Question]:
    from transformers import AutoConfig, AutoTokenizer

    from vllm_ctc_spec.training.prompts import read_questions
    from vllm_ctc_spec.training.sources import read_lines

    text = AutoConfig.from_pretrained(options.target).get_text_config()
    skipped: list[str] | None = [] if options.skip_bad_lines else None
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    questions = read_questions(read_lines(source), tokenizer, skipped, vocab_size=text.vocab_size)
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

    samples = options.samples or len(options.temperatures)
    return RegenerateSettings(tuple(options.temperatures), samples, options.max_tokens, seed=options.seed)


def _fit(options: argparse.Namespace) -> int:
    _run_fit(options, options.rows, options.drafter)
    return 0


def _run_fit(options: argparse.Namespace, rows: str | Path | None, drafter: Path) -> None:
    from vllm_ctc_spec.training.loop import processes
    from vllm_ctc_spec.training.trainer import dry_run, fit

    skipped: list[str] | None = [] if options.skip_bad_lines else None
    if options.dry_run or rows is None:
        written = dry_run(options.target, rows, drafter, _fit_settings(options), skipped)
        print(f"everything checked; an untrained drafter, which serves, is in {written}")
    else:
        fit(options.target, rows, drafter, _fit_settings(options), skipped)
    if processes().is_main_process:
        _report_skipped(skipped)


def _fit_settings(options: argparse.Namespace) -> FitSettings:
    from vllm_ctc_spec.training.loop import Budget
    from vllm_ctc_spec.training.trainer import FitSettings

    vocab = {} if options.draft_vocab_size is None else {"draft_vocab_size": options.draft_vocab_size or None}
    layers = {} if options.target_layers is None else {"target_layers": _target_layers(options.target_layers)}
    limit = {} if options.minutes is None else {"max_seconds": options.minutes * 60}
    return FitSettings(
        budget=Budget(options.steps, **limit),
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        anchors_per_row=options.anchors_per_row,
        max_length=options.max_length,
        label_decay=options.label_decay,
        save_steps=options.save_steps,
        seed=options.seed,
        cache=options.cache,
        init=options.init,
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


def _target_layers(words: list[str]) -> list[int]:
    if words == ["none"]:
        return []
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--target-layers {' '.join(words)}: write layer numbers, or none.")
    return sorted(set(map(int, words)))


def _evaluate(options: argparse.Namespace) -> int:
    _run_evaluate(options, options.drafter, named_sets(options.sets), options.text, options.paper)
    return 0


def named_sets(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> rows; rows without a name are called as their file or data set."""
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
    from vllm_ctc_spec.terminal import console
    from vllm_ctc_spec.training.card import Words, write_card
    from vllm_ctc_spec.training.evaluate import PAPER_TREE, TREES, evaluate
    from vllm_ctc_spec.training.report import to_json, to_png, to_table

    trees = (*TREES, PAPER_TREE) if paper else TREES
    evaluations = {}
    for name, rows in sets.items():
        skipped: list[str] | None = [] if options.skip_bad_lines else None
        evaluations[name] = evaluate(options.target, str(drafter), rows, trees, skipped=skipped, seed=options.seed)
        _report_skipped(skipped)
        console().print(to_table(evaluations[name], name))
    if options.json is not None:
        fields = {name: to_json(evaluation) for name, evaluation in evaluations.items()}
        write_atomically(options.json, json.dumps(fields, indent=2).encode())
    if options.png is not None:
        to_png(evaluations, options.png)
    card = options.card or drafter / "README.md"
    write_card(card, drafter, options.target, Words(options.target_name, text), evaluations)
    print(f"written: {card}")


def _all(options: argparse.Namespace) -> int:
    from vllm_ctc_spec.training.regenerate import RegenerateSettings, around_user_turn, regenerate

    rows, held_out, drafter = (options.output / name for name in ("rows.jsonl", "heldout.jsonl", "drafter"))
    questions, engine = _given_questions(options), _engine(options)
    if options.dry_run:
        if options.own_prompts:
            around_user_turn(options.target)
        _run_fit(options, None, drafter)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    prompts = _all_turns(options, questions, rows)
    own_prompts = _own_prompts(options, rows)
    kept = held_out_prompts(prompts or own_prompts)
    served = RegenerateSettings((options.temperatures[0],), max_tokens=options.max_tokens, seed=options.seed)
    regenerate(options.target, kept, held_out, served, **engine)
    # A later turn's prompt begins with that of the first.
    remaining = [prompt for prompt in prompts + own_prompts if not any(prompt[: len(k)] == k for k in kept)]
    regenerate(options.target, remaining, rows, _regenerate_settings(options), **engine)
    _run_fit(options, rows, drafter)
    options.json, options.png = options.output / "evaluation.json", options.output / "evaluation.png"
    options.card = None
    _run_evaluate(options, drafter, {"held-out": str(held_out)}, _text(options, len(prompts), len(own_prompts)))
    return 0


def _text(options: argparse.Namespace, num_prompts: int, num_own: int) -> str:
    """For the model card."""
    sources = [f"{num_prompts:,} prompts of {Path(options.prompts).name}"] if num_prompts else []
    sources += [f"{num_own:,} prompts that it wrote itself"] if num_own else []
    temperatures = ", ".join(f"{temperature:g}" for temperature in dict.fromkeys(options.temperatures))
    text = f"the target's own answers to {' and '.join(sources)}, at temperatures {temperatures}"
    return f"{text}. {options.text}" if options.text else text


def held_out_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Distinct prompts from all over the source, none of which may be trained on."""
    distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    if len(distinct) < 2:
        raise ValueError("needs at least two different prompts: some are kept for the evaluation.")
    return distinct[:: max(HELD_OUT_SHARE, len(distinct) // MAX_HELD_OUT)]
