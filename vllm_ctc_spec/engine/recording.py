"""Appends what is served to a file of training rows: the option `record`.

The process that takes the requests, which is not the engine's, knows the prompt, all tokens and the end of each: with
both model runners, and over all ranks and engines. Only there an answer that a stop string ended is whole; the engine
sees it aborted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger
from vllm.v1.engine import FinishReason

from vllm_ctc_spec.engine.plugin import is_ctc
from vllm_ctc_spec.engine.settings import EngineSettings
from vllm_ctc_spec.files import append_line, cut_incomplete_line, locked

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import RequestState

logger = init_logger("vllm.ctc_spec")

MEGABYTE = 1_000_000
ROW_START = b'{"prompt_token_ids":'
"""As every line begins that this module or `train regenerate` has written."""

WHOLE = (FinishReason.STOP, FinishReason.LENGTH)
MIN_TOKENS = 2
"""Of an answer to learn from: an anchor and a token after it."""


def check_record(record: str | os.PathLike[str]) -> str:
    """The absolute path of a file that takes rows. An incomplete last line, left by a killed server, is cut off.

    Raises ValueError.
    """
    path = Path(record).expanduser().absolute()
    if envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError(
            f"VLLM_USE_RUST_FRONTEND=1 with speculative_config record={str(record)!r}: only vLLM's server in Python "
            "records. Unset VLLM_USE_RUST_FRONTEND, or leave 'record' out."
        )
    try:
        with locked(path) as file:
            start = os.pread(file, len(ROW_START), 0)
        if not ROW_START.startswith(start):
            raise ValueError(
                f"speculative_config record={str(record)!r} holds something else than recorded rows. Name a new file."
            )
        cut_incomplete_line(path)
    except OSError as error:
        raise ValueError(
            f"speculative_config record={str(record)!r} cannot be written ({error.strerror}). Name a file in a folder "
            "that exists and in which the server may write."
        ) from error
    return str(path)


def with_recording(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `__init__` of LLMEngine and AsyncLLM."""
    original(self, *args, **kwargs)
    config = self.vllm_config
    if not is_ctc(config.speculative_config):
        return
    options = EngineSettings.from_dict(config.additional_config["ctc_spec"]).options
    if options.record is None:
        return
    recorder = Recorder(Path(options.record), options.record_limit_mb)
    processor = self.output_processor
    observe = processor._update_stats_from_finished

    def observe_and_record(request: RequestState, reason: FinishReason | None, *stats: Any) -> None:
        observe(request, reason, *stats)
        recorder(request, reason)

    # vLLM calls it for each request that ends by itself, whether statistics are on or off.
    processor._update_stats_from_finished = observe_and_record
    logger.info("Prompts and answers are recorded in %s, up to %d MB.", recorder.path, recorder.limit_mb)


class Recorder:
    """Appends a row for each whole answer. A file that is moved away is begun anew."""

    def __init__(self, path: Path, limit_mb: int) -> None:
        self.path, self.limit_mb = path, limit_mb

    def __call__(self, request: RequestState, reason: FinishReason | None) -> None:
        if reason not in WHOLE or not _is_of_target(request):
            return
        token_ids = request.detokenizer.output_token_ids
        if len(token_ids) < MIN_TOKENS:
            return
        row = {"prompt_token_ids": request.prompt_token_ids, "token_ids": token_ids}
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        try:
            is_written = append_line(self.path, line, self.limit_mb * MEGABYTE)
        except OSError as error:
            # Answers are more important.
            logger.warning_once("%s cannot be written (%s): answers are not recorded.", self.path, error.strerror)
            return
        if not is_written:
            logger.warning_once(
                "%s has reached record_limit_mb=%d: answers are not recorded until it is moved away.",
                self.path,
                self.limit_mb,
            )


def _is_of_target(request: RequestState) -> bool:
    """Whether these token ids are all that was asked, and the target alone answered."""
    asks_more = request.prompt_embeds is not None or request.input_chunk_queue is not None
    return request.prompt_token_ids is not None and not asks_more and request.lora_request is None
