"""Runs in vLLM's worker process (`worker_extension_cls`) and keeps the last tree that the target verified."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_ctc_spec.chat.protocol import VerifiedTree


class ChatWorkerExtension:
    """For an engine with one request at a time."""

    model_runner: Any

    def chat_record_trees(self) -> None:
        """From now on keep the input and output of each walk over a tree."""
        walk = self.model_runner.walker
        self.chat_last_walk: Any = None

        def recording(logits: Any, trees: Any, metadata: Any, histories: Any, *rest: Any) -> Any:
            # The walk may extend the history while it samples.
            anchor = histories[0][-1:]
            walked = walk(logits, trees, metadata, histories, *rest)
            if trees[0].tokens:
                self.chat_last_walk = anchor, trees[0], walked
            return walked

        self.model_runner.walker = recording

    def chat_last_tree(self) -> dict[str, Any] | None:
        """The fields of a VerifiedTree, as a dict: vLLM does not send classes of others between its processes."""
        if self.chat_last_walk is None:
            return None
        [anchor], tree, walked = self.chat_last_walk
        [accepted] = walked.accepted_nodes
        emitted = walked.sampler_output.sampled_token_ids[0, : len(accepted) + 1].tolist()
        return dataclasses.asdict(
            VerifiedTree(anchor, tree.tokens, tree.parents, tree.depths, tree.probabilities, accepted, emitted)
        )
