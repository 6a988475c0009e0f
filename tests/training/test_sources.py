"""All kinds of sources give the same lines, numbered from 1. A wrong source is refused by name, with a remedy."""

import json
import sys

import pytest

from vllm_ctc_spec.training.sources import FaultyLine, read_lines

ROWS = [{"text": "a"}, {"text": "b"}, {"text": "c"}]


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Without a network, a hub name would be retried for half a minute.
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return library


@pytest.fixture
def saved(datasets, tmp_path):
    """A folder written by save_to_disk, of two splits."""
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list([{"text": "t"}])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def plain(datasets, tmp_path):
    """A folder of JSONL files, of two splits."""
    folder = tmp_path / "plain"
    folder.mkdir()
    write_lines(folder / "train.jsonl", ROWS)
    write_lines(folder / "test.jsonl", [{"text": "t"}])
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fields(source):
    return [line.fields() for line in read_lines(source)]


def places(source):
    return [line.where for line in read_lines(source)]


@pytest.mark.parametrize("start", ["", "\n ", "\ufeff"])
def test_a_json_file_holds_an_array_or_lines(tmp_path, start):
    array = tmp_path / "array.json"
    array.write_text(start + json.dumps(ROWS, indent=1), encoding="utf-8")
    lines = write_lines(tmp_path / "lines.json", ROWS)
    assert fields(array) == fields(lines) == ROWS
    assert places(array) == [f"{array}, row {number}" for number in (1, 2, 3)]
    assert places(lines) == [f"{lines}, line {number}" for number in (1, 2, 3)]


def test_blank_lines_are_counted_and_bad_ones_do_not_end_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\n{\n"\xff"\n[]\n' + b"[" * 100_000 + b'\n{"text": "b"}')
    good, *bad, last = read_lines(path)
    assert (good.where, last.where) == (f"{path}, line 1", f"{path}, line 7")
    assert (good.fields(), last.fields()) == ({"text": "a"}, {"text": "b"})
    for line, problem in zip(bad, ("not JSON", "not JSON", "is list", "not JSON"), strict=True):
        with pytest.raises(FaultyLine, match=problem):
            line.fields()


def test_rows_of_an_array_that_are_no_objects_are_faulty(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, "text"]')
    with pytest.raises(FaultyLine, match="is str, not a JSON object"):
        list(read_lines(path))[1].fields()


@pytest.mark.parametrize("folder", ["saved", "plain"])
def test_folders_give_the_split_that_is_asked_for(request, folder):
    path = request.getfixturevalue(folder)
    assert fields(path) == fields(f"{path}:train") == ROWS
    assert fields(f"{path}:test") == [{"text": "t"}]
    assert places(path) == [f"{path}:train, row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("folder", ["saved", "plain"])
def test_a_wrong_split_names_the_splits(request, folder):
    path = request.getfixturevalue(folder)
    with pytest.raises(ValueError, match=rf"no split 'dev', only \['test', 'train'\].*'{path}:test'"):
        fields(f"{path}:dev")


def test_a_saved_single_data_set_is_its_train_split_and_gives_plain_values(datasets, tmp_path):
    data = datasets.Dataset.from_list([{"token_ids": [1, 2], "text": None}, {"token_ids": None, "text": "a"}])
    data.with_format("numpy").save_to_disk(tmp_path / "one")
    assert fields(tmp_path / "one") == [{"token_ids": [1, 2]}, {"text": "a"}]


def test_a_folder_whose_name_has_a_colon_is_no_split(datasets, plain):
    other = plain.rename(plain.with_name("v1:2"))
    assert fields(other) == fields(f"{other}:train") == ROWS


@pytest.mark.parametrize("name", ["nobody/none-such", "nobody/none-such:test", "/no/such/folder"])
def test_a_name_that_cannot_be_loaded_says_what_was_tried(datasets, name):
    with pytest.raises(ValueError, match=r"neither a file nor a folder.*load_dataset failed.*network.*JSONL"):
        fields(name)


def test_a_folder_without_data_is_named(datasets, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' cannot be read: it is a local folder.*load_dataset failed"):
        fields(tmp_path / "empty")


def test_files_are_never_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"none\.jsonl' cannot be read \(No such file"):
        fields(tmp_path / "none.jsonl")
    write_lines(tmp_path / "a.txt", ROWS)
    with pytest.raises(ValueError, match=r"a\.txt:train' cannot be read .* only data sets have splits"):
        fields(f"{tmp_path / 'a.txt'}:train")
    assert fields(tmp_path / "a.txt") == ROWS


def test_a_broken_array_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"},')
    with pytest.raises(ValueError, match=r"a\.json' begins like a JSON array but is not JSON"):
        fields(tmp_path / "a.json")


def test_without_the_datasets_library_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "vllm-ctc-spec\[train\]"'):
        fields(tmp_path)
