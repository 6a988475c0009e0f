"""`vllm-ctc-spec demo`: the arguments of the demo."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

NUM_NODES = 32


def add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="serve a chat model with and without CTC trees, ask both a dozen questions, compare",
        description="Fetches a public chat model of 135 M parameters once (93 MB) and serves it with the drafter that "
        "this package ships. Exit status: 1 if the two engines' tokens differ in float32.",
    )  # fmt: skip
    demo.add_argument("--target", help="another target: model folder, or name on the Hugging Face hub")
    demo.add_argument("--drafter", help="folder of that target's CTC drafter")
    demo.add_argument("--nodes", type=int, default=NUM_NODES, help="node budget, 1 to 63 (default %(default)s)")
    demo.add_argument("--json", type=Path, metavar="PATH", help="also write the comparison as JSON")
    demo.add_argument(
        "--print-paths", action="store_true", help="print the folders of target and drafter, one per line, and exit"
    )
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from vllm_ctc_spec.config import check_node_budget
    from vllm_ctc_spec.demo.pair import choose_pair

    if options.print_paths:
        pair = choose_pair(options.target, options.drafter, lambda line: print(line, file=sys.stderr))
        print(pair.target)
        print(pair.drafter)
        return 0
    num_nodes = check_node_budget(options.nodes)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError('demo needs vLLM: pip install "vllm-ctc-spec[cpu]".')
    # Checking the settings imports vLLM, whose log lines would disturb the output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_ctc_spec.demo.run import ProgressLines, run_demo
    from vllm_ctc_spec.files import write_atomically
    from vllm_ctc_spec.tables import console

    terminal = console()
    report = ProgressLines(terminal)
    results = run_demo(choose_pair(options.target, options.drafter, report), num_nodes, terminal, report)
    if options.json is not None:
        write_atomically(options.json, json.dumps(results, indent=2).encode() + b"\n")
    return 0 if results["identical"] else 1
