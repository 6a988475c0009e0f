"""`vllm-ctc-spec verify`: its options, checked before an engine starts, and its output."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ctc_spec.command_line import add_trust_remote_code, given_engine_options, setting

if TYPE_CHECKING:
    from vllm_ctc_spec.verify.run import Task, Verification

RESERVED_KEYS = ("model", "speculative_config", "disable_log_stats", "worker_extension_cls")
"""Options of `vllm.LLM` that verify sets itself."""

NUM_NODES = 32
EXAMPLE = """--speculative-config '{"method": "ctc", "model": "path/to/drafter", "num_speculative_tokens": 32}'"""


def add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify", help="compare a speculative method's answers with plain vLLM's",
        description="Sends the same requests to plain vLLM and to vLLM with a speculative method, ours or vLLM's own: "
        "greedy and seeded, with penalties, bans, stop strings, limits and log probabilities, in one batch and alone. "
        "Exit status: 0 if nothing differs that must be equal, 1 if something does, 2 if it cannot run.",
    )  # fmt: skip
    verify.add_argument("target", nargs="?", help="model folder, or name on the Hugging Face hub (default: the demo's)")
    verify.add_argument(
        "--speculative-config", metavar="JSON",
        help="as for `vllm serve`, any method (default, with the demo's target: ctc with its drafter)",
    )  # fmt: skip
    verify.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON lines, as for train and bench (default: built-in prompts)"
    )
    verify.add_argument(
        "--num-prompts", type=int, default=24, help="prompts, and so requests of most groups (default %(default)s)"
    )
    verify.add_argument("--max-tokens", type=int, default=64, help="most tokens of an answer (default %(default)s)")
    verify.add_argument(
        "--engine", type=setting, nargs="+", default=[], action="extend", metavar="KEY=VALUE",
        help="options of vllm.LLM, such as dtype=bfloat16 (default float32) or enforce_eager=true",
    )  # fmt: skip
    add_trust_remote_code(verify)
    verify.add_argument("--json", type=Path, metavar="PATH", help="also write every difference as JSON")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError('verify needs vLLM: pip install "vllm-ctc-spec[cpu]".')
    # vLLM is imported here, for checks of settings; its log lines would disturb the progress bars.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_ctc_spec.files import write_atomically
    from vllm_ctc_spec.tables import console
    from vllm_ctc_spec.verify.report import as_json, lines, to_table

    terminal = console()
    task = _task(options, terminal)
    verification = _run(task, terminal)
    terminal.print(to_table(verification))
    for line in lines(verification):
        terminal.print(line, markup=False, highlight=False)
    if options.json is not None:
        write_atomically(options.json, json.dumps(as_json(task, verification), indent=1).encode())
    return 0 if verification.holds else 1


def _task(options: argparse.Namespace, console: Any) -> Task:
    """Raises ValueError for all that can be known before an engine starts."""
    from vllm_ctc_spec.target_files import read_text_config, read_tokenizer
    from vllm_ctc_spec.verify.groups import MIN_MAX_TOKENS
    from vllm_ctc_spec.verify.prompts import read_verify_prompts
    from vllm_ctc_spec.verify.run import Task
    from vllm_ctc_spec.vllm_keys import check_engine_keys, check_speculative_keys

    if options.max_tokens < MIN_MAX_TOKENS:
        raise ValueError(f"--max-tokens {options.max_tokens}: use at least {MIN_MAX_TOKENS}.")
    if options.num_prompts < 1:
        raise ValueError(f"--num-prompts {options.num_prompts}: use at least 1.")
    given = given_engine_options(options)
    for key in RESERVED_KEYS:
        if key in given:
            raise ValueError(f"--engine {key}: verify sets it itself. See TARGET and --speculative-config.")
    check_engine_keys("--engine", given)
    target, config = _models(options, console)
    check_speculative_keys("--speculative-config", config, target)
    trust = bool(given.get("trust_remote_code"))
    context = read_text_config(target, trust).max_position_embeddings
    prompts = read_verify_prompts(options.prompts, options.num_prompts, read_tokenizer(target, trust))
    return Task(target, config, _engine(target, given, prompts, options.max_tokens, context), prompts,
                options.max_tokens)  # fmt: skip


def _models(options: argparse.Namespace, console: Any) -> tuple[str, dict[str, Any]]:
    """The target and its `speculative_config`: as named, else the demo's."""
    from vllm_ctc_spec.demo.pair import HUB_NAME, NAME, default_target, shipped_drafter
    from vllm_ctc_spec.files import user_cache

    def note(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    if options.speculative_config is not None:
        config = _parse(options.speculative_config)
    elif options.target in (None, HUB_NAME) or Path(options.target).resolve() == user_cache(NAME).resolve():
        config = {"method": "ctc", "model": str(shipped_drafter()), "num_speculative_tokens": NUM_NODES}
    else:
        raise ValueError(f"verify {options.target}: name the method to verify, for example {EXAMPLE}.")
    return options.target or str(default_target(note)), config


def _parse(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--speculative-config {text!r} is not JSON ({error}). Write {EXAMPLE}.") from error
    if not isinstance(config, dict) or not config:
        raise ValueError(f"--speculative-config {text!r} must be a JSON object with settings. Write {EXAMPLE}.")
    return config


def _engine(
    target: str, given: dict[str, Any], prompts: tuple[tuple[int, ...], ...], max_tokens: int, context: int
) -> dict[str, Any]:
    """Options for `vllm.LLM`: `given`, and defaults that fit the prompts. context: tokens that the target can read."""
    from vllm_ctc_spec.kv_cache import engine_options

    context = min(context, given.get("max_model_len", context))
    for number, prompt in enumerate(prompts, start=1):
        if not 0 < len(prompt) <= context - max_tokens:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with an answer of {max_tokens} it needs 1 to "
                f"{context - max_tokens}, because the context holds {context}. Leave it out or change --max-tokens."
            )
    # All prompts of a group in one step: on a CPU plain vLLM fails if a seeded request's prompt is split over steps.
    together = {"max_num_batched_tokens": max(8192, sum(map(len, prompts)))}
    lengths = [len(prompt) + max_tokens for prompt in prompts]
    return engine_options(target, lengths, {"dtype": "float32", **together, **given})


def _run(task: Task, console: Any) -> Verification:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_ctc_spec.verify.groups import NUM_GROUPS
    from vllm_ctc_spec.verify.run import TITLES, verify

    logs = Path(tempfile.mkdtemp(prefix="vllm-ctc-spec-verify-"))
    console.print(f"{task.target}; vLLM's logs are in {logs}", markup=False, highlight=False)
    columns = (
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Few refreshes, because they take processor time from the engines.
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        bars = {
            title: progress.add_task("", total=NUM_GROUPS, start=False, title=f"{title:16}")
            for title in TITLES.values()
        }

        def report(title: str, stage: str, done: int) -> None:
            if not progress.tasks[bars[title]].started:
                progress.start_task(bars[title])
            progress.update(bars[title], description=stage, advance=done)

        return verify(task, logs, report)
