"""The demo's target: a small Llama that writes Python, trained in minutes on two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from vllm_ctc_spec.demo.scale import DemoScale
from vllm_ctc_spec.training.atomic import atomic_folder
from vllm_ctc_spec.training.budget import BudgetCallback
from vllm_ctc_spec.training.loop import drop_checkpoints, loop_arguments, train_or_resume
from vllm_ctc_spec.training.optimizer import MuonAdamW

HEAD_DIM = 64
"""The CPU attention kernels of vLLM need a multiple of 32."""

END = "<|endoftext|>"
PADDING = "<|padding|>"

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
"""The model continues code and knows no roles, so a chat is its messages one after the other."""


def train_target(corpus: Path, folder: Path, scale: DemoScale) -> None:
    """Train on `corpus`/texts.jsonl and write `folder`, a Hugging Face model that vLLM loads, whole or not at all."""
    texts = [json.loads(line)["text"] for line in (corpus / "texts.jsonl").open(encoding="utf-8")]
    tokenizer = _train_tokenizer(texts, scale.vocab_size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(tokenizer, scale))
    checkpoints = folder.with_name(f"{folder.name}.checkpoints")
    _fit(model, _Blocks(tokenizer, texts, scale.target_context), checkpoints, scale)
    with atomic_folder(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    drop_checkpoints(checkpoints)


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
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


def _config(tokenizer: PreTrainedTokenizerFast, scale: DemoScale) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=scale.vocab_size,
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_hidden_layers=scale.num_layers,
        num_attention_heads=scale.hidden_size // HEAD_DIM,
        num_key_value_heads=scale.num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=scale.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class _Blocks(Dataset[dict[str, Tensor]]):
    """All texts, each closed by the end token, cut into blocks of `context` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int) -> None:
        ids = [token for row in tokenizer(texts)["input_ids"] for token in (*row, tokenizer.eos_token_id)]
        self._blocks = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}


def _fit(model: LlamaForCausalLM, blocks: _Blocks, checkpoints: Path, scale: DemoScale) -> None:
    clock = BudgetCallback(scale.target_budget)
    optimizer = MuonAdamW(model, scale.target_rate)
    arguments = loop_arguments(checkpoints, scale.target_budget, scale.target_batch, save_steps=200, logging_steps=100)
    trainer = Trainer(
        model, arguments, train_dataset=blocks, optimizers=(optimizer, clock.schedule(optimizer)), callbacks=[clock]
    )
    train_or_resume(trainer, clock)
