"""Start-up refuses what the CUDA path does not support, by name and with a remedy; no engine starts here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.engine.attention.choice import tree_attention_of
from vllm_ctc_spec.engine.devices import check_device, with_piecewise_graphs


@dataclass(frozen=True)
class Platform:
    device_name: str = "cuda"
    capability: tuple[int, int] = (9, 0)

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return self.device_name == "cuda"

    def get_device_capability(self) -> tuple[int, int]:
        return self.capability


def check(
    options: dict[str, Any],
    target: dict[str, Any] | None = None,
    platform: Platform | None = None,
    attention_kernel: str = "own",
) -> None:
    sizes = {"head_size": 128, "num_heads": 32, "num_kv_heads": 8, "dtype": torch.bfloat16, **(target or {})}
    model = SimpleNamespace(
        dtype=sizes["dtype"],
        get_head_size=lambda: sizes["head_size"],
        get_num_attention_heads=lambda parallel: sizes["num_heads"],
        get_num_kv_heads=lambda parallel: sizes["num_kv_heads"],
    )
    engine_args = EngineArgs(model=".", **options)
    with patch("vllm.platforms.current_platform", platform or Platform()):
        check_device(engine_args, model, SimpleNamespace(), attention_kernel)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, {}),
        ({"kv_cache_dtype": "fp8"}, {}),
        ({"attention_backend": "TRITON_ATTN", "block_size": 64}, {"dtype": torch.float32}),
        ({"attention_config": {"backend": "FLASH_ATTN"}}, {"head_size": 80}),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, {}),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, {}),
    ],
)
def test_supported_options_are_accepted(options: dict[str, Any], target: dict[str, Any]) -> None:
    check(options, target)


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({"attention_backend": "FLASHINFER"}, {}, "attention backend FLASHINFER.*--attention-backend FLASH_ATTN"),
        ({"attention_config": {"backend": "FLEX_ATTENTION"}}, {}, "attention backend FLEX_ATTENTION"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, {}, "cudagraph_mode=FULL:.*PIECEWISE"),
        ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, {}, "cudagraph_mode=FULL_AND_PIECEWISE:"),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, {}, "cudagraph_mode=FULL_DECODE_ONLY:"),
        ({"kv_cache_dtype": "fp8_e5m2"}, {}, "kv_cache_dtype='fp8_e5m2'.*\"fp8\""),
        ({"kv_cache_dtype": "int8_per_token_head"}, {}, "kv_cache_dtype='int8_per_token_head'"),
        ({"kv_cache_dtype": "float16"}, {}, "kv_cache_dtype=torch.float16 with dtype=torch.bfloat16"),
        ({"block_size": 8}, {}, "block_size=8"),
        ({}, {"head_size": 32}, "head_size=32"),
        ({}, {"num_heads": 12}, "num_heads=12"),
    ],
)
def test_unsupported_options_are_refused_by_name(options: dict[str, Any], target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(options, target)


def test_xformers_is_accepted_without_and_refused_with_what_it_lacks() -> None:
    check({}, attention_kernel="xformers")
    for options, target in (({"kv_cache_dtype": "fp8"}, {}), ({}, {"dtype": torch.float32}), ({}, {"head_size": 80})):
        with pytest.raises(ValueError, match="attention_kernel='xformers'"):
            check(options, target, attention_kernel="xformers")


@pytest.mark.parametrize(("capability", "options"), [((7, 5), {}), ((8, 6), {"kv_cache_dtype": "fp8"})])
def test_an_older_gpu_is_refused_by_its_compute_capability(
    capability: tuple[int, int], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{capability[0]}.{capability[1]}"):
        check(options, platform=Platform(capability=capability))


def test_other_platforms_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="CPU and CUDA backends, not on 'rocm'"):
        check({}, platform=Platform("rocm"))


def test_a_backend_that_vllm_chose_itself_is_refused_by_name() -> None:
    chosen = SimpleNamespace(get_name=lambda: "FLASHINFER")
    layer = SimpleNamespace(impl=SimpleNamespace(), get_attn_backend=lambda: chosen)
    with pytest.raises(ValueError, match=r"attention backend FLASHINFER.*--attention-backend FLASH_ATTN"):
        tree_attention_of([[layer]], "own")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"sliding_window": 64, "chunk_lookback": 1}, "chunked attention"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share their keys and values"),
    ],
)
def test_layers_with_unsupported_attention_are_refused(arguments: dict[str, Any], message: str) -> None:
    from vllm_ctc_spec.engine.attention.triton import TreeTritonAttentionBackend

    plain = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    make = TreeTritonAttentionBackend.get_impl_cls()
    make(num_heads=2, head_size=64, scale=0.125, num_kv_heads=1, **plain)
    with pytest.raises(ValueError, match=message):
        make(num_heads=2, head_size=64, scale=0.125, num_kv_heads=1, **{**plain, **arguments})


def test_piecewise_cuda_graphs_are_the_default_and_user_settings_do_not_change() -> None:
    silent, without = CompilationConfig(), CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE)
    assert with_piecewise_graphs(silent).cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert silent.cudagraph_mode is None
    assert with_piecewise_graphs(without).cudagraph_mode == CUDAGraphMode.NONE


def test_the_gpu_worker_does_not_import_vllms_cpu_worker() -> None:
    program = (
        "import sys, vllm_ctc_spec.engine.worker as worker, vllm_ctc_spec.engine.attention.triton\n"
        "sys.exit('vllm.v1.worker.cpu.shm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
