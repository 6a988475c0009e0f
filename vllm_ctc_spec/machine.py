"""Describes this machine, for measurements and model cards, and chooses the number type that is fast on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from vllm_ctc_spec import __version__
from vllm_ctc_spec.engine.compat import installed_vllm


@dataclass(frozen=True)
class Machine:
    cpu: str
    num_cores: int
    """Cores that this process may use."""
    memory_gib: float
    gpu: str | None
    versions: dict[str, str]
    """Of vLLM, torch, transformers and this package, by distribution name."""


def this_machine() -> Machine:
    versions = {"vllm": installed_vllm() or "none", "torch": torch.__version__, "transformers": version("transformers")}
    return Machine(
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions={"vllm-ctc-spec": __version__, **versions},
    )


def bf16_is_fast() -> bool:
    """Whether the machine has instructions for bfloat16 matrix products. Emulated, they are slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def target_dtype() -> torch.dtype:
    """The default number type of a target."""
    return torch.bfloat16 if bf16_is_fast() else torch.float32


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
