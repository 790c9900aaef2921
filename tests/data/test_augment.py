import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from cluster.settings.curation import AugmentSettings, CurationSettings
from data.augment import REQUEST, augment, damage, damage_limit, pairs_due, reworder
from data.examples import make_examples
from data.stages import with_column
from tests.data.test_pairs import content, judged, say

ON = AugmentSettings(enabled=True)


def examples(count: int, split: str = "train") -> pa.Table:
    """SFT examples of distinct questions."""
    rows = [
        say(f"the total of order {n} is {n + 100} euros", score=0.9, node=n, cluster=n, split=split,
            messages=[{"role": "user", "content": f"what does order {n} cost in all?"}])
        for n in range(count)
    ]  # fmt: skip
    return make_examples(judged(*rows), CurationSettings())[0]


def aloud(texts: Sequence[str]) -> list[str | None]:
    return [text.replace("what does", "tell me what") for text in texts]


def test_nothing_is_added_unless_asked() -> None:
    table = examples(20)
    assert augment(table, AugmentSettings(), aloud)[0].equals(table)


def test_synthetic_examples_are_marked_and_follow_the_factor() -> None:
    table, dropped = augment(examples(400), ON, aloud)
    made = [row for row in table.to_pylist() if row["synthetic"]]
    assert 0.4 < len(made) / 400 < 0.6 and not dropped
    assert {row["origin"] for row in made} == {"paraphrase", "damaged"}
    assert len({row["example_id"] for row in table.to_pylist()}) == len(table)
    human = 1 - len(made) / len(table)
    assert human >= ON.human_share
    for row in made:
        if row["origin"] == "damaged":
            assert content(row["chosen"]) != content(row["rejected"])
        else:
            assert json.loads(row["messages"])[0]["content"].startswith("tell me what")


def test_enough_pairs_stay_human_whatever_the_blocks() -> None:
    said = [say(f"order {n} costs {n + 100}", score=0.9, node=n, cluster=n) for n in range(300)]
    for n in range(40):
        worse = f"no idea what {n} costs"
        said += [say(worse, score=0.1, node=n, cluster=n), say(f"{n} euros", score=0.95, node=n, cluster=n)]
    table = make_examples(judged(*said), CurationSettings())[0]
    blocks = [table.slice(start, 50) for start in range(0, len(table), 50)]
    limit = damage_limit((pairs_due(block, ON) for block in blocks), ON)
    assert limit == damage_limit([pairs_due(table, ON)], ON)
    made = augment(table, ON, aloud, limit)[0].to_pylist()
    pairs = [row["synthetic"] for row in made if row["kind"] == "preference"]
    assert any(pairs) and pairs.count(False) / len(pairs) >= ON.human_share
    alone = examples(50)  # no pair is human, so none may be synthetic
    made = augment(alone, ON, aloud, damage_limit([pairs_due(alone, ON)], ON))[0].to_pylist()
    assert {row["kind"] for row in made} == {"sft"} and any(row["synthetic"] for row in made)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_nothing_synthetic_is_ever_outside_train(split: str) -> None:
    table = examples(50, split)
    assert augment(table, AugmentSettings(enabled=True, factor=3), aloud)[0].equals(table)


def test_the_same_examples_are_copied_in_any_block() -> None:
    table = examples(60)
    whole = {row["example_id"] for row in augment(table, ON, aloud)[0].to_pylist()}
    parts = [augment(table.slice(start, 20), ON, aloud)[0] for start in (0, 20, 40)]
    assert {row["example_id"] for part in parts for row in part.to_pylist()} == whole


def test_rewordings_that_say_nothing_new_or_too_much_are_dropped() -> None:
    settings = AugmentSettings(enabled=True, negatives=False, factor=2)

    def bad(texts: Sequence[str]) -> list[str | None]:
        return [[None, text, text * 9][n % 3] for n, text in enumerate(texts)]

    table = with_column(examples(30), "synthetic", [False] * 30, pa.bool_())
    grown, dropped = augment(table, settings, bad)
    assert len(grown) == 30 and dropped == {"no rewording": 30}


def test_a_damaged_answer_differs_in_one_number_or_ends_early() -> None:
    assert damage("it costs 7 euros", "x") != "it costs 7 euros"
    assert damage("a b c d e f g h", "x") == "a b c d"
    assert damage("too short", "x") is None


def test_too_large_a_factor_leaves_too_few_people() -> None:
    with pytest.raises(ValidationError, match="factor must be <= 1 / human_share"):
        AugmentSettings(factor=4)


@pytest.fixture
def router() -> Iterator[str]:
    """A server of the router's shape that answers in capitals, and fails on the word `broken`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][0]["content"].removeprefix(REQUEST)
            answer = {"choices": [{"message": {"role": "assistant", "content": f"{body['model']}: {asked.upper()}"}}]}
            self.send_response(500 if "broken" in asked else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_stable_version_rewords_over_http(router: str) -> None:
    reword = reworder(AugmentSettings(enabled=True, endpoint=router), "shop")
    assert reword(["one", "broken", "two"]) == ["shop: ONE", None, "shop: TWO"]
