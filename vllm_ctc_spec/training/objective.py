"""One training pass: hidden states of the frozen target, drafts of many anchors per row, loss.

Letters: B rows, L tokens, M anchors per row, Q = T + 1 queries (anchor and frames), K kv heads, G query heads per
kv head, D head size, H hidden size, U labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_ctc_spec.drafter import CTCDrafter, Draft, KeyValue
from vllm_ctc_spec.training.loss import DraftLoss, Teacher, alignment_loss, distillation_loss
from vllm_ctc_spec.training.models import logits_of

UNCONDITIONED_SHARE = 1 / 8
"""Share of anchors trained with a gate of 0, because the frames without conditioning choose a tree's candidates."""


class DraftObjective(nn.Module):
    """The drafter, which is trained, with the frozen target.

    frequent, label_decay: see `distillation_loss`. label_temperature: see `Teacher`.
    """

    frequent: Tensor | None

    def __init__(
        self,
        drafter: CTCDrafter,
        target: PreTrainedModel,
        frequent: Tensor | None = None,
        label_decay: float = 1.0,
        label_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.target = target.requires_grad_(False).eval()
        self.register_buffer("frequent", frequent, persistent=False)
        self.label_decay, self.label_temperature = label_decay, label_temperature
        self.logits_of = logits_of(target)

    def train(self, mode: bool = True) -> DraftObjective:
        super().train(mode)
        self.target.eval()
        return self

    def forward(
        self, input_ids: Tensor, anchors: Tensor, valid: Tensor, labels: Tensor, hidden: Tensor | None = None
    ) -> DraftLoss:
        """The loss of a batch of `collate_anchors`.

        input_ids: [B, L]; anchors: [B, M] positions; valid: [B, M] bool; labels: [B, M, U]; hidden: [B, L, (1 + k) H],
        computed by `target_hidden` if it is None.
        """
        config = self.drafter.config
        if hidden is None:
            hidden = target_hidden(self.target, input_ids, config.target_layers)
        draft = self.draft(input_ids, anchors, hidden).of(valid)
        conditioned = torch.rand(len(draft.gate), 1, device=draft.gate.device) >= UNCONDITIONED_SHARE
        draft = draft._replace(gate=draft.gate * conditioned)
        lm_head, labels = self.target.get_output_embeddings().weight, labels[valid]
        label_embeddings = self.target.get_input_embeddings()(labels.clamp(min=0))
        if config.has_blank:
            return alignment_loss(self.drafter, draft, lm_head, labels, label_embeddings, self.frequent)
        before_labels = anchors[..., None] + torch.arange(labels.shape[1], device=anchors.device)
        # Behind the end of a row there are no labels that would be trained.
        in_row = before_labels.clamp(max=input_ids.shape[1] - 1)
        first = input_ids.shape[1] * torch.arange(len(input_ids), device=anchors.device)
        teacher = Teacher(
            hidden[..., : config.hidden_size].flatten(0, 1),
            (first[:, None, None] + in_row)[valid],
            self.logits_of,
            self.label_temperature,
        )
        return distillation_loss(
            self.drafter, draft, lm_head, labels, label_embeddings, teacher, self.frequent, self.label_decay
        )

    def draft(self, input_ids: Tensor, anchors: Tensor, hidden: Tensor | None = None) -> Draft:
        """[B, M, ...], the drafts of all anchors in one pass. Arguments as in `forward`."""
        if hidden is None:
            hidden = target_hidden(self.target, input_ids, self.drafter.config.target_layers)
        hidden = self.drafter.fuse(hidden)
        context = self.drafter.context(hidden, torch.arange(input_ids.shape[1], device=input_ids.device))
        last_tokens = torch.stack((input_ids.gather(1, anchors - 1), input_ids.gather(1, anchors)), dim=-1)
        last_embeddings = self.target.get_input_embeddings()(last_tokens)
        last_hidden = hidden.gather(1, (anchors - 1)[..., None].expand(-1, -1, hidden.shape[-1]))

        def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
            return attend_before_anchor(query, own, context[layer], anchors)

        return self.drafter(last_embeddings, last_hidden, anchors, attend)


@torch.no_grad()
def target_hidden(target: PreTrainedModel, input_ids: Tensor, layers: Sequence[int] = ()) -> Tensor:
    """[B, L, (1 + k) H], the input of the target's LM head, then the outputs of k `layers` (numbered as
    `CTCDrafterConfig.target_layers`).

    Rows are padded on the right. The target is causal, so padding changes no earlier position and needs no mask.
    """
    outputs = target.get_decoder()(input_ids=input_ids, use_cache=False, output_hidden_states=bool(layers))
    return torch.cat((outputs.last_hidden_state, *(outputs.hidden_states[layer] for layer in layers)), dim=-1)


def attend_before_anchor(query: Tensor, own: KeyValue, context: KeyValue, anchors: Tensor) -> Tensor:
    """Attention of each anchor's queries to the context before the anchor and to each other, of the shape of `query`.

    query: [B, M, Q, heads, D]; own: [B, M, Q, K, D]; context: [B, L, K, D]; anchors: [B, M] positions.

    Scores of context and own keys are computed apart and share one softmax: one product with a block-diagonal mask over
    all M x Q own keys would cost M times as much.
    """
    grouped = query.unflatten(3, (own.key.shape[3], -1)) * query.shape[-1] ** -0.5
    length = context.key.shape[1]
    visible = torch.arange(length, device=anchors.device) < anchors[..., None]
    before = torch.einsum("bmqkgd,blkd->bmkgql", grouped, context.key)
    before = before.masked_fill(~visible[:, :, None, None, None, :], float("-inf"))
    among = torch.einsum("bmqkgd,bmpkd->bmkgqp", grouped, own.key)
    weights = torch.cat((before, among), dim=-1).softmax(-1, dtype=torch.float32).to(own.value.dtype)
    mixed = torch.einsum("bmkgql,blkd->bmqkgd", weights[..., :length], context.value)
    mixed = mixed + torch.einsum("bmkgqp,bmpkd->bmqkgd", weights[..., length:], own.value)
    return mixed.flatten(3, 4)
