"""Counts on a CPU the kernels that would be launched on a GPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be given: those that neither allocate nor only look at memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "empty_like", "_unsafe_view"):
            self.names.append(name)
        return func(*args, **kwargs or {})
