"""Continuations that stand in the text already: the second source of a request's tree, beside the drafter.

The counts are those of arctic-inference's suffix trees: one of each request's prompt and output, and, with
"request+answers", one of the latest answers that this process has given. What a request's last tokens were followed by
before is drafted again (algorithm/mixture.py, algorithm/source_weights.py).

A request's state begins at its first drafts, follows the tokens that the runner keeps of it, and is freed with them.
It depends on these tokens alone, so that chunked prompts, cached prefixes and preemption need no care.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_ctc_spec.algorithm import (
    NOTHING,
    DrafterGains,
    Prefixes,
    Reliability,
    SourceWeights,
    likeliest_path,
    log_ratio,
    mix,
)
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.engine.host_tree import EMPTY_TREE, HostTree

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

LONGEST_MATCH = 12
"""Last tokens that are looked for at most: more of them seldom tell places apart, and each costs a search."""

MAX_ANSWERS = 1024
"""Answers that "request+answers" keeps: the latest."""


@dataclass
class _State:
    """What is known of one request."""

    num_read: int
    """Tokens, of prompt and output, that its suffix tree has."""
    evidence: float = 0.0
    """See SourceWeights."""
    match: int = 0
    """Of its last tokens; 0 where nothing was found."""
    found: Prefixes = NOTHING
    """After these tokens, by the suffix tree."""
    drafted: Prefixes = NOTHING
    """After the same tokens, by the drafter; nothing where it was not asked."""


class Retrieval:
    def __init__(self, options: SpecOptions, num_nodes: int) -> None:
        # Optional, so not imported where it is not used.
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.depth = options.retrieval_depth
        self.num_nodes = num_nodes
        self.least = options.min_prefix_probability
        self.reliability = Reliability(LONGEST_MATCH)
        self.weights = SourceWeights(LONGEST_MATCH)
        self.gains = DrafterGains(LONGEST_MATCH)
        self.states: dict[str, _State] = {}
        num_answers = MAX_ANSWERS if options.retrieval == "request+answers" else 0
        self._trees = SuffixDecodingCache(self.depth + LONGEST_MATCH, num_answers)

    def find(self, requests: Sequence[CachedRequestState]) -> None:
        """Take in the tokens of requests that draft now, and look for what may follow them."""
        for request in requests:
            self._find(request.req_id, request.prompt_token_ids or [], request.output_token_ids)

    def _find(self, request: str, prompt: list[int], output: list[int]) -> None:
        state = self.states.get(request)
        if state is None:
            self._trees.start_request(request, prompt)
            state = self.states[request] = _State(len(prompt))
        new = output[max(state.num_read - len(prompt), 0) :]
        self._learn(state, new)
        self._trees.add_active_response(request, new)
        state.num_read += len(new)
        # The library looks for less than all tokens that it is given.
        last = output[-LONGEST_MATCH - 1 :]
        if (missing := LONGEST_MATCH + 1 - len(last)) and prompt:
            last = prompt[-missing:] + last
        draft = self._trees.speculate(
            request, last, self.num_nodes, 0.0, float(self.num_nodes), min_token_prob=0.0, use_tree_spec=True
        )
        state.match = draft.match_len if draft.token_ids else 0
        state.found = self._prefixes(draft.token_ids, draft.parents, draft.probs, state.match)

    def _prefixes(self, tokens: list[int], parents: list[int], shares: list[float], match: int) -> Prefixes:
        """shares: of the places where the match was found before, those where the text went on so."""
        if not tokens:
            return NOTHING
        # One of these places is the end of the text, where nothing follows yet.
        followed = sum(share for share, parent in zip(shares, parents) if parent < 0)
        by_depth = self.reliability.by_depth(match, self.depth)
        depths: list[int] = []
        psi: list[float] = []
        for share, parent in zip(shares, parents):
            depth = depths[parent] + 1 if parent >= 0 else 1
            depths.append(depth)
            psi.append(by_depth[depth] * min(share / followed, 1.0) if depth <= self.depth else 0.0)
        return Prefixes(tokens, [parent + 1 for parent in parents], psi)

    def _learn(self, state: _State, tokens: list[int]) -> None:
        """From the tokens that followed those of the last search."""
        if not tokens:
            return
        found = state.found.along(tokens)
        if state.match:
            self.reliability.observe(state.match, found)
        if not state.drafted.tokens:
            self.gains.observe_without(state.match)
            return
        drafted = state.drafted.along(tokens)
        self.gains.observe(state.match, drafted, found)
        if state.match:
            state.evidence = self.weights.observe(state.match, state.evidence, log_ratio(drafted, found))

    def gain_of_drafter(self, requests: Sequence[CachedRequestState]) -> float:
        """Accepted tokens that the drafter is expected to add for these requests. `find` comes before."""
        return sum(self.gains.of(self.states[each.req_id].match) for each in requests)

    def join(self, requests: Sequence[CachedRequestState], drafted: Sequence[HostTree]) -> list[HostTree]:
        """Each request's tree of both sources; of one where the other has nothing. `find` comes before.

        drafted: nothing where the drafter was not asked.
        """
        trees = drafted or [EMPTY_TREE] * len(requests)
        return [self._join(request, tree) for request, tree in zip(requests, trees, strict=True)]

    def _join(self, request: CachedRequestState, drafted: HostTree) -> HostTree:
        state = self.states[request.req_id]
        state.drafted = Prefixes(drafted.tokens, drafted.parents, drafted.probabilities)
        if not state.match:
            return drafted
        weight = self.weights.weight(state.match, state.evidence) if drafted.tokens else 0.0
        mixed = mix(state.drafted, state.found, weight, self.num_nodes, self.least)
        return HostTree.of(likeliest_path(mixed) if is_chain_only(request) else mixed)

    def free(self, requests: Iterable[str]) -> None:
        """Requests that have ended, or were aborted; those without a state are passed over."""
        for request in requests:
            if self.states.pop(request, None) is not None:
                self._trees.stop_request(request)


def is_chain_only(request: CachedRequestState) -> bool:
    """Whether it has structured output: the grammar's mask is made for a chain."""
    params = request.sampling_params
    return params is not None and params.structured_outputs is not None
