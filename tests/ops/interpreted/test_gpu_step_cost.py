"""The step that benchmarks/gpu/step_cost.py times is one of a target, and all of its parts run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.step_cost import Setting, measure
from benchmarks.shapes import Shape

CONTEXT = 40
SHAPE = Shape(2, 256, 512, 2, 1, 512, 128)


@pytest.fixture
def setting() -> Iterator[Setting]:
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        yield Setting(SHAPE, 2, CONTEXT, torch.device("cpu"))


def logits(setting: Setting, tokens: Tensor, depths: list[int], masks: list[int]) -> Tensor:
    """[R, rows, V] of rows with `tokens` [rows], the same for each request."""
    positions = CONTEXT + torch.tensor(depths).repeat(setting.batch)
    slots = setting.slots(torch.arange(len(tokens))).flatten()
    batch = setting.rows(len(tokens), torch.tensor(masks))
    found = setting.target(tokens.repeat(setting.batch), positions, slots, batch)[1]
    return found.unflatten(0, (setting.batch, -1)).float()


def test_each_node_has_the_logits_of_its_path(setting: Setting) -> None:
    tokens = torch.tensor([5, 6, 7, 8])
    tree = logits(setting, tokens, [0, 1, 1, 2], [0b1, 0b11, 0b101, 0b1101])
    for path in ([0], [0, 1], [0, 2], [0, 2, 3]):
        alone = logits(setting, tokens[path], list(range(len(path))), [(2 << row) - 1 for row in range(len(path))])
        torch.testing.assert_close(tree[:, path[-1]], alone[:, -1], rtol=0, atol=0.1)
    assert (tree[:, 1] - tree[:, 2]).abs().max() > 1


def test_every_part_is_run_and_timed(setting: Setting) -> None:
    calls: list[object] = []

    def time(call: Callable[[], object]) -> float:
        call()
        calls.append(call)
        return float(len(calls))

    first, second = measure(setting, [2, 5], time, time)
    assert [first.nodes, second.nodes] == [2, 5] and len(calls) == 3 + 2 * 4
    assert first.ratio == (first.verify + first.draft + first.build + first.walk + first.move) / first.decode
    assert set(asdict(second)) >= {"decode", "verify", "draft", "build", "walk", "move", "launched"}
