"""A key of every provider is found whole, wherever it stands."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.recognisers import PROVIDERS, find

SURROUNDINGS = ["{}", "my key is {}, thanks", "export KEY={}\n", '{{"auth": "{}"}}', "({})"]
LETTERS = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xY"
HEX = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
CAPITALS = "A1B2C3D4E5F6G7H8J9K0L1M2N3P4Q5R6"
DOCUMENTED = {
    "OpenAI, of a project": "sk-proj-" + LETTERS * 4,
    "OpenAI, of a service account": "sk-svcacct-" + LETTERS * 4,
    "Anthropic": "sk-ant-api03-" + LETTERS * 2 + "-_" + LETTERS[:27] + "AA",
    "OpenRouter": "sk-or-v1-" + HEX * 2,
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "AWS, temporary": "ASIA" + "IOSFODNN7EXAMPLE",
    "Google API key": "AIza" + "Sy" + LETTERS + "_",
    "Google OAuth client secret": "GOCSPX-" + LETTERS[:28],
    "GitHub, classic": "ghp_" + LETTERS + "aB3d",
    "GitHub, of an app": "ghs_" + LETTERS + "aB3d",
    "GitHub, fine-grained": "github_pat_" + LETTERS[:22] + "_" + (LETTERS * 2)[:59],
    "GitLab": "glpat-" + LETTERS[:20],
    "GitLab, routable": "glpat-" + LETTERS[:27] + ".01." + "0z1y2x3w4",
    "GitLab, of a runner": "glrt-" + LETTERS[:20],
    "Slack, bot": "xoxb-" + "123456789012-1234567890123-" + LETTERS[:24],
    "Slack, user": "xoxp-" + "123456789012-123456789012-1234567890123-" + HEX,
    "Slack, app": "xapp-1-" + "A0123456789-1234567890123-" + HEX * 2,
    "Slack, webhook": "hooks.slack.com/services/" + "T01234567/B01234567/" + LETTERS[:24],
    "Stripe": "sk_live_" + "51" + LETTERS * 3,
    "Stripe, restricted": "rk_live_" + LETTERS[:24],
    "Stripe, webhook": "whsec_" + LETTERS,
    "Hugging Face": "hf_" + LETTERS + "aB",
    "npm": "npm_" + LETTERS + "aB3d",
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + LETTERS * 4,
    "Docker Hub": "dckr_pat_" + LETTERS[:27],
    "SendGrid": "SG." + LETTERS[:22] + "." + LETTERS + LETTERS[:11],
    "Twilio, account": "AC" + HEX,
    "Twilio, key": "SK" + HEX,
    "Mailgun": "key-" + HEX,
    "Mailchimp": HEX + "-us21",
    "Shopify": "shpat_" + HEX,
    "Square": "sq0atp-" + LETTERS[:22],
    "DigitalOcean": "dop_v1_" + HEX * 2,
    "Databricks": "dapi" + HEX + "-2",
    "Nvidia": "nvapi-" + LETTERS * 2,
    "Groq": "gsk_" + LETTERS + LETTERS[:20],
    "Perplexity": "pplx-" + LETTERS + LETTERS[:16],
    "Replicate": "r8_" + LETTERS + "aB3dE",
    "Linear": "lin_api_" + LETTERS + "aB3dE5fG",
    "Notion": "ntn_" + LETTERS + LETTERS[:14],
    "Figma": "figd_" + LETTERS + "-_aB3dE5",
    "Airtable": "pat" + LETTERS[:14] + "." + HEX * 2,
    "Atlassian": "ATATT3xFfGF0" + LETTERS * 5 + "=" + CAPITALS[:8],
    "Grafana": "glsa_" + LETTERS + "_" + HEX[:8],
    "New Relic": "NRAK-" + CAPITALS[:27],
    "Sentry": "sntrys_" + LETTERS * 4,
    "Vault": "hvs." + LETTERS * 3,
    "Terraform": LETTERS[:14] + ".atlasv1." + (LETTERS * 3)[:67],
    "Doppler": "dp.pt." + LETTERS + LETTERS[:11],
    "Telegram, as in its manual": "110201543:" + "AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw",
    "Telegram": "1102015431:" + "AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsawX",
    "Postman": "PMAK-" + HEX[:24] + "-" + (HEX * 2)[:34],
    "age": "AGE-SECRET-KEY-1" + (CAPITALS * 2)[:58],
    "Azure storage": "AccountKey=" + LETTERS * 2 + LETTERS[:22] + "==",
}
"""Written by hand after what each provider says of its tokens' form, not after our patterns."""
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


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", list(DOCUMENTED))
def test_a_token_of_the_documented_form_is_covered_whole(name: str, surrounding: str) -> None:
    text = surrounding.format(DOCUMENTED[name])
    begin = text.index(DOCUMENTED[name])
    covered = {place for span in find(text) if span.kind in KINDS for place in range(span.start, span.end)}
    left = "".join(c for place, c in enumerate(DOCUMENTED[name], begin) if place not in covered)
    assert not left, (name, left)
