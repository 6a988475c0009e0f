"""Each mistake is one ValueError before a worker starts, with the setting, the value and the remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from tests.engine.blip import BLIP
from tests.tiny_pair import TinyPair


@dataclass(frozen=True)
class Case:
    """A good configuration with one mistake, and what the error says."""

    message: str
    spec: Any = field(default_factory=dict)
    """Keys of speculative_config; all of it where it is not an object with string keys."""
    drafter: dict[str, Any] = field(default_factory=dict)
    """Fields of the drafter's config.json."""
    break_folder: Callable[[Path], Any] | None = None
    target: dict[str, Any] = field(default_factory=dict)
    """Fields of the target's config.json."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the engine."""


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change one of the drafter's weights."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def draft_vocab(*tokens: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit(folder, {"draft_vocab_size": len(tokens)})
        tensors = load_file(folder / "model.safetensors") | {"draft_vocab": torch.tensor(tokens)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def write(name: str, contents: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(contents)


def edit(folder: Path, fields: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
OURS = "is an option of method 'ctc', and the method is"
COUNT = "use an integer of at least 1"
FOLDER = r"drafter '[^']*/drafter'"
TARGET = r"target '[^']*/target' has"
BOTH_WAYS = {**BLIP, "is_mm_prefix_lm": True}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}}
MAMBA = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
KEEPS_LAYERS = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
DECODE_CONTEXT = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 2}


