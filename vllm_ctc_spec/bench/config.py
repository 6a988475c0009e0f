"""The benchmark's YAML as typed settings, checked before anything starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_ctc_spec.bench.records import Sampling
from vllm_ctc_spec.bench.yaml_file import override, read_yaml
from vllm_ctc_spec.config import did_you_mean
from vllm_ctc_spec.vllm_keys import check_ctc

PLAIN = "plain"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"batch_sizes": [1], "sampling": [{"temperature": 0}], "max_tokens": 1024}
}
"""paper: the setting of arXiv 2412.00061's evaluation scripts, one request at a time, greedy, at most 1,024 tokens."""

PAPER_PROMPTS = ("mt-bench", "gsm8k")
OUR_ENGINE_KEYS = ("model", "speculative_config", "max_num_seqs", "disable_log_stats", "worker_extension_cls", "seed")
"""Engine options that the benchmark sets itself, for every method alike."""


@dataclass(frozen=True)
class Method:
    name: str
    speculative_config: dict[str, Any] | None
    """None: plain vLLM."""
    engine: dict[str, Any]
    """Options of `vllm.LLM` for this method only."""
    missing: str | None = None
    """A package that the method requires and that is not installed."""

    @property
    def is_ctc(self) -> bool:
        return self.speculative_config is not None and self.speculative_config.get("method") == "ctc"


@dataclass(frozen=True)
class PromptSource:
    """Rows of a JSONL file, a JSON array, or a data set for the `datasets` library; see `read_questions`."""

    source: str
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a data set; "test" if only `subset` is given."""
    prefix: str = ""
    """Text before each question or first turn."""
    skip: int = 0
    """Rows to leave out at the start."""
    limit: int | None = None
    """Most rows after those. None: all."""
    last: int | None = None
    """Number of rows at the end of the source to use, in place of `skip` and `limit`."""


@dataclass(frozen=True)
class BenchConfig:
    target: str
    """Absolute path or hub name."""
    methods: tuple[Method, ...]
    prompts: dict[str, PromptSource]
    engine: dict[str, Any] = field(default_factory=dict)
    """Options of `vllm.LLM` for every method."""
    batch_sizes: tuple[int, ...] = (1,)
    """Requests in flight."""
    sampling: tuple[Sampling, ...] = (Sampling(),)
    max_tokens: int = 256
    """Most tokens of an answer."""
    num_prompts: int | None = None
    """Prompts of a cell, taken evenly from the source, but at least the batch size. None: all."""
    rounds: int = 10
    """Measured passes of each method over a cell's prompts."""
    seed: int = 0
    """Prompt i samples with seed + i."""
    ignore_eos: bool = False
    chat_template: str | None = None
    """Jinja text, for a target whose tokenizer has none."""

    def engine_options(self, method: Method) -> dict[str, Any]:
        """Keyword arguments of `vllm.LLM`, without the model."""
        options = {"enable_prefix_caching": False, **self.engine, **method.engine, "seed": self.seed}
        options["max_num_seqs"] = max(self.batch_sizes)
        if method.speculative_config is not None:
            options["speculative_config"] = dict(method.speculative_config)
            options["per_request_spec_decode_metrics"] = "summary"
        return options


def load_config(
    path: Path, settings: Sequence[str] = (), only: Sequence[str] = (), preset: str | None = None
) -> BenchConfig:
    """Read the YAML at `path`.

    settings: "key.key=value", each replaces one value of the YAML. only: methods to keep beside plain; empty: all.
    preset: name in PRESETS, whose values replace those of the YAML. Paths are relative to the key `folder`, which is
    relative to the YAML's folder and defaults to it.

    Raises ValueError that names the setting, its value and the remedy.
    """
    fields = read_yaml(path) | PRESETS.get(preset or "", {})
    for setting in settings:
        override(fields, setting)
    if preset is not None:
        _check_preset(fields, preset)
    known = ("folder", *(each.name for each in dataclasses.fields(BenchConfig)))
    _reject_unknown(fields, known, str(path))
    for key in ("target", "methods", "prompts"):
        if not fields.get(key):
            raise ValueError(f"{path} has no {key!r}: the benchmark needs it.")
    folder = path.parent / Path(str(fields.pop("folder", "."))).expanduser()
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: no such folder. Set it with --set folder=PATH.")
    target, chosen = _model("target", fields["target"], folder), _chosen(_mapping(fields, "methods"), only)
    methods = [_method(name, value, folder, target) for name, value in chosen.items()]
    prompts = {name: _prompts(name, value, folder) for name, value in _mapping(fields, "prompts").items()}
    fields |= {
        "target": target,
        "methods": tuple(methods),
        "prompts": prompts,
        "engine": _engine("engine", fields.get("engine")),
    }
    if "batch_sizes" in fields:
        sizes = fields["batch_sizes"]
        fields["batch_sizes"] = tuple(sizes) if isinstance(sizes, list) else (sizes,)
    if "sampling" in fields:
        fields["sampling"] = _sampling(fields["sampling"])
    config = BenchConfig(**fields)
    _check_numbers(config)
    return config


def _check_preset(fields: dict[str, Any], preset: str) -> None:
    for key, value in PRESETS[preset].items():
        if fields[key] != value:
            raise ValueError(f"--set {key}={fields[key]!r}: --preset {preset} sets it to {value!r}. Leave one out.")
    prompts = fields.get("prompts")
    missing = [name for name in PAPER_PROMPTS if not isinstance(prompts, dict) or name not in prompts]
    if missing:
        raise ValueError(
            f"preset {preset!r} needs prompts named {', '.join(PAPER_PROMPTS)}; {missing[0]!r} is missing."
        )


