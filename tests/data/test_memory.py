import psutil

from data.memory import give_back


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