CASES = {
    "a list": Case(r"speculative_config=\[1\]: give an object", [1]),
    "keys without names": Case(r"speculative_config=\{1: 2\}.*keys are strings", {1: 2}),
    "method in capitals": Case("method='CTC': write 'ctc'", {"method": "CTC"}),
    "no method": Case(f"tree='chain' {OURS} None", {"method": None, "model": "gpt2", "tree": "chain"}),
    "another method": Case(f"candidates=8 {OURS} 'ngram'", {"method": "ngram", "candidates": 8}),
    "no nodes": Case("num_speculative_tokens=0.*from 1 to 63", {"num_speculative_tokens": 0}),
    "too many nodes": Case("num_speculative_tokens=64.*from 1 to 63", {"num_speculative_tokens": 64}),
    "nodes in words": Case("num_speculative_tokens='many'", {"num_speculative_tokens": "many"}),
    "half a node": Case("num_speculative_tokens=8.5", {"num_speculative_tokens": 8.5}),
    "nodes true": Case("num_speculative_tokens=True", {"num_speculative_tokens": True}),
    "misspelt key": Case("unknown key 'tre'.*Did you mean 'tree'", {"tre": "prefix"}),
    "key of another method": Case("unknown key 'prompt_lookup_max'", {"prompt_lookup_max": 4}),
    "tree": Case("tree='bush'.*prefix, template, chain", {"tree": "bush"}),
    "no candidates": Case("candidates=0.*1 to 64", {"candidates": 0}),
    "candidates true": Case("candidates=True: use an integer from 1 to 64", {"candidates": True}),
    "budget in words": Case("adaptive_budget='yes'.*true or false", {"adaptive_budget": "yes"}),
    "kernel": Case("attention_kernel='flash': use one of own, xformers", {"attention_kernel": "flash"}),
    "retrieval": Case("retrieval='all': use one of auto, off, request, request\\+answers", {"retrieval": "all"}),
    "no depth": Case("retrieval_depth=0: use an integer from 1 to 63", {"retrieval_depth": 0}),
    "depth true": Case("retrieval_depth=True", {"retrieval_depth": True}),
    "retrieval in a chain": Case(
        "retrieval='request' with tree='chain'.*Leave one", {"retrieval": "request", "tree": "chain"}
    ),
    "retrieval of another method": Case(f"retrieval='request' {OURS}", {"method": "ngram", "retrieval": "request"}),
    "kernel of a GPU": Case("attention_kernel='xformers'.*CUDA device.*Leave", {"attention_kernel": "xformers"}),
    "probability": Case(r"min_prefix_probability=1.5.*\[0, 1\)", {"min_prefix_probability": 1.5}),
    "probability true": Case("min_prefix_probability=True", {"min_prefix_probability": True}),
    "record in no folder": Case("record='no/rows.jsonl' cannot be written.*No such file", {"record": "no/rows.jsonl"}),
    "record of a folder": Case("record='/' cannot be written \\(Is a directory.*Name a file", {"record": "/"}),
    "record of other text": Case("record='.*' holds something else.*Name a new", {"record": __file__}),
    "record true": Case("record=True: give the path of a file", {"record": True}),
    "no room to record": Case("record_limit_mb=0: use an integer of at least 1", {"record_limit_mb": 0}),
    "no drafter": Case("no CTC drafter on this machine belongs to target.*Train one", {"model": None}),
    "no drafter of this target": Case("no CTC drafter on this machine belongs to target", {"model": "ctc-drafter"}),
    "drafter without a name": Case("'model'=''.*folder of a trained CTC drafter", {"model": ""}),
    "drafter that is a list": Case(r"'model'=\[\].*folder of a trained CTC drafter", {"model": []}),
    "no such folder": Case("'no/such/folder' is not a folder", {"model": "no/such/folder"}),
    "no such folder at home": Case("drafter '/.*no-such-drafter' is not a folder", {"model": "~/no-such-drafter"}),
    "model type": Case(f"{FOLDER} has model_type 'llama', not 'ctc_drafter'", drafter={"model_type": "llama"}),
    "config of a list": Case(f"{FOLDER}: config.json holds no JSON object", break_folder=write("config.json", "[]")),
    "config cut short": Case(f"{FOLDER}: config.json cannot be read", break_folder=write("config.json", "{")),
    "frames as text": Case(f"{FOLDER}: num_frames='8'.*{COUNT}", drafter={"num_frames": "8"}),
    "frames as a float": Case(f"{FOLDER}: num_frames=8.0.*{COUNT}", drafter={"num_frames": 8.0}),
    "too many frames": Case(f"{FOLDER}: label_length=8, num_frames=17.*<= 16", drafter={"num_frames": 17}),
    "no hidden size": Case(f"{FOLDER}: hidden_size=None.*{COUNT}", drafter={"hidden_size": None}),
    "hidden size as text": Case(f"{FOLDER}: hidden_size='256'.*{COUNT}", drafter={"hidden_size": "256"}),
    "no layers": Case(f"{FOLDER}: num_hidden_layers=0.*{COUNT}", drafter={"num_hidden_layers": 0}),
    "heads": Case(f"{FOLDER}: num_attention_heads=3, num_key_value_heads=2", drafter=UNEVEN),
    "rank below 0": Case(f"{FOLDER}: condition_rank=-1.*at least 0", drafter={"condition_rank": -1}),
    "dtype": Case(f"{FOLDER}: dtype='float99'.*float32, float16, bfloat16", drafter={"dtype": "float99"}),
    "rotary base": Case(f"{FOLDER}: rope_theta='a'.*a number above 0", drafter={"rope_theta": "a"}),
    "epsilon": Case(f"{FOLDER}: rms_norm_eps=-1.*a number above 0", drafter={"rms_norm_eps": -1}),
    "emission": Case(f"{FOLDER}: emission='loud'.*use one of", drafter={"emission": "loud"}),
    "drafted tokens": Case(f"{FOLDER}: draft_vocab_size='all'.*or null", drafter={"draft_vocab_size": "all"}),
    "weights cut short": Case(f"{FOLDER}: {WEIGHTS} is missing or truncated", break_folder=truncate),
    "no weights": Case("missing or truncated", break_folder=lambda folder: (folder / WEIGHTS).unlink()),
    "pickled weights": Case(
        f"{FOLDER} holds {PICKLED}, which is not read. Write {WEIGHTS}",
        break_folder=lambda folder: (folder / WEIGHTS).rename(folder / PICKLED),
    ),
    "other shapes": Case("'frame_queries' has shape", drafter={"num_frames": 5, "label_length": 5}),
    "NaN": Case(f"{FOLDER}: 'frame_queries' in {WEIGHTS} has .*no finite", break_folder=changed("frame_queries", nan)),
    "integers": Case("'frame_queries'.*dtype torch.int64", break_folder=changed("frame_queries", torch.Tensor.long)),
    "drafted token above all": Case("'draft_vocab'.*from 0 to 511", break_folder=draft_vocab(1, 512)),
    "drafted token below all": Case("'draft_vocab'.*from 0 to 511", break_folder=draft_vocab(-1, 5)),
    "drafted token twice": Case("'draft_vocab'.*different token ids", break_folder=draft_vocab(5, 5)),
    "targets as text": Case(f"{FOLDER}: targets='gpt2'.*a list of names", drafter={"targets": "gpt2"}),
    "layers as a number": Case(f"{FOLDER}: target_layers=1 .*a list of increasing", drafter={"target_layers": 1}),
    "layers as text": Case(f"{FOLDER}: target_layers='12'.*a list of increasing", drafter={"target_layers": "12"}),
    "layer beyond all": Case(f"{FOLDER} reads layer 5 of .* has 2 layers", drafter={"target_layers": [5]}),
    "layers kept back": Case(r"reads layers \[1\] .* GemmaForCausalLM gives the last only", target=KEEPS_LAYERS),
    "target's width": Case("has hidden_size .* trained for another target", target={"hidden_size": 256}),
    "target's vocabulary": Case("has vocab_size .* trained for another target", target={"vocab_size": 320}),
    "target's heads": Case("has num_key_value_heads .* another target", target={"num_key_value_heads": 2}),
    "target's head size": Case("has head_dim .* trained for another target", target={"head_dim": 32}),
    "attention in chunks": Case(f"{TARGET} chunked local attention", target={"attention_chunk_size": 64}),
    "positions of images": Case(f"{TARGET} M-RoPE positions", target=MROPE),
    "state space": Case("hybrid or state-space", target=MAMBA),
    "images both ways": Case(rf"{TARGET} images .* one another \(--language-model-only turns", target=BOTH_WAYS),
    "pipeline": Case("pipeline_parallel_size=2", options={"pipeline_parallel_size": 2}),
    "context of a decode": Case("decode_context_parallel_size=2: .* needs 1", options=DECODE_CONTEXT),
    "context of a prefill": Case("prefill_context_parallel_size=2", options={"prefill_context_parallel_size": 2}),
    "ranks": Case(f"tensor_parallel_size=4: {FOLDER} has num_attention_heads 2", options={"tensor_parallel_size": 4}),
    "cache of 8 bits": Case("kv_cache_dtype='fp8'", options={"kv_cache_dtype": "fp8"}),
    "block size": Case("block_size=16.*multiple of 32", options={"block_size": 16}),
    "worker": Case("worker-cls 'some.Worker'", options={"worker_cls": "some.Worker"}),
    "KV connector": Case("kv_transfer_config: .* KV connector", options={"kv_transfer_config": CONNECTOR}),
    "KV offloading": Case("kv_offloading_size: .* KV connector", options={"kv_offloading_size": 1.0}),
    "micro-batches": Case("enable_dbo.*Remove --enable-dbo", options={"enable_dbo": True}),
    "pooling": Case(f"{TARGET} a pooling task", options={"runner": "pooling"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_mistake_is_one_error_that_names_setting_and_value(pair: TinyPair, tmp_path: Path, case: Case) -> None:
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    shutil.copytree(pair.target, target)
    shutil.copytree(pair.drafter, drafter)
    edit(target, case.target)
    edit(drafter, case.drafter)
    if case.break_folder is not None:
        case.break_folder(drafter)
    spec = case.spec
    if isinstance(spec, dict) and 1 not in spec:
        spec = {"method": "ctc", "model": str(drafter), "num_speculative_tokens": 8, **spec}
    with pytest.raises(ValueError, match=case.message):
        EngineArgs(model=str(target), speculative_config=spec, **case.options).create_engine_config()


@pytest.mark.parametrize("how", [Path, str, lambda path: f"~/{path.name}"], ids=["path", "text", "home"])
def test_a_drafter_may_be_a_path_a_string_or_below_home(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], Any]
) -> None:
    monkeypatch.setenv("HOME", str(pair.drafter.parent))
    for spec in ({"method": "ctc", "model": how(pair.drafter)}, {"model": how(pair.drafter)}):
        config = EngineArgs(model=str(pair.target), speculative_config=spec).create_engine_config()
        assert config.additional_config["ctc_spec"]["drafter"] == str(pair.drafter)


def test_retrieval_without_its_library_names_the_extra(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    spec = {"method": "ctc", "model": None, "retrieval": "request"}
    with pytest.raises(ValueError, match=r"retrieval='request' needs arctic-inference.*\"vllm-ctc-spec\[suffix\]\""):
        EngineArgs(model=str(pair.target), speculative_config=spec).create_engine_config()
