"""`vllm-ctc-spec push`: a drafter and its model card, to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


def add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="upload a drafter and its model card to the Hugging Face hub")
    push.add_argument("drafter", type=Path, help="folder that training wrote")
    push.add_argument("repo", help="repository of the hub, NAME or ORGANISATION/NAME, created if it is not there")
    push.add_argument("--revision", metavar="BRANCH", help="branch to write to, created if need be (default: main)")
    push.add_argument("--private", action="store_true", help="create a repository that others cannot read")
    push.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> int:
    from huggingface_hub import HfApi

    print(push(options.drafter, options.repo, options.revision, options.private, HfApi()))
    return 0


def push(drafter: Path, repo: str, revision: str | None, private: bool, api: HfApi) -> str:
    """Upload the folder and return the address of the commit.

    Raises ValueError where the folder is no drafter or has no model card, before anything is sent; and where the hub
    cannot be reached or refuses.
    """
    from vllm_ctc_spec.drafter.checkpoint import check_drafter
    from vllm_ctc_spec.drafter.lookup import is_hub_name
    from vllm_ctc_spec.files import RECORD

    check_drafter(str(drafter))
    if not (drafter / CARD).is_file():
        raise ValueError(
            f"drafter {str(drafter)!r} has no model card ({CARD}). Write it with `vllm-ctc-spec train evaluate TARGET "
            f"{drafter} ROWS`."
        )
    if not is_hub_name(repo):
        raise ValueError(f"{repo!r} is no name of a repository: write NAME or ORGANISATION/NAME.")
    try:
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        # The record of the run has paths of this machine.
        commit = api.upload_folder(
            repo_id=name,
            folder_path=drafter,
            revision=revision,
            ignore_patterns=[RECORD],
            commit_message="CTC drafter for vLLM",
        )
    # Of the hub's client and of its HTTP library, which differs between its versions.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{repo!r} cannot be written on the Hugging Face hub ({reason}). Check the name, the "
            "network, HF_HUB_OFFLINE, and that your token (HF_TOKEN or `hf auth login`) may write there."
        ) from error
    return str(commit.commit_url)
