"""EAGLE (Li et al., arXiv 2401.15077) and EAGLE-3 (arXiv 2503.01840) heads for vLLM's Llama versions of them.

At position i the head reads the embedding of token i + 1 and the target's feature of position i, and predicts token
i + 2. After the anchor it reads its own output in place of the feature. Parameters are named as in vLLM's checkpoints.

Letters: B rows, L tokens, M anchors, U labels = steps of drafting, H hidden size, K kv heads, D head size.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from baseline import Baseline, rows_at, save_checkpoint
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from vllm_ctc_spec.drafter.modeling import KeyValue, rotate
from vllm_ctc_spec.training.models import drafter_config
from vllm_ctc_spec.training.objective import attend_before_anchor, target_hidden

MIN_DEPTH = 7
"""Fewest layers of a target for EAGLE-3, which reads three different ones: 2, half, last but three (vLLM's default)."""


class DraftLayer(LlamaDecoderLayer):
    """Llama's decoder layer, whose attention may have wider inputs than its residual stream."""

    def __init__(self, config: LlamaConfig, input_size: int) -> None:
        super().__init__(config, layer_idx=0)
        self.head_dim, self.theta = config.head_dim, config.rope_parameters["rope_theta"]
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(input_size, size, bias=False))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def key_value(self, x: Tensor, positions: Tensor) -> KeyValue:
        key, value = (self._split_heads(project(x)) for project in (self.self_attn.k_proj, self.self_attn.v_proj))
        return KeyValue(rotate(key, positions, self.theta), value)

    def forward(
        self, x: Tensor, residual: Tensor, positions: Tensor, own: KeyValue, context: KeyValue, anchors: Tensor
    ) -> Tensor:
        """[B, M, H]; x: [B, M, input size], residual: [B, M, H], one query per anchor. `own` [B, M, any, K, D] are
        keys and values of the anchor's earlier steps and this one."""
        query = rotate(self._split_heads(self.self_attn.q_proj(x)), positions, self.theta)
        mixed = attend_before_anchor(query[:, :, None], own, context, anchors)[:, :, 0]
        residual = residual + self.self_attn.o_proj(mixed.flatten(-2))
        return residual + self.mlp(self.post_attention_layernorm(residual))


class EagleHead(Baseline):
    """The unrolled pass of both versions."""

    layer: DraftLayer
    layer_name: str
    """Name of `layer` in the checkpoint."""

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__(target)
        # With the target's sizes, as our own drafter, so that vLLM needs only one KV group.
        like = drafter_config(target.config)
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "max_position_embeddings", "rms_norm_eps",
        )  # fmt: skip
        self.config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            num_hidden_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": like.rope_theta},
            tie_word_embeddings=False,
            **{name: getattr(like, name) for name in names},
        )

    def unrolled(self, input_ids: Tensor, features: Tensor, anchors: Tensor, labels: Tensor) -> list[Tensor]:
        """The head's outputs [B, M, H] at each of its U steps; features: [B, L, H], the target's.

        As in serving, a step reads the target's features before the anchor and the head's own outputs after it. EAGLE-3
        calls this training-time test; with one step it is EAGLE's training.
        """
        embed = self.target.get_input_embeddings()
        x, residual = self.inputs(embed(input_ids[:, 1:]), features[:, :-1])
        context = self.layer.key_value(x, torch.arange(x.shape[1], device=x.device))
        x, residual = rows_at(x, anchors - 1), rows_at(residual, anchors - 1)
        own = [KeyValue(*(part.new_empty(*anchors.shape, 0, *part.shape[2:]) for part in context))]
        outputs = [self.layer(x, residual, anchors - 1, own[0], context, anchors)]
        for step in range(1, labels.shape[-1]):
            positions = anchors - 1 + step
            x, residual = self.inputs(embed(labels[..., step - 1]), outputs[-1])
            new = self.layer.key_value(x, positions)
            own.append(KeyValue(new.key[:, :, None], new.value[:, :, None]))
            seen = KeyValue(*(torch.cat(parts, dim=2) for parts in zip(*own)))
            outputs.append(self.layer(x, residual, positions, seen, context, anchors))
        return outputs

    @abstractmethod
    def inputs(self, embedding: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the layer's attention, and its residual stream."""

    def save(self, folder: Path) -> None:
        # Embedding and LM head are absent, so that vLLM shares the target's.
        learned = {name: weight for name, weight in self.state_dict().items() if not name.startswith("target.")}
        weights = {re.sub(r"^layer\.", f"{self.layer_name}.", name): weight for name, weight in learned.items()}
        save_checkpoint(folder, self.config, weights, self.target.dtype)


class Eagle(EagleHead):
    """EAGLE's loss: smooth L1 to the target's next feature, and 0.1 times the cross-entropy to its distribution."""

    num_labels = 1
    batch_size = 2
    learning_rate = 1e-2
    layer_name = "layers.0"
    classification = 0.1

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__(target)
        size = self.config.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layer = DraftLayer(self.config, size)
        del self.layer.input_layernorm

    def inputs(self, embedding: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.fc(torch.cat((embedding, feature), dim=-1))
        return fused, fused

    def forward(self, input_ids: Tensor, anchors: Tensor, valid: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = target_hidden(self.target, input_ids)
        losses = []
        for step, output in enumerate(self.unrolled(input_ids, hidden, anchors, labels)):
            guessed, wanted = output[valid], rows_at(hidden, anchors + step)[valid]
            distribution = (wanted @ self.lm_head.T).softmax(-1, dtype=torch.float32)
            classification = F.cross_entropy((guessed @ self.lm_head.T).float(), distribution)
            losses.append(F.smooth_l1_loss(guessed.float(), wanted.float()) + self.classification * classification)
        return {"loss": sum(losses) / len(losses)}


class Eagle3(EagleHead):
    """Features of three of the target's layers; cross-entropy only, over steps that read the head's own outputs."""

    num_labels = 3
    batch_size = 2
    learning_rate = 1e-2
    layer_name = "midlayer"

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__(target)
        depth, size = target.config.num_hidden_layers, self.config.hidden_size
        if depth < MIN_DEPTH:
            raise ValueError(
                f"the target has num_hidden_layers={depth}; eagle3 reads three different ones, which takes "
                f"{MIN_DEPTH}. Use a deeper target, or eagle."
            )
        self.config.eagle_aux_hidden_state_layer_ids = [2, depth // 2, depth - 3]
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.layer = DraftLayer(self.config, 2 * size)
        self.layer.hidden_norm = LlamaRMSNorm(size, self.config.rms_norm_eps)
        self.norm = LlamaRMSNorm(size, self.config.rms_norm_eps)

    def inputs(self, embedding: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        normed = (self.layer.input_layernorm(embedding), self.layer.hidden_norm(feature))
        return torch.cat(normed, dim=-1), feature

    def forward(self, input_ids: Tensor, anchors: Tensor, valid: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = self.target.get_decoder()(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        # Entry k is the input of layer k, as in vLLM.
        chosen = [outputs.hidden_states[k] for k in self.config.eagle_aux_hidden_state_layer_ids]
        features = self.fc(torch.cat(chosen, dim=-1))
        losses = []
        for output, wanted in zip(self.unrolled(input_ids, features, anchors, labels), labels[valid].unbind(-1)):
            losses.append(F.cross_entropy(self.norm(output[valid]) @ self.lm_head.T, wanted))
        return {"loss": sum(losses) / len(losses)}
