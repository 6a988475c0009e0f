"""The KV cache has room for the requests that it is sized for, and the user's settings take precedence."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig

from vllm_ctc_spec.config import MAX_NODES
from vllm_ctc_spec.kv_cache import (
    BLOCK_SIZE,
    DRAFTER_LAYERS,
    ENGINE_BYTES,
    engine_options,
    fitting_model_len,
    kv_cache_options,
)

LAYERS, KV_HEADS, HEAD_SIZE, CONTEXT = 3, 2, 32, 3000
BYTES_PER_TOKEN = 2 * (LAYERS + DRAFTER_LAYERS) * KV_HEADS * HEAD_SIZE * 2


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=CONTEXT,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def free(monkeypatch):
    def set_free(num_bytes):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=num_bytes))

    set_free(1 << 40)
    return set_free


def blocks(options, bytes_per_token=BYTES_PER_TOKEN):
    whole, rest = divmod(options["kv_cache_memory_bytes"], bytes_per_token * BLOCK_SIZE)
    assert rest == 0
    return whole


@pytest.mark.parametrize("num_requests, max_model_len", [(1, 1), (1, 128), (1, 129), (4, 1024), (128, 300)])
def test_all_requests_fit_beside_the_block_that_vllm_keeps(target, free, num_requests, max_model_len):
    options = kv_cache_options(target, num_requests, max_model_len)
    assert blocks(options) == 1 + num_requests * -(-max_model_len // BLOCK_SIZE)
    assert (options["max_num_seqs"], options["max_model_len"]) == (num_requests, max_model_len)


def test_float32_takes_twice_as_much(target, free):
    half = kv_cache_options(target, 2, 200)
    assert blocks(kv_cache_options(target, 2, 200, "float32"), 2 * BYTES_PER_TOKEN) == blocks(half)


def test_too_little_memory_is_named_with_what_is_needed_and_what_to_lower(target, free):
    needed = kv_cache_options(target, 4, 1000)["kv_cache_memory_bytes"] + ENGINE_BYTES
    free(needed)
    kv_cache_options(target, 4, 1000)
    free(needed - 1)
    with pytest.raises(ValueError, match=r"max_num_seqs=4 .*max_model_len=1000 .*1\.1 GB are free.* Lower"):
        kv_cache_options(target, 4, 1000)


def test_weights_count(target, free, tmp_path):
    free(kv_cache_options(target, 1, 1)["kv_cache_memory_bytes"] + ENGINE_BYTES)
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    with pytest.raises(ValueError, match="GB are free"):
        kv_cache_options(target, 1, 1)


def test_requests_of_different_lengths_take_what_the_longest_in_flight_take(target, free):
    options = engine_options(target, [10, 900, 300], {}, num_requests=2)
    assert options["max_model_len"] == 1024 and options["max_num_seqs"] == 2
    assert blocks(options) == 1 + 8 + 3


def test_engines_for_similar_work_have_one_length_and_none_exceeds_the_context(target):
    assert {fitting_model_len(target, longest) for longest in (1, 320, 1024 - MAX_NODES)} == {1024}
    assert fitting_model_len(target, 1025 - MAX_NODES) == 2048
    assert fitting_model_len(target, 5000) == CONTEXT


def test_fewer_requests_in_flight_where_memory_is_short(target, free):
    lengths = [1000] * 64
    whole = engine_options(target, lengths, {})
    free(whole["kv_cache_memory_bytes"] // 3 + ENGINE_BYTES)
    assert engine_options(target, lengths, {})["max_num_seqs"] == 16
    free(ENGINE_BYTES)
    with pytest.raises(ValueError, match=r"max_num_seqs=1 .* need"):
        engine_options(target, lengths, {})


def test_the_users_settings_win(target, free):
    lengths = [1000] * 64
    for own in ({"kv_cache_memory_bytes": 7}, {"gpu_memory_utilization": 0.5}):
        assert engine_options(target, lengths, own) == {"max_num_seqs": 64, "max_model_len": 2048, **own}
    options = engine_options(target, lengths, {"max_model_len": 129, "max_num_seqs": 8, "seed": 3})
    assert (options["max_model_len"], options["max_num_seqs"], options["seed"]) == (129, 8, 3)
    assert blocks(options) == 1 + 8 * 2
    free(0)
    with pytest.raises(ValueError, match="max_num_seqs=8 "):
        engine_options(target, lengths, {"max_num_seqs": 8})


def test_vllms_own_variable_counts_as_a_setting(target, free, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    free(0)
    assert "kv_cache_memory_bytes" not in engine_options(target, [100], {})


@pytest.mark.parametrize("given", [{"max_model_len": "8k"}, {"max_model_len": -1}, {"max_num_seqs": 2.5}])
def test_a_number_that_is_none_is_named(target, free, given):
    [(key, value)] = given.items()
    with pytest.raises(ValueError, match=f"{key}={value!r}: use a positive integer"):
        engine_options(target, [100], given)


@pytest.mark.parametrize(("num_ranks", "heads"), [(1, KV_HEADS), (2, 1), (4, 1)])
def test_each_rank_has_a_cache_for_its_heads_and_all_ranks_must_fit(target, free, num_ranks, heads):
    given = {"tensor_parallel_size": num_ranks, "max_num_seqs": 8}
    options = engine_options(target, [1000] * 8, given)
    assert options["tensor_parallel_size"] == num_ranks
    assert blocks(options, BYTES_PER_TOKEN * heads // KV_HEADS) == blocks(engine_options(target, [1000] * 8, {}))
    free(num_ranks * options["kv_cache_memory_bytes"] + ENGINE_BYTES - 1)
    with pytest.raises(ValueError, match="max_num_seqs=8 "):
        engine_options(target, [1000] * 8, given)
