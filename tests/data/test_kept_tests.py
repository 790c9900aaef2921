from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import InputError
from cluster.settings import Settings, load_settings
from data.dedup import sketch_texts
from data.kept_tests import keep_sketches, kept_nodes, kept_parts, read_part, read_sketches, sketch_files


def settings_with(home: Path, **dedup: Any) -> Settings:
    return load_settings(home=home, curation={"dedup": dedup})[0]


def sketches(settings: Settings, *numbers: int) -> pa.Table:
    """One text for each number."""
    ids = np.array(numbers, np.uint64)
    return sketch_texts([f"question number {n}" for n in numbers], ids, ids, ids, settings.curation.dedup)


def keep(settings: Settings, dataset_id: str, *numbers: int) -> None:
    keep_sketches(settings, dataset_id, [sketches(settings, *numbers)])


def test_only_what_is_not_kept_yet_is_written(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    keep(settings, "first", 1, 2)
    keep(settings, "second", 2, 3)
    keep(settings, "third", 1, 3)
    assert [(f.stem, read_sketches(f)["text"].to_pylist()) for f in sketch_files(settings)] == [
        ("first", [1, 2]), ("second", [3]),
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"seed": 7}, {"shingle_words": 2}, {"bands": 10}, {"rows_per_band": 5}])
def test_sketches_of_other_settings_are_refused_and_not_forgotten(tmp_path: Path, change: dict[str, int]) -> None:
    keep(settings_with(tmp_path), "first", 1)
    with pytest.raises(InputError, match="cannot be compared with the test items kept so far"):
        sketch_files(settings_with(tmp_path, **change))


def test_bands_of_equal_sketches_may_be_cut_in_another_way(tmp_path: Path) -> None:
    keep(settings_with(tmp_path), "first", 1)
    assert len(sketch_files(settings_with(tmp_path, bands=30, rows_per_band=4, threshold=0.7))) == 1


def test_sketches_are_written_and_read_a_table_at_a_time(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    keep(settings, "first", 5)
    keep_sketches(settings, "second", (sketches(settings, *numbers) for numbers in [(4, 3), (5,), (1, 5)]))
    parts = [read_part(place) for place in kept_parts(settings)]
    assert [part["text"].to_pylist() for part in parts] == [[5], [3, 4], [1]]
    assert kept_nodes(settings).tolist() == [1, 3, 4, 5]
    assert [file.stem for file in sketch_files(settings)] == ["first", "second"]


def test_a_dataset_whose_tests_are_all_kept_already_leaves_no_file(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    keep(settings, "first", 1)
    keep(settings, "second", 1)
    (folder,) = {file.parent for file in sketch_files(settings)}
    assert [path.name for path in folder.iterdir()] == ["first.parquet"]
