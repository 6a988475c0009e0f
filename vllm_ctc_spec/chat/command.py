"""`vllm-ctc-spec chat`: its options, and the set-up of tokenizer, engine and terminal."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ctc_spec.command_line import add_trust_remote_code, given_engine_options, setting

if TYPE_CHECKING:
    from vllm_ctc_spec.chat.screen import Screen

MAX_CONTEXT = 8192
"""Largest default of `max_model_len`, in tokens: the KV cache of a whole conversation is reserved at the start."""


def add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat", help="chat with a target; each decoding step's tokens have a colour of their own",
        description="A conversation in the terminal. Without a terminal: one message per line of the standard input, "
        "answers to the standard output, everything else to the standard error.",
    )  # fmt: skip
    chat.add_argument("target", nargs="?", help="folder or hub name of a chat model (default: the demo's)")
    chat.add_argument("drafter", nargs="?", help="folder of its CTC drafter (default: the demo's)")
    chat.add_argument("--target", dest="named_target", metavar="TARGET", help="same as the positional argument")
    chat.add_argument("--drafter", dest="named_drafter", metavar="DRAFTER", help="same as the positional argument")
    chat.add_argument("--nodes", type=int, default=32, help="node budget, 1 to 63 (default %(default)s)")
    chat.add_argument(
        "--no-adaptive-budget", action="store_true",
        help="verify the whole node budget in every step, even where fewer nodes are faster",
    )  # fmt: skip
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    chat.add_argument(
        "--top-p", type=float, default=1.0, help="nucleus sampling; 1 keeps all tokens (default %(default)s)"
    )
    chat.add_argument("--seed", type=int, help="sampling seed of each answer (default: none)")
    chat.add_argument("--max-tokens", type=int, default=1024, help="most tokens of an answer (default %(default)s)")
    chat.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's)")
    chat.add_argument(
        "--engine", type=setting, nargs="+", default=[], action="extend", metavar="KEY=VALUE",
        help="options of vllm.LLM, such as enforce_eager=true: starts sooner, answers more slowly",
    )  # fmt: skip
    add_trust_remote_code(chat)
    chat.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError('chat needs vLLM: pip install "vllm-ctc-spec[cpu]".')
    from vllm_ctc_spec.chat.conversation import Conversation
    from vllm_ctc_spec.chat.engine import ChatEngine
    from vllm_ctc_spec.chat.protocol import Sampling
    from vllm_ctc_spec.chat.screen import Screen, is_interactive, line_reader
    from vllm_ctc_spec.chat.session import Session
    from vllm_ctc_spec.config import check_node_budget
    from vllm_ctc_spec.demo.pair import choose_pair
    from vllm_ctc_spec.target_files import read_tokenizer

    check_node_budget(options.nodes)
    sampling = Sampling(options.temperature, options.top_p, options.seed, options.max_tokens)
    screen = Screen(is_interactive())
    given = given_engine_options(options)
    trust = bool(given.get("trust_remote_code"))
    named = options.named_target or options.target, options.named_drafter or options.drafter
    pair = choose_pair(*named, screen.note, trust)
    target, drafter = str(pair.target), str(pair.drafter)
    conversation = Conversation(read_tokenizer(target, trust), options.system)
    settings = _engine_settings(options, given, target, drafter)
    engine = None
    try:
        log = _log_file()
        engine = ChatEngine(log)
        with _progress(screen, f"starting vLLM; its log is {log}"):
            started = engine.start(target, settings)
        screen.note(
            f"{Path(target).name}, {started.dtype}, context of {started.max_model_len} tokens, "
            f"node budget {options.nodes}. /help lists the commands, Ctrl-D ends."
        )
        session = Session(engine, conversation, screen, sampling, started.max_model_len)
        session.run(line_reader(screen.is_interactive))
    except KeyboardInterrupt:
        return 130
    finally:
        if engine is not None:
            engine.close()
    return 0


def _engine_settings(options: argparse.Namespace, given: dict[str, Any], target: str, drafter: str) -> dict[str, Any]:
    """Options for `vllm.LLM`. given: those of the user."""
    from vllm_ctc_spec.kv_cache import engine_options
    from vllm_ctc_spec.machine import target_dtype

    for key in ("speculative_config", "worker_extension_cls"):
        if key in given:
            raise ValueError(f"--engine {key}: chat sets it itself. See DRAFTER, --nodes and --no-adaptive-budget.")
    dtype = str(target_dtype()).removeprefix("torch.")
    return {
        **engine_options(target, [MAX_CONTEXT], {"dtype": dtype, **given}, num_requests=1),
        "speculative_config": {
            "method": "ctc",
            "model": drafter,
            "num_speculative_tokens": options.nodes,
            "adaptive_budget": not options.no_adaptive_budget,
        },
    }


def _log_file() -> Path:
    with tempfile.NamedTemporaryFile(prefix="vllm-ctc-spec-chat-", suffix=".log", delete=False) as file:
        return Path(file.name)


@contextmanager
def _progress(screen: Screen, text: str) -> Iterator[None]:
    """Show `text` while the body runs; in a terminal with colours, with a spinner and the seconds passed."""
    if not (screen.is_interactive and screen.has_colours):
        screen.note(text)
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=screen.console, refresh_per_second=2) as progress:
        progress.add_task(text, total=None)
        yield