def _reject_unknown(fields: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in fields:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f"unknown key {key!r} in {where}.{hint} Keys: {', '.join(known)}.")


def _mapping(fields: dict[str, Any], key: str) -> dict[str, Any]:
    value = fields[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} must map names to settings, is {type(value).__name__}.")
    for name in value:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{key}: the name {name!r} must consist of letters, digits, '-' and '_'.")
    return value


def _chosen(methods: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    if PLAIN not in methods:
        raise ValueError(f"methods has no {PLAIN!r}: every method is compared with plain vLLM. Add '{PLAIN}: null'.")
    for name in only:
        if name not in methods:
            raise ValueError(f"--only {name}: no such method. Methods: {', '.join(methods)}.")
    # Plain first, because the others' answers are compared with its.
    names = [PLAIN, *(name for name in methods if name != PLAIN and (not only or name in only))]
    return {name: methods[name] for name in names}


def _method(name: str, value: Any, folder: Path, target: str) -> Method:
    where = f"methods.{name}"
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} must be null or a speculative_config, is {value!r}.")
    spec = dict(value or {})
    engine = _engine(f"{where}.engine", spec.pop("engine", None))
    requires = spec.pop("requires", None)
    # An entry that was left empty by mistake must not be measured as plain vLLM under another name.
    if (is_plain := name.startswith(PLAIN)) == bool(spec):
        remedy = "without speculative_config" if is_plain else "with 'method' or 'model'"
        raise ValueError(f"{where}={value!r}: write it {remedy}.")
    if requires is not None and importlib.util.find_spec(str(requires)) is None:
        return Method(name, spec, engine, str(requires))
    if spec.get("model") is not None:
        spec["model"] = _model(f"{where}.model", spec["model"], folder)
    if spec.get("method") == "ctc":
        check_ctc(where, spec, target)
    return Method(name, spec or None, engine)


def _engine(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold options of vllm.LLM, is {value!r}.")
    for key in OUR_ENGINE_KEYS:
        if key in value:
            raise ValueError(f"{where}.{key}: the benchmark sets it itself. Leave it out.")
    return value


def _prompts(name: str, value: Any, folder: Path) -> PromptSource:
    where = f"prompts.{name}"
    if isinstance(value, str):
        value = {"source": value}
    if not isinstance(value, dict) or "source" not in value:
        raise ValueError(f"{where}={value!r}: give a path, or a mapping with 'source'.")
    _reject_unknown(value, [each.name for each in dataclasses.fields(PromptSource)], where)
    if value.get("last") is not None and (value.get("skip") or value.get("limit") is not None):
        raise ValueError(f"{where}: 'last' goes without 'skip' and 'limit'.")
    for key in ("skip", "limit", "last"):
        if value.get(key) is not None and (type(value[key]) is not int or value[key] < (key != "skip")):
            raise ValueError(f"{where}.{key}={value[key]!r}: use a positive integer.")
    return PromptSource(**{**value, "source": _model(f"{where}.source", value["source"], folder)})


def _sampling(value: Any) -> tuple[Sampling, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"sampling={value!r}: give a list, such as [{{temperature: 0}}, {{temperature: 1, top_p: 0.9}}]."
        )
    found = []
    for number, each in enumerate(value):
        where = f"sampling[{number}]"
        if not isinstance(each, dict) or "temperature" not in each:
            raise ValueError(f"{where}={each!r}: give a mapping with 'temperature' and, if wanted, 'top_p'.")
        _reject_unknown(each, [field.name for field in dataclasses.fields(Sampling)], where)
        for key, setting in each.items():
            if isinstance(setting, bool) or not isinstance(setting, int | float):
                raise ValueError(f"{where}.{key}={setting!r} must be a number.")
        if not each["temperature"] >= 0:
            raise ValueError(f"{where}.temperature={each['temperature']!r} must be at least 0, which is greedy.")
        if not 0 < each.get("top_p", 1) <= 1:
            raise ValueError(f"{where}.top_p={each['top_p']!r} must be above 0 and at most 1, which is all tokens.")
        found.append(Sampling(**{key: float(setting) for key, setting in each.items()}))
    if len(set(found)) < len(found):
        raise ValueError(f"sampling={value!r}: give each value once.")
    return tuple(found)


def _model(where: str, value: Any, folder: Path) -> str:
    """`value` as an absolute path if it exists in `folder`, else as a hub name. Raises ValueError if it is neither."""
    path = folder / Path(str(value)).expanduser()
    if path.exists():
        return str(path.resolve())
    first = str(value).partition("/")[0]
    if (
        HUB_NAME.fullmatch(str(value))
        and not str(value).endswith((".json", ".jsonl"))
        and not (folder / first).exists()
    ):
        return str(value)
    raise ValueError(
        f"{where}={value!r}: {str(path)!r} does not exist. Set it with --set {where}=PATH, or folder=PATH."
    )


def _check_numbers(config: BenchConfig) -> None:
    counts = {"rounds": 2, "max_tokens": 2, "num_prompts": 1, "seed": 0}
    for key, least in counts.items():
        value = getattr(config, key)
        if not (type(value) is int and value >= least) and not (key == "num_prompts" and value is None):
            raise ValueError(f"{key}={value!r}: use an integer of at least {least}.")
    sizes = config.batch_sizes
    for size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"batch_sizes: {size!r} must be an integer of at least 1.")
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"batch_sizes={list(sizes)}: give each value once, and at least one.")
    if not isinstance(config.ignore_eos, bool):
        raise ValueError(f"ignore_eos={config.ignore_eos!r}: use true or false.")
