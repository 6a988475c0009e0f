"""The model card of a drafter: `README.md` in its folder, from the records of its training and its evaluation."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.files import write_atomically
from vllm_ctc_spec.machine import this_machine
from vllm_ctc_spec.tables import markdown_table
from vllm_ctc_spec.training.data import TrainingRow

if TYPE_CHECKING:
    from vllm_ctc_spec.training.evaluate import Evaluation

TRAINING_RECORD = "training.json"
"""File that `fit` writes beside the weights."""

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class CardDetails:
    """Details that the user adds to the card; None: not given."""

    target_name: str | None = None
    """Name under which others find the target. Default: the last part of its path."""
    text: str | None = None
    """The training text and its licence."""


def training_facts(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """Rows, trained tokens, command and machine of this process, as JSON values for TRAINING_RECORD."""
    return {
        "num_rows": len(rows),
        "num_tokens": sum(int(row.trained.sum()) for row in rows),
        "command": command_line(sys.argv),
        "machine": dataclasses.asdict(this_machine()),
    }


def training_record(drafter: Path) -> dict[str, Any]:
    """The contents of the drafter's TRAINING_RECORD; empty if the file is missing."""
    path = drafter / TRAINING_RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def command_line(arguments: Sequence[str]) -> str:
    """The command as a shell line, with paths cut to their last part, because readers have other folders."""
    program = Path(arguments[0]).name
    return shlex.join(["vllm-ctc-spec" if program == "cli.py" else program, *map(_last_part, arguments[1:])])


def _last_part(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    return name + equals + (path.name if path.is_absolute() or path.exists() else value)


def write_card(
    path: Path, drafter: Path, target: str, details: CardDetails, evaluations: Mapping[str, Evaluation]
) -> None:
    """Write the card of the drafter folder `drafter` to `path`, and keep `details` in TRAINING_RECORD for the next one.

    target: folder or hub name. evaluations: by name of the evaluation set.
    """
    record = training_record(drafter)
    new = {name: value for name, value in dataclasses.asdict(details).items() if value is not None}
    if new:
        record |= new
        write_atomically(drafter / TRAINING_RECORD, json.dumps(record, indent=2).encode())
    name = record.get("target_name") or (Path(target).name if Path(target).is_dir() else target)
    write_atomically(path, _card(drafter, name, record, evaluations).encode())


def _card(drafter: Path, target: str, record: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> str:
    config = CTCDrafterConfig.from_pretrained(drafter)
    parts = [
        f"# CTC drafter for {target}",
        f"A draft module for speculative decoding of `{target}` with token trees, for vLLM with the plugin "
        "`vllm-ctc-spec`. In float32 the answers are those of vLLM without it; in 16 bits a near-tie of the best two "
        "tokens may fall the other way.",
        "## Serve",
        _serve(drafter.name, target),
        "## Drafter",
        markdown_table(("", ""), _drafter_rows(drafter, config)),
        "## Training",
        markdown_table(("", ""), _training_rows(record)),
        "## Acceptance length",
        "Tokens per step of the target, the target's own token included, ± standard error. Trees for random anchors "
        "are walked along text that the target wrote and the drafter has not seen. A chain has one node per frame.",
        _acceptance(evaluations),
        f"Judged by:\n\n    {command_line(sys.argv)}",
    ]
    return "\n\n".join(parts) + "\n"


def _serve(folder: str, target: str) -> str:
    return f"""\
    vllm serve {target} --spec-model {folder} --spec-tokens 32

```python
from vllm import LLM

llm = LLM(
    "{target}",
    speculative_config={{"method": "ctc", "model": "{folder}", "num_speculative_tokens": 32}},
)
```"""


def _drafter_rows(drafter: Path, config: CTCDrafterConfig) -> list[tuple[str, str]]:
    files = sorted(drafter.glob("*.safetensors"))
    num_parameters = sum(map(_num_parameters, files))
    drafted = config.draft_vocab_size or config.vocab_size
    return [
        ("size", f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB, {num_parameters / 1e6:.1f} M parameters"),
        ("layers", str(config.num_hidden_layers)),
        ("reads of the target", _read_states(config.target_layers)),
        ("frames, labels per anchor", f"{config.num_frames}, {config.label_length}"),
        ("emissions", config.emission),
        ("tokens that it drafts", f"{drafted:,} of {config.vocab_size:,}"),
    ]


def _read_states(layers: Sequence[int]) -> str:
    if not layers:
        return "the last hidden state"
    return f"the last hidden state and the outputs of layers {', '.join(map(str, layers))}"


def _num_parameters(file: Path) -> int:
    total = 0
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, not a mapping
            size = 1
            for length in tensors.get_slice(name).get_shape():
                size *= length
            total += size
    return total


def _training_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    before = record.get("before")
    return [
        *([("first weights", _first_weights(before))] if before is not None else []),
        ("text", record.get("text", NOT_RECORDED)),
        (
            "rows",
            f"{record['num_rows']:,}, {record['num_tokens']:,} trained tokens"
            if "num_rows" in record
            else NOT_RECORDED,
        ),
        ("command", f"`{record['command']}`" if "command" in record else NOT_RECORDED),
        ("steps", f"{record['steps']:,}" if "steps" in record else NOT_RECORDED),
        ("time", f"{record['seconds'] / 60:.0f} minutes" if "seconds" in record else NOT_RECORDED),
        ("hardware", _hardware(record["machine"]) if "machine" in record else NOT_RECORDED),
    ]


def _first_weights(before: Mapping[str, Any]) -> str:
    """Describes the drafter that `fit --init` started from; before: its training record."""
    if not before:
        return f"those of another drafter, {NOT_RECORDED}"
    facts = [f"{name} {value}" for name, value in _training_rows(before) if value != NOT_RECORDED]
    return "those of another drafter: " + "; ".join(facts)


def _hardware(machine: Mapping[str, Any]) -> str:
    parts = [machine["cpu"], f"{machine['num_cores']} cores", f"{machine['memory_gib']} GiB", machine["gpu"]]
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    return ", ".join([part for part in parts if part] + versions)


def _acceptance(evaluations: Mapping[str, Evaluation]) -> str:
    first = next(iter(evaluations.values()))
    columns = ("tree", "nodes", *(f"{name} ({each.num_rows} rows)" for name, each in evaluations.items()))
    rows = []
    for index, tree in enumerate(first.trees):
        lengths = (each.trees[index] for each in evaluations.values())
        rows.append(
            (tree.tree, str(tree.num_nodes), *(_with_error(each.length, each.standard_error) for each in lengths))
        )
    return markdown_table(columns, rows)


def _with_error(length: float, error: float | None) -> str:
    return f"{length:.2f}" if error is None else f"{length:.2f} ± {error:.2f}"
