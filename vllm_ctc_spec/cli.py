"""`vllm-ctc-spec`: demo, chat, train, bench, verify, inspect. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_ctc_spec import __version__
from vllm_ctc_spec.bench.command import add_bench
from vllm_ctc_spec.chat.command import add_chat
from vllm_ctc_spec.demo.command import add_demo
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
        print(f"{parser.prog}: interrupted; the next run goes on from where this one stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-ctc-spec", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_demo(commands)
    add_chat(commands)
    add_train(commands)
    add_bench(commands)
    add_verify(commands)

    inspect = commands.add_parser("inspect", help="draw the token tree of one prompt")
    inspect.add_argument("target", help="folder or hub name of the target")
    inspect.add_argument("drafter", help="folder of its CTC drafter")
    inspect.add_argument("--prompt", required=True)
    inspect.add_argument("--nodes", type=int, default=32, help="node budget, 1 to 63 (default %(default)s)")
    inspect.add_argument("--tree", default="prefix", help="prefix, template or chain (default %(default)s)")
    inspect.add_argument("--candidates", type=int, default=32, help="candidates per frame (default %(default)s)")
    inspect.add_argument("--skip", type=int, default=0, help="decoding steps before the tree (default %(default)s)")
    inspect.add_argument("--png", type=Path, metavar="PATH", help="also draw it into this file")
    inspect.set_defaults(run=_inspect)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_ctc_spec.config import SpecOptions, check_node_budget
    from vllm_ctc_spec.inspection import draw, summary, to_png, to_terminal

    drawn = draw(
        options.target,
        options.drafter,
        options.prompt,
        check_node_budget(options.nodes),
        SpecOptions(tree=options.tree, candidates=options.candidates),
        options.skip,
    )
    console = Console()
    console.print(to_terminal(drawn))
    console.print(summary(drawn))
    if options.png is not None:
        to_png(drawn, options.png)
        console.print(f"drawn into {options.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
