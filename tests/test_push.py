"""`vllm-ctc-spec push` against a hub of this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants

from vllm_ctc_spec.cli import main
from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter.modeling import CTCDrafter
from vllm_ctc_spec.push import push

SIZES = {"hidden_size": 64, "vocab_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "drafter"
    CTCDrafter(CTCDrafterConfig(**SIZES, intermediate_size=64, condition_rank=8)).save_pretrained(folder)
    (folder / "README.md").write_text("# CTC drafter\n")
    (folder / "settings.json").write_text('{"target": "/home/somebody/target"}')
    return folder


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files needs. The server keeps what was asked of it."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            answer: Any = {"url": f"{server.url}/somebody/drafter", "id": "somebody/drafter"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            }
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            branch = self.path.rpartition("/commit/")[2]
            server.commits.append((branch, {name: base64.b64decode(content) for name, content in files.items()}))
            answer = {"commitUrl": f"{server.url}/somebody/drafter/commit/1", "commitOid": "1"}
        elif "/branch/" in self.path:
            server.branches.append(self.path.rpartition("/branch/")[2])
            answer = {}
        else:
            answer = {"errors": [], "warnings": []}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.commits, server.branches = [], [], []
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("revision", [None, "better"])
def test_the_folder_is_uploaded_without_the_paths_of_this_machine(
    drafter: Path, hub: Any, revision: str | None
) -> None:
    address = push(drafter, "somebody/drafter", revision, True, HfApi(endpoint=hub.url, token="hf_secret"))
    assert address == f"{hub.url}/somebody/drafter/commit/1"
    [created] = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("drafter", "somebody", "private")
    [(branch, files)] = hub.commits
    assert branch == (revision or "main")
    assert hub.branches == ([] if revision is None else [revision])
    names = ("README.md", "config.json", "model.safetensors")
    assert files == {name: (drafter / name).read_bytes() for name in names}


def test_without_a_hub_nothing_is_uploaded(
    drafter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(drafter), "somebody/drafter"]) == 2
    told = capsys.readouterr().err
    assert "'somebody/drafter' cannot be written on the Hugging Face hub" in told and "HF_HUB_OFFLINE" in told


def test_what_is_no_drafter_with_a_card_is_refused_before_anything_is_sent(
    drafter: Path, hub: Any, tmp_path: Path
) -> None:
    api = HfApi(endpoint=hub.url, token="hf_secret")
    with pytest.raises(ValueError, match="is no name of a repository"):
        push(drafter, "some/body/drafter", None, False, api)
    (drafter / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no model card .*train evaluate TARGET"):
        push(drafter, "somebody/drafter", None, False, api)
    with pytest.raises(ValueError, match="is not a folder"):
        push(tmp_path / "nothing", "somebody/drafter", None, False, api)
    (drafter / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing or truncated"):
        push(drafter, "somebody/drafter", None, False, api)
    assert not hub.created and not hub.commits
