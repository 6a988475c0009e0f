"""A small Llama that drafts independently of the target (vLLM's `draft_model`), with the target's tokenizer.

Letters: B rows, L tokens, M anchors, U labels = 1.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from baseline import Baseline, rows_at
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vllm_ctc_spec.training.models import drafter_config

NUM_LAYERS = 2


class DraftModel(Baseline):
    num_labels = 1
    batch_size = 4
    learning_rate = 1e-2

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__(target)
        like = drafter_config(target.config)
        # K/V heads are the target's, so that vLLM keeps one KV group; the rest is about half of the target's.
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=like.vocab_size,
                hidden_size=like.hidden_size // 2,
                intermediate_size=like.intermediate_size // 2,
                num_hidden_layers=NUM_LAYERS,
                num_attention_heads=like.num_key_value_heads,
                num_key_value_heads=like.num_key_value_heads,
                head_dim=like.head_dim,
                max_position_embeddings=like.max_position_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": like.rope_theta},
                rms_norm_eps=like.rms_norm_eps,
                tie_word_embeddings=True,
                bos_token_id=target.config.bos_token_id,
                eos_token_id=target.config.eos_token_id,
            )
        )

    def forward(self, input_ids: Tensor, anchors: Tensor, valid: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(rows_at(hidden, anchors)[valid])
        return {"loss": F.cross_entropy(logits.float(), labels[valid][:, 0])}

    def save(self, folder: Path) -> None:
        self.model.to("cpu", self.target.dtype).save_pretrained(folder)
