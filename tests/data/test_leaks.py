"""Sequences of datasets over a growing log: nothing that is or was a test item is ever trained on."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings.curation import CurationSettings, SplitSettings
from data.dedup import (
    assign_clusters,
    deduplicate,
    fingerprint,
    sketches_of,
    sketches_of_nodes,
)
from data.examples import make_examples
from data.near import SKETCHES, find_clusters, near_edges
from data.split import resolve_clusters
from data.stages import with_column
from tests.data.rows import rows

STORIES = [
    " ".join(f"{subject}{n}" for n in range(120)) for subject in ("apple", "bridge", "cloud", "desert", "engine")
]
PARTS = '{"explicit":null,"implicit":null,"grade":null,"label":null}'


@dataclass
class Root:
    """What a folder of datasets remembers between two of them."""

    sketches: list[pa.Table] = field(default_factory=list)
    tested: set[str] = field(default_factory=set)
    """Questions that were ever in test."""


@dataclass(frozen=True)
class Said:
    """One interaction: a user asks a story, perhaps with one word changed, and likes the answer or not."""

    user: int
    story: int
    changed: int
    answer: int
    good: bool


def question(said: Said) -> str:
    words = STORIES[said.story].split()
    if said.changed:
        words[-1] = f"other{said.changed}"
    return " ".join(words)


def dataset(log: list[Said], root: Root, config: CurationSettings) -> pa.Table:
    """The stages from the fingerprint to the split, as `data.curate` chains them."""
    table = rows(
        *(
            {
                "interaction_id": f"i{n}",
                "user_id": f"user{said.user}",
                "at_us": n,
                "messages": [{"role": "user", "content": question(said)}],
                "response": {"role": "assistant", "content": f"answer number {said.answer} is given here"},
            }
            for n, said in enumerate(log)
        )
    )
    for name, values, kind in (
        ("score", [0.9 if said.good else 0.1 for said in log], pa.float64()),
        ("explicit", [1.0 if said.good else -1.0 for said in log], pa.float64()),
        ("weight", [1.0] * len(log), pa.float64()),
        ("parts", [PARTS] * len(log), pa.string()),
    ):
        table = with_column(table, name, values, kind)
    table, _ = fingerprint(table, config)
    own = sketches_of(table, config.dedup)
    before = pa.concat_tables([SKETCHES.empty_table(), *root.sketches])
    edges = near_edges(pa.concat_tables([own, before]), config.dedup)
    table, _ = assign_clusters(table, find_clusters(edges, np.unique(before["node"].to_numpy())))
    table, _ = deduplicate(table, config)
    examples, _ = make_examples(table, config)
    kept, _ = resolve_clusters(examples)
    test = kept.filter(pc.equal(kept["split"], "test"))
    root.sketches.append(sketches_of_nodes(own, test["node"].to_numpy()))
    return kept


def story(text: str) -> str:
    """What the question of an example is nearly a duplicate of."""
    return next(start for start in (s.split()[0] for s in STORIES) if start in text)


interactions = st.builds(
    Said, st.integers(0, 40), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.booleans()
)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(interactions, min_size=1, max_size=25), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=4, max_size=4),
)
def test_no_user_no_cluster_and_no_former_test_item_crosses_into_training(
    growth: list[list[Said]], salts: list[str]
) -> None:
    root, log = Root(), list[Said]()
    for more, salt in zip(growth, salts, strict=False):
        log += more
        config = CurationSettings(split=SplitSettings(train=0.5, validation=0.2, salt=salt))
        found = dataset(log, root, config).to_pylist()
        splits: dict[str, set[str]] = {}
        stories: dict[str, set[str]] = {}
        for row in found:
            asked = story(row["messages"] or row["prompt"])
            splits.setdefault(row["user_id"], set()).add(row["split"])
            stories.setdefault(asked, set()).add(row["split"])
        assert all(len(found) == 1 for found in splits.values()), splits
        assert all(len(found) == 1 for found in stories.values()), stories
        trained = {asked for asked, where in stories.items() if where & {"train", "validation"}}
        assert not trained & root.tested
        root.tested |= {asked for asked, where in stories.items() if "test" in where}
