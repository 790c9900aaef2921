import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cluster.errors import InputError
from train.files import own_folder, written_whole

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


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with written_whole(tmp_path / "out") as scratch:
            (scratch / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]


def test_other_errors_keep_their_nature(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), own_folder(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    assert not (tmp_path / "out").exists()
