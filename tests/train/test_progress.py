import io

from train.progress import Progress


def test_line_says_how_far_how_fast_and_how_long() -> None:
    stream = io.StringIO()
    with Progress("dpo-1", 40, stream, every_s=0) as progress:
        progress.reached(10, 1000, {"loss": 0.5})
        progress.started -= 10  # ten seconds pass
        progress.reached(30, 3000, {"loss": 0.25})
    assert "dpo-1: 10/40 (25%) loss 0.5 …" in stream.getvalue()
    assert "dpo-1: 30/40 (75%) loss 0.25 200 tokens/s 5 s left" in stream.getvalue()


def test_advance_counts_steps_and_tokens() -> None:
    progress = Progress("base model", 10, io.StringIO(), every_s=1e9)
    progress.advance(tokens=50)
    progress.advance(tokens=50, loss=1.0)
    assert (progress.done, progress.tokens, progress.values) == (2, 100, {"loss": 1.0})
