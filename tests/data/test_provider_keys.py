"""A key of every provider is found whole, wherever it stands."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.recognisers import PROVIDERS, find

SURROUNDINGS = ["{}", "my key is {}, thanks", "export KEY={}\n", '{{"auth": "{}"}}', "({})"]
KINDS = {"API_KEY", "SECRET", "CREDENTIAL_URL"}


@pytest.mark.parametrize("provider", list(PROVIDERS))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_key_of_each_provider_is_covered_whole(provider: str, data: st.DataObject) -> None:
    key = data.draw(st.from_regex(PROVIDERS[provider][1], fullmatch=True).filter(lambda k: k[-1].isalnum()))
    text = data.draw(st.sampled_from(SURROUNDINGS)).format(key)
    begin = text.index(key)
    covered = {place for span in find(text) if span.kind in KINDS for place in range(span.start, span.end)}
    assert set(range(begin, begin + len(key))) <= covered, (text, find(text))
