import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cluster.errors import InputError
from train import files
from train.files import own_folder, recover, write_file, written_whole

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_full_disk_is_one_clear_line_and_leaves_the_old_folder_alone(tmp_path: Path, error: Exception) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with (
        pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"),
        written_whole(out) as scratch,
    ):
        (scratch / "file").write_text("half")
        raise error
    assert [(path.name, path.read_text()) for path in tmp_path.rglob("*") if path.is_file()] == [("file", "old")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a place where nothing can be made")
def test_place_where_nothing_can_be_made_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="out='/proc/out' cannot be written"), written_whole(Path("/proc/out")):
        pass


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with written_whole(tmp_path / "out") as scratch:
            (scratch / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]


def test_other_errors_keep_their_nature(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), own_folder(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    assert not (tmp_path / "out").exists()


def write(out: Path, text: str) -> None:
    with written_whole(out) as scratch:
        (scratch / "file").write_text(text)


def test_reader_finds_a_folder_at_every_moment_while_it_is_replaced(tmp_path: Path) -> None:
    out, ended, missing = tmp_path / "out", threading.Event(), []
    write(out, "0")

    def read() -> None:
        while not ended.is_set():
            try:
                (out / "file").stat()
            except FileNotFoundError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        write(out, str(number))
    ended.set()
    reader.join()
    assert not missing and (out / "file").read_text() == "99"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_names_cannot_be_exchanged_a_kill_between_two_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == out:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        write(out, "half")
    assert not out.exists()
    recover(out)
    assert (out / "file").read_text() == "old"
    write(out, "new")
    assert (out / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


HOLD = """
import sys
from pathlib import Path
from train.files import written_whole
with written_whole(Path(sys.argv[1])) as scratch:
    print(scratch.name, flush=True)
    sys.stdin.read()
"""


def test_scratch_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], **pipes) as process:
        assert process.stdout is not None
        scratch = tmp_path / process.stdout.readline().strip()
        write(out, "beside")
        assert scratch.is_dir()
        process.kill()
        process.wait()
        recover(out)
        assert not scratch.exists() and (out / "file").read_text() == "beside"


def test_file_that_cannot_be_written_to_its_end_keeps_its_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "result.json", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(os, "fsync", full)
        write_file(tmp_path / "result.json", "new")
    assert (tmp_path / "result.json").read_text() == "old"
