"""vLLM's executor of one process per worker, with one message less in each step.

After every step vLLM's engine asks the worker for its drafts, also when there are none: another round trip between two
processes, which a step of a small target feels. Ours has them sent along with the tokens (see cpu_worker.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds


class CTCExecutor(MultiprocExecutor):
    _drafts: DraftTokenIds | None = None

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        self._drafts = output.draft_token_ids
        return output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts, self._drafts = self._drafts, None
        return drafts
