"""`vllm-ctc-spec train`: the arguments of its stages, which are regenerate, fit, evaluate, and all of them in turn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_ctc_spec.command_line import setting


def add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a drafter for any target: regenerate, fit, evaluate")
    stages = train.add_subparsers(required=True, metavar="STAGE")

    regenerate = stages.add_parser("regenerate", help="let the target continue prompts, with vLLM")
    _add_target(regenerate)
    _add_prompts(regenerate)
    regenerate.add_argument("rows", type=Path, help="JSONL to write; lines that it holds are kept")
    _add_regenerate(regenerate)
    regenerate.set_defaults(run=_run, stage="regenerate")

    fit = stages.add_parser("fit", help="train the drafter")
    _add_target(fit)
    fit.add_argument("rows", help="file, local data set or hub name: regenerated rows, conversations or text")
    fit.add_argument("drafter", type=Path, help="folder to write")
    _add_fit(fit)
    fit.set_defaults(run=_run, stage="fit")

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
    evaluate.set_defaults(run=_run, stage="evaluate")

    everything = stages.add_parser("all", help="all stages in turn, from prompts to an evaluated drafter")
    _add_target(everything)
    _add_prompts(everything)
    everything.add_argument("output", type=Path, help="folder for rows.jsonl, heldout.jsonl, drafter and evaluation")
    _add_regenerate(everything)
    _add_fit(everything)
    _add_words(everything)
    everything.set_defaults(run=_run, stage="all")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="folder or hub name of the target")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the target's folder or repository brings"
    )
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


def _run(options: argparse.Namespace) -> int:
    # The parser is built for every command, so it imports neither torch nor vLLM.
    from vllm_ctc_spec.training.stages import STAGES

    STAGES[options.stage](options)
    return 0
