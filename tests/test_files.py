"""A folder is replaced as a whole, or not at all, and a line appended so."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ctc_spec.files import append_line, atomic_folder, cut_incomplete_line


def test_the_folder_appears_when_the_body_has_succeeded(tmp_path):
    with atomic_folder(tmp_path / "a" / "model") as partial:
        (partial / "weights").write_text("new")
        assert not (tmp_path / "a" / "model").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]
    assert (tmp_path / "a" / "model" / "weights").read_text() == "new"


def test_a_failure_leaves_the_old_folder_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text() == "old"


def test_success_replaces_the_old_folder_and_leftovers_of_a_kill(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale").write_text("old")
    leftover = tmp_path / ".model.partial"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with atomic_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["weights"]


def append_in_a_process(path: Path, program: str) -> subprocess.Popen:
    code = (
        f"from pathlib import Path\nfrom vllm_ctc_spec.files import append_line\npath = Path({str(path)!r})\n{program}"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def test_lines_of_several_processes_are_whole(tmp_path):
    path = tmp_path / "lines"
    program = "for number in range(200): append_line(path, b'{letter}' * (number * 997 % 20_000) + b'\\n', 1 << 30)"
    running = [append_in_a_process(path, program.format(letter=letter)) for letter in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    lines = path.read_bytes().splitlines()
    assert sorted(map(len, lines)) == sorted(2 * [number * 997 % 20_000 for number in range(200)])
    assert all(len(set(line)) <= 1 for line in lines)


def test_a_line_for_which_the_disk_has_no_room_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "lines"
    # The system writes the part of the second line that fits.
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    program += "append_line(path, 59 * b'a' + b'\\n', 1000); append_line(path, 59 * b'b' + b'\\n', 1000)"
    process = append_in_a_process(path, program)
    assert "No space left on device" in process.communicate(timeout=60)[1]
    assert path.read_bytes() == 59 * b"a" + b"\n"
    with pytest.raises(OSError) as raised:
        append_line(Path("/dev/full"), b"a\n", 10)
    assert raised.value.errno == errno.ENOSPC


def test_a_file_grows_no_larger_than_it_may(tmp_path):
    path = tmp_path / "lines"
    assert [append_line(path, b"12345\n", 13) for _ in range(3)] == [True, True, False]
    assert append_line(path, b"\n", 13)
    assert path.read_bytes() == b"12345\n12345\n\n"


@pytest.mark.parametrize(("before", "after"), [("", ""), ("ab", ""), ("a\n", "a\n"), ("a\nb\nc", "a\nb\n")])
def test_a_last_line_without_its_end_is_cut_off(tmp_path, before, after):
    path = tmp_path / "lines"
    path.write_text(before)
    cut_incomplete_line(path)
    assert path.read_text() == after
