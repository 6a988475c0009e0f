"""The draft module. Importing this registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter.modeling import CTCDrafter, Draft, KeyValue

AutoConfig.register(CTCDrafterConfig.model_type, CTCDrafterConfig, exist_ok=True)
AutoModel.register(CTCDrafterConfig, CTCDrafter, exist_ok=True)

__all__ = ["CTCDrafter", "CTCDrafterConfig", "Draft", "KeyValue"]
