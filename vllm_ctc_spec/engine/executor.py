"""vLLM's executor of one process per worker, with fewer messages in each step.

vLLM's engine has the worker run the target, then has it sample, then asks it for its drafts, also when there are none:
three round trips between two processes in each step. Only a grammar's mask, which the engine makes while the target
runs, must come between the first two. So ours has the worker sample at once where there is no grammar, and send its
drafts along with the tokens (see cpu_worker.py).
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds


class CTCExecutor(MultiprocExecutor):
    _output: Any = None
    """The last step's, or its future."""

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        self._output = super().execute_model(*args, **kwargs)
        return self._output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        self._output = super().sample_tokens(*args, **kwargs)
        return self._output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        output = self._output.result() if isinstance(self._output, Future) else self._output
        return output.draft_token_ids
