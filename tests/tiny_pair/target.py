"""The tiny target: a Llama of two layers, trained on Python."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from vllm_ctc_spec.files import atomic_folder
from vllm_ctc_spec.training.loop import Budget, BudgetCallback, MuonAdamW, loop_arguments

VOCAB = 512
HIDDEN = 128
HEAD_DIM = 64
"""The CPU attention kernels of vLLM need a multiple of 32."""
CONTEXT = 128
"""Tokens of a training block."""

END = "<|endoftext|>"
PADDING = "<|padding|>"

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
"""A chat is its messages in a row, because the target continues code and knows no roles."""


def train_target(texts_path: Path, folder: Path) -> None:
    """Write `folder`, a Hugging Face model that vLLM loads, whole or not at all. texts_path: JSONL of `text`."""
    texts = [json.loads(line)["text"] for line in texts_path.open(encoding="utf-8")]
    tokenizer = _train_tokenizer(texts)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(tokenizer))
    with atomic_folder(folder) as partial:
        _fit(model, _Blocks(tokenizer, texts), partial)
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HIDDEN // HEAD_DIM,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class _Blocks(Dataset[dict[str, Tensor]]):
    """All texts, each closed by the end token, cut into blocks of CONTEXT tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
        ids = [token for row in tokenizer(texts)["input_ids"] for token in (*row, tokenizer.eos_token_id)]
        self._blocks = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}


def _fit(model: LlamaForCausalLM, blocks: _Blocks, folder: Path) -> None:
    budget = Budget(max_steps=200)
    clock = BudgetCallback(budget)
    optimizer = MuonAdamW(model, 1.2e-2)
    arguments = loop_arguments(folder, budget, batch_size=8, save_strategy="no", logging_steps=100)
    schedule = clock.schedule(optimizer)
    Trainer(model, arguments, train_dataset=blocks, optimizers=(optimizer, schedule), callbacks=[clock]).train()
