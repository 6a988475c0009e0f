"""What a step costs on a GPU: plain decoding against drafting and verifying trees, a Llama with random weights.

    python -m benchmarks.gpu.step_cost [--shape 8B] [--batches 1 8] [--contexts 2048 8192] [--nodes 8 16 32 63]
        [--json PATH]

Needs torch, triton and transformers, but not vLLM. Both steps use the same matrix products and attention kernel, so
their ratio is that of the method, without an engine's overhead; kernel_check compares the kernel with others. Each part
is replayed from a CUDA graph with a cold L2 cache:

    decode   one row per request through the target
    verify   N + 1 rows per request
    draft    the drafter's context of as many rows as are accepted, its frames, the LM head of the frequent tokens
    build    from logits to the best N-node tree
    walk     greedy
    move     four nodes of each request, in all layers

"launched" is draft + build without a graph, as the engine runs them for large batches. PATH is rewritten after each
context. `benchmarks.cpu.step_cost` is the command for a CPU. Exit status 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention_steps import BLOCK_SIZE, ancestor_masks
from benchmarks.gpu.kernel_check import milliseconds
from benchmarks.gpu.llama import Llama, store
from benchmarks.shapes import SHAPES, Shape
from vllm_ctc_spec.algorithm import TokenTrees, accept_greedy
from vllm_ctc_spec.config import CTCDrafterConfig, SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter, Draft, KeyValue
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.attention import tree_attention
from vllm_ctc_spec.ops.triton.launch import chip_of, plan_launch
from vllm_ctc_spec.ops.triton.move import CacheTable, move_slots
from vllm_ctc_spec.training.data import num_frequent

NUM_FRAMES = 10
NUM_LAYERS = 3
"""Layers of the target that the drafter reads beside the last hidden state."""

NUM_ACCEPTED = 4
"""Nodes per request. With the anchor, the drafter's context grows by one row more."""

Time = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Cost:
    """Milliseconds; `ratio` is (verify + draft + build + walk + move) / decode."""

    batch: int
    context: int
    nodes: int
    decode: float
    verify: float
    draft: float
    build: float
    walk: float
    move: float
    launched: float

    @property
    def ratio(self) -> float:
        return (self.verify + self.draft + self.build + self.walk + self.move) / self.decode


