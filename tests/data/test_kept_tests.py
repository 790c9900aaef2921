from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import InputError
from cluster.settings import Settings, load_settings
from data.dedup import sketch_texts
from data.kept_tests import keep_sketches, read_sketches, sketch_files


def settings_with(home: Path, **dedup: Any) -> Settings:
    return load_settings(home=home, curation={"dedup": dedup})[0]


def keep(settings: Settings, dataset_id: str, *numbers: int) -> None:
    """Keep one text for each number."""
    ids = np.array(numbers, np.uint64)
    made = sketch_texts([f"question number {n}" for n in numbers], ids, ids, ids, settings.curation.dedup)
    keep_sketches(settings, dataset_id, [made])


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
