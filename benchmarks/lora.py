"""What LoRA adapters cost in acceptance: the drafter ignores them (docs/serving.md).

    .venv/bin/python -m benchmarks.lora TARGET DRAFTER [--rank 8] [--sizes 0.01 0.03 0.1] [--prompts FILE]

Adapters have random directions, for the linear layers of attention and MLP. Their size is that of the change over that
of the weight, as Frobenius norms. Greedy; a fixed node budget, so that every step drafts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.soak import metrics_of
from vllm_ctc_spec.tables import console

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

LINEAR = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj)\.weight")
"""Names of such weights in targets of the Llama family."""


def write_adapter(target: Path, folder: Path, rank: int, size: float) -> None:
    """In the files that peft writes. target: folder. size: see above."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for path in target.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping.
                if layer := LINEAR.fullmatch(name):
                    weight = file.get_tensor(name).float()
                    down = torch.randn(rank, weight.shape[1], generator=generator)
                    up = torch.randn(weight.shape[0], rank, generator=generator)
                    up *= size * weight.norm() / (up @ down).norm()
                    weights[f"base_model.model.{layer[1]}.lora_A.weight"] = down
                    weights[f"base_model.model.{layer[1]}.lora_B.weight"] = up
    modules = sorted({name.rsplit(".", 3)[-3] for name in weights})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")


def answers(llm: LLM, prompts: list[Any], adapter: LoRARequest | None, max_tokens: int) -> tuple[list[str], float]:
    """The texts, and tokens per decoding step."""
    from vllm import SamplingParams

    def counts() -> tuple[float, float]:
        values = metrics_of(llm)
        return values["vllm:spec_decode_num_drafts"], values["vllm:spec_decode_num_accepted_tokens"]

    before = counts()
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate(prompts, params, lora_request=adapter, use_tqdm=False)
    drafts, accepted = (after - earlier for after, earlier in zip(counts(), before))
    return [output.outputs[0].text for output in outputs], 1 + accepted / drafts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", help="folder")
    parser.add_argument("drafter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--prompts", type=Path, help="JSON lines, as for `vllm-ctc-spec verify` (default: its own)")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as folder:
        console().print(measure(options, Path(folder)))


def measure(options: argparse.Namespace, folder: Path) -> Table:
    from transformers import AutoTokenizer
    from vllm.lora.request import LoRARequest

    from vllm_ctc_spec.engine.lifetime import started
    from vllm_ctc_spec.verify.prompts import read_verify_prompts

    read = read_verify_prompts(options.prompts, options.num_prompts, AutoTokenizer.from_pretrained(options.target))
    prompts: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in read]
    adapters = []
    for number, size in enumerate(options.sizes, start=1):
        write_adapter(Path(options.target), folder / str(number), options.rank, size)
        adapters.append(LoRARequest(str(number), number, str(folder / str(number))))
    method = {"method": "ctc", "model": options.drafter, "num_speculative_tokens": 16, "adaptive_budget": False}
    table = Table("size of the adapter", "answers that it changes", "tokens per step")
    with started(
        options.target,
        speculative_config=method,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=options.rank,
        # One above their number: see docs/serving.md.
        max_loras=len(adapters) + 1,
        max_num_seqs=8,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 29,
        disable_log_stats=False,
    ) as llm:
        plain, length = answers(llm, prompts, None, options.max_tokens)
        table.add_row("none", "", f"{length:.2f}")
        for size, adapter in zip(options.sizes, adapters):
            texts, length = answers(llm, prompts, adapter, options.max_tokens)
            changed = sum(text != other for text, other in zip(texts, plain))
            table.add_row(f"{size:.1%}", f"{changed} of {len(texts)}", f"{length:.2f}")
    return table


if __name__ == "__main__":
    main()
