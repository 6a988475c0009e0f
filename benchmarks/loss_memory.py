"""Peak memory of the losses, forward and backward, for a large vocabulary.

    .venv/bin/python benchmarks/loss_memory.py [--vocab 131072] [--anchors 512]

The table also has the size of one float32 tensor [anchors, frames, vocabulary]. Each loss runs in its own process: the
memory is the peak of its resident size, less its resident size before the loss (Linux only).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from pathlib import Path

import torch
from rich.table import Table

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig, Draft
from vllm_ctc_spec.tables import console
from vllm_ctc_spec.training.loss import Teacher, alignment_loss, distillation_loss

HIDDEN, FRAMES = 1024, 8
LOSSES = {
    "conditioned, T = U": {"label_length": FRAMES},
    "conditioned, slack 2": {"label_length": FRAMES - 2},
    "plain CTC": {"label_length": FRAMES - 2, "emission": "independent"},
}


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(name: str, vocab: int, num_anchors: int) -> tuple[int, int]:
    """Bytes of the peak above the memory before the loss, and bytes of the gradients, which stay in memory."""
    torch.manual_seed(0)
    drafter = CTCDrafter(CTCDrafterConfig(hidden_size=HIDDEN, vocab_size=vocab, num_frames=FRAMES, **LOSSES[name]))
    lm_head = torch.randn(vocab, HIDDEN, dtype=torch.bfloat16)
    frames = torch.randn(num_anchors, FRAMES, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    rank = 0 if drafter.config.emission == "independent" else drafter.config.condition_rank
    draft = Draft(frames, *torch.randn(2, num_anchors, rank))
    labels = torch.randint(vocab, (num_anchors, drafter.config.label_length))
    embeddings = torch.randn(*labels.shape, HIDDEN, dtype=torch.bfloat16)
    # As many positions of text as anchors.
    hidden = torch.randn(num_anchors, HIDDEN, dtype=torch.bfloat16)
    teacher = Teacher(hidden, torch.randint(num_anchors, labels.shape), torch.Tensor.float, temperature=0.5)
    inputs = draft, lm_head, labels, embeddings
    before = resident()
    with torch.autocast("cpu", torch.bfloat16):
        has_blank = drafter.config.has_blank
        loss = alignment_loss(drafter, *inputs) if has_blank else distillation_loss(drafter, *inputs, teacher)
        loss.mean.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gradients = sum(p.grad.nbytes for p in (frames, *drafter.parameters()) if p.grad is not None)
    return peak - before, gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--anchors", type=int, default=512)
    options = parser.parse_args()
    whole = options.anchors * FRAMES * options.vocab * 4
    table = Table("loss", "peak, MB", "of it gradients, MB", "one tensor of anchors x frames x vocabulary, MB")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in LOSSES:
            peak, gradients = pool.apply(measure, (name, options.vocab, options.anchors))
            table.add_row(name, *(f"{value / 1e6:.0f}" for value in (peak, gradients, whole)))
    console().print(table)


if __name__ == "__main__":
    main()
