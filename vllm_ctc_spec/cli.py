"""The command `vllm-ctc-spec`. Its commands import what they need when they run, so that --help is fast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_ctc_spec import __version__
from vllm_ctc_spec.bench.command import add_bench
from vllm_ctc_spec.chat.command import add_chat
from vllm_ctc_spec.command_line import add_trust_remote_code
from vllm_ctc_spec.demo.command import add_demo
from vllm_ctc_spec.push import add_push
from vllm_ctc_spec.training.command import add_train
from vllm_ctc_spec.verify.command import add_verify


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{parser.prog}: interrupted. train and bench resume when the same command is run again.", file=sys.stderr
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-ctc-spec", description="Token-tree speculative decoding for vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_demo(commands)
    add_chat(commands)
    add_train(commands)
    add_push(commands)
    add_bench(commands)
    add_verify(commands)

    inspect = commands.add_parser("inspect", help="draw the token tree of one decoding step")
    inspect.add_argument("target", help="model folder, or name on the Hugging Face hub")
    inspect.add_argument("drafter", help="folder of its CTC drafter")
    inspect.add_argument("--prompt", required=True, help="text that the target continues, greedily and in float32")
    inspect.add_argument("--nodes", type=int, default=32, help="node budget, 1 to 63 (default %(default)s)")
    inspect.add_argument("--tree", default="prefix", help="prefix, template or chain (default %(default)s)")
    inspect.add_argument(
        "--candidates", type=int, default=32, help="candidate tokens per frame, 1 to 64 (default %(default)s)"
    )
    inspect.add_argument(
        "--skip", type=int, default=0, help="decoding steps before the one whose tree is drawn (default %(default)s)"
    )
    inspect.add_argument("--png", type=Path, metavar="PATH", help="also write a PNG (needs matplotlib)")
    add_trust_remote_code(inspect)
    inspect.set_defaults(run=_inspect)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from vllm_ctc_spec.config import SpecOptions, check_node_budget
    from vllm_ctc_spec.inspection import draw, summary, to_png, to_terminal
    from vllm_ctc_spec.tables import console

    drawn = draw(
        options.target,
        options.drafter,
        options.prompt,
        check_node_budget(options.nodes),
        SpecOptions(tree=options.tree, candidates=options.candidates),
        options.skip,
        options.trust_remote_code,
    )
    terminal = console()
    terminal.print(to_terminal(drawn))
    terminal.print(summary(drawn))
    if options.png is not None:
        to_png(drawn, options.png)
        terminal.print(f"drawn into {options.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
