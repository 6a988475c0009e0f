"""`vllm-ctc-spec train`: the arguments of the stages regenerate, fit and evaluate, and of `all`, which runs them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vllm_ctc_spec.command_line import add_trust_remote_code, json_object, setting

SET_BY_TRAIN = ("conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message")
"""Arguments of `apply_chat_template` that are no variables of the template."""


def add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a drafter for any target: regenerate, fit, evaluate")
    stages = train.add_subparsers(required=True, metavar="STAGE")

    regenerate = stages.add_parser("regenerate", help="let the target continue prompts, with vLLM")
    _add_target(regenerate)
    _add_prompts(regenerate)
    regenerate.add_argument("rows", type=Path, help="JSONL file to write; existing lines are kept")
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
    evaluate.add_argument("drafter", type=Path, help="folder of the target's CTC drafter")
    evaluate.add_argument(
        "sets", nargs="+", metavar="[NAME=]ROWS", help="rows that the target wrote and the drafter has not seen"
    )
    evaluate.add_argument("--paper", action="store_true", help="also judge the paper's template tree")
    evaluate.add_argument("--json", type=Path, metavar="PATH", help="also write the results as JSON")
    evaluate.add_argument("--png", type=Path, metavar="PATH", help="also draw the results (needs matplotlib)")
    evaluate.add_argument(
        "--card", type=Path, metavar="PATH", help="model card to write (default: README.md in the drafter's folder)"
    )
    _add_card_details(evaluate)
    evaluate.set_defaults(run=_run, stage="evaluate")

    everything = stages.add_parser("all", help="all stages in turn, from prompts to an evaluated drafter")
    _add_target(everything)
    _add_prompts(everything)
    everything.add_argument("output", type=Path, help="folder for rows.jsonl, heldout.jsonl, drafter and evaluation")
    _add_regenerate(everything)
    _add_fit(everything)
    _add_card_details(everything)
    everything.set_defaults(run=_run, stage="all")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="folder or hub name of the target")
    add_trust_remote_code(parser)
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument(
        "--chat-template-kwargs", type=_chat_template_kwargs, metavar="JSON",
        help="further variables of the target's chat template, such as '{\"enable_thinking\": false}': those that it "
        "will be served with",
    )  # fmt: skip
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave faulty lines out and report their number")


def _chat_template_kwargs(text: str) -> dict[str, Any]:
    kwargs = json_object(text)
    for name in SET_BY_TRAIN:
        if name in kwargs:
            raise argparse.ArgumentTypeError(f"{name!r} is set by the command itself: leave it out")
    return kwargs


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="?", help="file, local data set or hub name: prompts or conversations")
    parser.add_argument(
        "--own-prompts", type=int, default=0, metavar="NUMBER",
        help="prompts that the target writes itself, in addition to those given",
    )  # fmt: skip


def _add_card_details(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", help="for the model card: the training text and its licence")
    parser.add_argument(
        "--target-name", help="for the model card (default: the target's hub name, or the name of its folder)"
    )


def _add_regenerate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0],
        help="temperatures that will be served; the continuations of a prompt take them in turn (default 0)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, help="continuations of each prompt (default: one per temperature)")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="most tokens of a continuation (default %(default)s)"
    )
    parser.add_argument(
        "--engine", type=setting, nargs="+", default=[], metavar="KEY=VALUE", help="options of vllm.LLM"
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="time limit; training ends here or at --steps")
    parser.add_argument("--learning-rate", type=float, help="peak (default 0.005, or 0.002 with --init)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per device and step (default %(default)s)")
    parser.add_argument(
        "--anchors-per-row", type=int, default=64, help="positions trained per row and epoch (default %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of a row; longer rows are cut (default %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=8, help="frames of the drafter (default %(default)s)")
    parser.add_argument("--label-length", type=int, help="labels per anchor (default: one per frame)")
    parser.add_argument("--label-decay", type=float, help="weight of a label over the one before it (default 0.8)")
    parser.add_argument(
        "--label-temperature", type=float,
        help="temperature of the target's distribution that the drafter learns, above 0 up to 1 (default 0.5)",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=1, help="layers of the drafter (default %(default)s)")
    parser.add_argument("--rank", type=int, default=256, help="rank of the conditioning tables (default %(default)s)")
    parser.add_argument(
        "--emission", default="conditioned", choices=("conditioned", "independent"),
        help="independent is plain CTC, for comparison",
    )  # fmt: skip
    parser.add_argument(
        "--draft-vocab-size", type=int, metavar="NUMBER",
        help="draft only the most frequent tokens of the rows (default: a quarter of all, at least 2048; 0: all)",
    )  # fmt: skip
    parser.add_argument(
        "--target-layers", nargs="+", metavar="LAYER",
        help="layers of the target that the drafter reads beside the last hidden state, or none (default: three where "
        "vLLM hands them out)",
    )  # fmt: skip
    parser.add_argument("--init", metavar="DRAFTER", help="folder of a drafter to start from (default: random weights)")
    parser.add_argument(
        "--replay", metavar="ROWS", help="rows of earlier text, trained along so that the drafter does not forget it"
    )
    parser.add_argument(
        "--replay-share", type=float, metavar="SHARE", help="of the trained rows, those of --replay (default 0.25)"
    )
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the target's hidden states on disk")
    parser.add_argument(
        "--hidden-from-engine", type=setting, nargs="*", metavar="KEY=VALUE",
        help="let vLLM compute what --cache keeps, with these options of vllm.LLM, such as tensor_parallel_size=2: for "
        "quantized targets and those too large for one device",
    )  # fmt: skip
    parser.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints (default %(default)s)")
    parser.add_argument(
        "--trainer", type=setting, nargs="+", default=[], metavar="KEY=VALUE",
        help="fields of transformers.TrainingArguments, such as report_to=tensorboard",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, write an untrained drafter and stop")


def import_torch() -> None:
    """Import torch such that OpenMP threads sleep while they wait; without effect if the user has set a wait policy.

    By default they spin. Beside another busy process they then use up the processor time that the thread they wait for
    needs, and a training step takes many times as long.
    """
    given = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not given:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch  # noqa: F401

    if not given:
        # OpenMP has read it. vLLM's engines inherit the environment, and keep vLLM's own settings.
        del os.environ["OMP_WAIT_POLICY"]


def _run(options: argparse.Namespace) -> int:
    # The parser is built for every command, so it imports neither torch nor vLLM.
    import_torch()
    from vllm_ctc_spec.training.stages import STAGES

    STAGES[options.stage](options)
    return 0
