"""Prompts that the target writes itself, for when there are too few of one's own.

What its chat template puts before a user's words is prompt enough: a chat model continues it with what a user might
ask (Magpie, Xu et al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_ctc_spec.files import claim_file
from vllm_ctc_spec.kv_cache import engine_options as complete
from vllm_ctc_spec.training.regenerate import append_rows, whole_lines

TEMPERATURE = 0.8
MAX_TOKENS = 256
"""Of a prompt; one that does not end by then is dropped."""

SMALLEST_CHUNK, LARGEST_CHUNK = 64, 1024
"""Prompts written together, and lost together when the process is killed."""

SMALLEST_SHARE = 0.05
"""Of a chunk that must be usable: a target below it does not write prompts."""

_CONTENT = "\N{WHITE SQUARE}"


def write_own_prompts(target_path: str, count: int, output: Path, seed: int = 0, **engine_options: Any) -> None:
    """Write `count` lines of `messages`, each with one user turn, to `output`; lines that it already holds are kept.

    `engine_options` go to `vllm.LLM`; what they leave open is chosen by `kv_cache.engine_options`. Raises ValueError
    where the target has no chat template, or writes no prompts, or `output` holds those of another target or seed.
    """
    before, after = around_user_turn(target_path)
    num_done = len(whole_lines(output))
    claim_file(output, {"target": str(target_path), "seed": seed})
    if num_done >= count:
        return
    options = complete(target_path, [len(before) + MAX_TOKENS] * LARGEST_CHUNK, engine_options)
    # Training must be importable without vLLM's start-up time and plugins.
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started

    parameters = SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_TOKENS, stop=after)
    # A resumed engine must not draw again what the killed one drew.
    with started(target_path, seed=seed + num_done, **options) as llm:
        while num_done < count:
            size = min(max(2 * (count - num_done), SMALLEST_CHUNK), LARGEST_CHUNK)
            outputs = llm.generate([{"prompt_token_ids": before}] * size, parameters)
            ended = {done.outputs[0].text.strip() for done in outputs if done.outputs[0].finish_reason == "stop"}
            texts = sorted(ended - {""})
            if len(texts) < SMALLEST_SHARE * size:
                raise ValueError(
                    f"--own-prompts {count}: of {size} user turns that target {target_path!r} was to write, it "
                    f"ended {len(texts)}. It has not learned to write them; give it prompts."
                )
            written = [{"messages": [{"role": "user", "content": text}]} for text in texts[: count - num_done]]
            append_rows(output, written)
            num_done += len(written)


def around_user_turn(target_path: str) -> tuple[list[int], list[str]]:
    """Token ids that the chat template puts before a user's words, and how it goes on behind them: its first line, or
    nothing where only an end-of-text token stands there."""
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    if not tokenizer.chat_template:
        raise ValueError(f"--own-prompts: target {target_path!r} has no chat template. Give it prompts instead.")
    messages = [{"role": "user", "content": _CONTENT}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, _, after = text.partition(_CONTENT)
    # Most tokenizers join a space with the word behind it.
    return tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"], after.strip().splitlines()[:1]