class Setting:
    """Target, drafter and cache for `batch` requests, each with `context` positions."""

    def __init__(self, shape: Shape, batch: int, context: int, device: torch.device) -> None:
        self.shape, self.batch, self.context, self.device = shape, batch, context, device
        # The rows of a tree occupy slots after the context until the accepted ones are moved.
        self.width = -(-(context + 64) // BLOCK_SIZE)
        self.target = Llama(shape, batch * self.width, BLOCK_SIZE, device)
        self.block_table = torch.arange(batch * self.width, dtype=torch.int32, device=device).view(batch, -1)
        config = CTCDrafterConfig(
            hidden_size=shape.hidden_size, vocab_size=shape.vocab_size, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_size,
            intermediate_size=shape.intermediate_size, num_frames=NUM_FRAMES, label_length=NUM_FRAMES,
            draft_vocab_size=num_frequent(shape.vocab_size), target_layers=list(range(NUM_LAYERS)),
        )  # fmt: skip
        with device:
            self.drafter = CTCDrafter(config).bfloat16().eval().requires_grad_(False)
        self.drafter.set_tables(self.target.embedding, self.target.lm_head)
        self.head = head_of(self.drafter, self.target.lm_head)
        self.drafter_cache = torch.zeros_like(self.target.layers[0].kv_cache)

    def rows(self, num_rows: int, masks: Tensor) -> TreeBatch:
        """masks: [num_rows] int64, the same for each request."""
        shape, full = self.shape, partial(torch.full, dtype=torch.int32, device=self.device)
        heads = shape.num_heads, shape.num_kv_heads, shape.head_size
        return TreeBatch(
            row_starts=num_rows * torch.arange(self.batch, dtype=torch.int32, device=self.device),
            num_rows=full((self.batch,), num_rows),
            ancestor_masks=masks.to(self.device).repeat(self.batch),
            context_lens=full((self.batch,), self.context),
            block_table=self.block_table,
            max_rows=num_rows,
            launch=plan_launch(self.batch, num_rows, self.context, *heads, torch.bfloat16, chip_of(self.device)),
        )

    def positions(self, num_rows: int) -> Tensor:
        return torch.arange(self.context, self.context + num_rows, device=self.device).repeat(self.batch)

    def slots(self, rows: Tensor) -> Tensor:
        """[R, n] int64: slots of positions context + rows, for rows [n] that are the same for each request."""
        first = self.width * BLOCK_SIZE * torch.arange(self.batch, device=self.device)[:, None]
        return first + self.context + rows.to(self.device)

    def forward(self, num_rows: int) -> Callable[[], tuple[Tensor, Tensor]]:
        tokens = torch.randint(self.shape.vocab_size, (self.batch * num_rows,), device=self.device)
        slots = self.slots(torch.arange(num_rows)).flatten()
        batch = self.rows(num_rows, ancestor_masks(num_rows))
        return lambda: self.target(tokens, self.positions(num_rows), slots, batch)

    def drafting(self) -> Callable[[], tuple[Draft, Tensor]]:
        accepted = self.batch * (1 + NUM_ACCEPTED)
        width = self.shape.hidden_size * (1 + NUM_LAYERS)
        hidden = torch.randn(accepted, width, dtype=torch.bfloat16, device=self.device)
        slots = self.slots(torch.arange(1 + NUM_ACCEPTED)).flatten()
        last_tokens = torch.randint(self.shape.vocab_size, (self.batch, 2), device=self.device)
        frames = self.rows(NUM_FRAMES + 1, torch.full((NUM_FRAMES + 1,), -1))

        def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
            rows = [values.flatten(0, 1) for values in (query, *own)]
            out = torch.empty_like(rows[0])
            tree_attention(*rows, self.drafter_cache, frames, self.shape.head_size**-0.5, out)
            return out.view_as(query)

        def draft() -> tuple[Draft, Tensor]:
            fused = self.drafter.fuse(hidden)
            for own in self.drafter.context(fused, self.positions(1 + NUM_ACCEPTED)):
                store(self.drafter_cache, slots, own.key, own.value)
            embeddings = self.target.embedding[last_tokens]
            drafted = self.drafter(embeddings, fused[: self.batch], frames.context_lens.long(), attend)
            return drafted, emission_logits(self.drafter, drafted.frames, self.head)

        return draft

    def moving(self) -> Callable[[], None]:
        table = CacheTable.of([layer.kv_cache for layer in self.target.layers])
        targets = torch.arange(1, 1 + NUM_ACCEPTED)
        sources, places = self.slots(3 * targets), self.slots(targets)
        return lambda: move_slots(table, sources, places)


@torch.inference_mode()
def measure(setting: Setting, node_budgets: list[int], time: Time, time_launched: Time) -> Iterator[Cost]:
    draft = setting.drafting()
    drafted, logits = draft()
    decode, draft_ms, move = (time(call) for call in (setting.forward(1), draft, setting.moving()))
    for nodes in node_budgets:
        verify = setting.forward(1 + nodes)
        _, verified = verify()

        def build(nodes: int = nodes) -> TokenTrees:
            return draft_trees(setting.drafter, drafted, logits, nodes, SpecOptions())

        trees = build()

        def walk(trees: TokenTrees = trees, verified: Tensor = verified) -> Any:
            return accept_greedy(trees, verified.argmax(-1).view(setting.batch, -1), NUM_FRAMES)

        yield Cost(
            setting.batch, setting.context, nodes, decode, time(verify), draft_ms, time(build), time(walk), move,
            time_launched(lambda build=build: (draft(), build())),
        )  # fmt: skip


def print_table(costs: list[Cost]) -> None:
    names = [name for name in asdict(costs[0]) if name not in ("batch", "context", "nodes")]
    print(f"{'batch':>5} {'context':>7} {'nodes':>5} " + " ".join(f"{name:>8}" for name in (*names, "ratio")))
    for cost in costs:
        times = " ".join(f"{getattr(cost, name):>8.3f}" for name in names)
        print(f"{cost.batch:>5} {cost.context:>7} {cost.nodes:>5} {times} {cost.ratio:>8.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 16, 32, 63])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("step_cost: torch sees no CUDA device; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    time_launched = partial(triton.testing.do_bench, return_mode="median")
    costs: list[Cost] = []
    for batch in options.batches:
        for context in options.contexts:
            torch.manual_seed(0)
            setting = Setting(SHAPES[options.shape], batch, context, device)
            costs += measure(setting, options.nodes, milliseconds, time_launched)
            del setting
            if options.json:
                rows = [{**asdict(cost), "ratio": cost.ratio} for cost in costs]
                options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "costs": rows}, indent=1))
    print(f"{torch.cuda.get_device_name()}, {options.shape}, bfloat16, milliseconds")
    print_table(costs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
