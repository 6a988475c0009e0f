"""The demo's text comes from the interpreter itself."""

import dataclasses
import itertools
import json

from vllm_ctc_spec.demo import corpus
from vllm_ctc_spec.demo.corpus import _bare_code, _read_sources, _split, write_corpus
from vllm_ctc_spec.demo.scale import DemoScale


def test_comments_and_docstrings_go_and_the_code_stays():
    source = '"""Module."""\n# note\ndef f(x):\n    """Doc."""\n    return "kept"  # why\nclass A:\n    "Only this."\n'
    assert _bare_code(source) == "def f(x):\n    return 'kept'\n\nclass A:\n    pass\n"


def test_no_file_is_both_trained_and_held_out():
    sources = {f"module_{i}.py": f"x{i}" for i in range(400)}
    trained, held_out = _split(sources, max_chars=10**6)
    assert sorted(trained + held_out) == sorted(sources.values())
    assert 10 <= len(held_out) <= 45
    assert _split(sources | {"new.py": "y"}, max_chars=10**6)[1] in (held_out, [*held_out, "y"])


def test_the_corpus_holds_as_many_prompts_as_asked(tmp_path, monkeypatch):
    # The whole library would take seconds; its first files do.
    monkeypatch.setattr(corpus, "_read_sources", lambda: itertools.islice(_read_sources(), 60))
    scale = dataclasses.replace(DemoScale.tiny(), num_prompts=7, num_heldout_prompts=3)
    write_corpus(tmp_path / "corpus", scale)
    rows = {path.name: [json.loads(line) for line in path.open()] for path in (tmp_path / "corpus").iterdir()}
    assert (len(rows["prompts.jsonl"]), len(rows["heldout.jsonl"])) == (7, 3)
    texts = "".join(row["text"] for row in rows["texts.jsonl"])
    assert all(row["prompt"] in texts for row in rows["prompts.jsonl"])
    assert all(row["prompt"] not in texts for row in rows["heldout.jsonl"])
