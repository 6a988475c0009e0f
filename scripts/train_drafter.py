"""Trains the drafter that the package ships again, from nothing: fetches its target, then runs `train all`.

    scripts/train_drafter.py OUTPUT [PROMPTS] [--OPTION ...]

The result is OUTPUT/drafter. A run that was killed resumes where it stopped. Options are those of
`vllm-ctc-spec train all`; they override the ones below.
"""

from __future__ import annotations

import sys

from vllm_ctc_spec.cli import main
from vllm_ctc_spec.training.command import import_torch

# Before any other import loads torch.
import_torch()
from vllm_ctc_spec.demo.pair import HUB_NAME, default_target  # noqa: E402

OPTIONS = ["--own-prompts=7000", "--temperatures", "0", "0.5", "0", "1", "--max-tokens=320"]
OPTIONS += ["--minutes=120", "--steps=1000000", "--anchors-per-row=256"]


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    output, *others = arguments
    prompts = others[:1] if others and not others[0].startswith("-") else []
    try:
        target = str(default_target())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    # The model card shows this command.
    sys.argv = ["vllm-ctc-spec", "train", "all", target, *prompts, output, "--target-name", HUB_NAME, *OPTIONS]
    sys.argv += others[len(prompts) :]
    return main()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
