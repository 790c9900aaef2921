import psutil
import pyarrow as pa

from data.memory import give_back, tidy


def test_what_is_free_leaves_the_process() -> None:
    """Many small pieces, of which one in a thousand stays: the allocator keeps the rest."""
    process = psutil.Process()
    pieces = [bytes(2_000) for _ in range(60_000)]
    full = process.memory_info().rss
    stays = pieces[::1_000]
    del pieces
    give_back()
    assert process.memory_info().rss < full - 80_000_000
    assert len(stays) == 60


def test_arrow_keeps_nothing_of_a_table_that_is_gone() -> None:
    process = psutil.Process()
    with tidy():
        before = process.memory_info().rss
        columns = [pa.array(range(n, n + 1_000_000)) for n in range(10)]
        assert process.memory_info().rss > before + 70_000_000
        del columns
        assert process.memory_info().rss < before + 20_000_000
