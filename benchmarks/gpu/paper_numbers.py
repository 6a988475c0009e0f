"""Tree attention on an H200, calculated: bytes against the floor, programs against processors, registers, tiles.

    python -m benchmarks.gpu.paper_numbers [--contexts ...] [--batches ...] [--nodes ...]

Needs Triton's compiler and rich, but no GPU, and prints Markdown. Heads of Llama-3-8B: 32 query, 8 key-value, size
128, bfloat16.

The first table is of the compiled kernel: the planned tile of each node budget, then others. The second is of the
launch plan:

    row blocks    programs that read the same keys and values, because one holds at most block_m rows
    idle rows     share of the rows computed that are padding
    programs      with work, after the context was split
    SMs           share of the 132 processors that have a program, in the first wave
    floor         bytes that any kernel must move: context, the step's rows, the result; and the time at 4.8 TB/s
    L2 / floor    bytes that all programs request, over the floor; the second reading of the same keys should hit L2
    merge / floor the splits' results, written and read once more, over the floor
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks.gpu.attention_steps import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS
from benchmarks.gpu.compiled import compile_attention, usage
from vllm_ctc_spec.ops.triton.launch import HOPPER, Launch, plan_launch
from vllm_ctc_spec.tables import markdown_table

GROUP = NUM_HEADS // NUM_KV_HEADS
ELEMENT_BYTES = 2
BYTES_PER_SECOND = 4.8e12
"""HBM of an H200, by NVIDIA's data sheet."""
OTHER_TILES = (Launch(64, 64, 4, 2), Launch(64, 128, 4, 2), Launch(128, 64, 8, 4), Launch(128, 128, 8, 2))


@dataclass(frozen=True)
class Traffic:
    """Of one layer's attention: R requests of `rows` rows each, all with `context` positions."""

    launch: Launch
    num_requests: int
    context: int
    rows: int

    @property
    def row_blocks(self) -> int:
        return -(-self.rows * GROUP // self.launch.block_m)

    @property
    def idle_rows(self) -> float:
        return 1 - self.rows * GROUP / (self.row_blocks * self.launch.block_m)

    @property
    def splits(self) -> int:
        """Splits that have a tile, as the kernel divides them."""
        tiles = -(-self.context // self.launch.block_n) + 1
        return -(-tiles // max(-(-tiles // self.launch.num_splits), self.launch.min_tiles))

    @property
    def programs(self) -> int:
        return self.row_blocks * NUM_KV_HEADS * self.num_requests * self.splits

    @property
    def _rows_bytes(self) -> int:
        """Queries and results."""
        return 2 * self.num_requests * self.rows * NUM_HEADS * HEAD_SIZE * ELEMENT_BYTES

    @property
    def _keys_bytes(self) -> int:
        """Keys and values of the contexts and of the step."""
        return 2 * self.num_requests * (self.context + self.rows) * NUM_KV_HEADS * HEAD_SIZE * ELEMENT_BYTES

    @property
    def floor(self) -> int:
        return self._rows_bytes + self._keys_bytes

    @property
    def merge(self) -> int:
        """Float32 results and log-sum-exps of the splits, written by one kernel and read by the next."""
        if self.launch.num_splits == 1:
            return 0
        return 2 * 4 * self.num_requests * self.rows * NUM_HEADS * self.splits * (HEAD_SIZE + 1)

    @property
    def requested(self) -> int:
        return self._rows_bytes + self.row_blocks * self._keys_bytes + self.merge


def plan(num_requests: int, context: int, nodes: int) -> Launch:
    heads = NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE
    return plan_launch(num_requests, nodes + 1, context, *heads, torch.bfloat16, HOPPER)


def tile_rows(node_budgets: Sequence[int]) -> Iterator[list[str]]:
    planned = {nodes: plan(1, 8192, nodes) for nodes in node_budgets}
    tiles = [(f"planned, {nodes} nodes", nodes, launch) for nodes, launch in planned.items()]
    tiles += [("candidate", max(node_budgets), launch) for launch in OTHER_TILES]
    for name, nodes, launch in tiles:
        used = usage(compile_attention(launch, nodes + 1, group=GROUP, head_size=HEAD_SIZE))
        yield [
            name, f"{launch.block_m} x {launch.block_n}", str(launch.num_warps), str(launch.num_stages),
            str(used.registers), str(used.spilled), f"{used.shared / 1024:.0f}", str(used.resident),
        ]  # fmt: skip


def traffic_rows(batches: Sequence[int], contexts: Sequence[int], node_budgets: Sequence[int]) -> Iterator[list[str]]:
    for nodes, num_requests, context in product(node_budgets, batches, contexts):
        of = Traffic(plan(num_requests, context, nodes), num_requests, context, nodes + 1)
        busy = min(1.0, of.programs / HOPPER.num_processors)
        yield [
            str(nodes), str(num_requests), str(context), str(of.row_blocks), f"{of.idle_rows:.0%}", str(of.splits),
            str(of.programs), f"{busy:.0%}", f"{of.floor / 1e6:.1f} MB, {1e6 * of.floor / BYTES_PER_SECOND:.1f} µs",
            f"{of.requested / of.floor:.2f}", f"{of.merge / of.floor:.2f}",
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 131072])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 31, 32, 63])
    options = parser.parse_args()
    heads = (
        "tile",
        "rows x positions",
        "warps",
        "stages",
        "registers",
        "spilled, bytes",
        "shared, KiB",
        "programs per SM",
    )
    print(markdown_table(heads, tile_rows(options.nodes)), end="\n\n")
    heads = (
        "nodes", "batch", "context", "row blocks", "idle rows", "splits", "programs", "SMs", "floor", "L2 / floor",
        "merge / floor",
    )  # fmt: skip
    print(markdown_table(heads, traffic_rows(options.batches, options.contexts, options.nodes)))


if __name__ == "__main__":
    main()
