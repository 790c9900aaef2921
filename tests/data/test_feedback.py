import stat
import subprocess
import sys

import pytest

from cluster.errors import ConfigError, InputError
from cluster.settings import Settings, load_settings
from cluster.settings.capture import RewardSettings
from data.feedback import complete_feedback, pseudonym, pseudonym_secret, reward

SECRET = b"0123456789abcdef"


@pytest.mark.parametrize(
    ("type", "value", "expected"),
    [
        ("thumbs_up", None, 1.0),
        ("thumbs_down", None, -1.0),
        ("rating", 1, -1.0),
        ("rating", 3, 0.0),
        ("rating", 4.5, 0.75),
        ("correction", None, -0.5),
        ("follow_up", None, 0.0),
        ("abandonment", None, -0.8),
        ("draft_rejected", None, -1.0),
        ("reformulation", None, -0.5),
        ("quick_accept", None, 0.6),
        ("compliance_flag", None, -1.0),
    ],
)
def test_reward_of_the_default_table(type: str, value: float | None, expected: float) -> None:
    assert reward(type, value, RewardSettings()) == expected


def test_rating_stays_in_range_with_another_table() -> None:
    assert reward("rating", 5, RewardSettings(rating_neutral=1, rating_step=1)) == 1.0


def test_reward_table_is_configurable(settings: Settings) -> None:
    changed = load_settings(home=settings.home, rewards={"thumbs_up": 0.7})[0]
    assert complete_feedback({"type": "thumbs_up"}, changed.rewards)["reward"] == 0.7


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"type": "rating"}, "value"),
        ({"type": "rating", "value": 6}, "value"),
        ({"type": "thumbs_up", "value": 1}, "value"),
        ({"type": "correction", "text": "  "}, "text"),
        ({"type": "thumbs_down", "category": "tone"}, "category"),
    ],
)
def test_fields_that_do_not_fit_the_type_are_refused(body: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as refused:
        complete_feedback(body, RewardSettings())
    assert refused.value.field == field


def test_pseudonym_is_stable_keyed_and_tells_tenants_apart() -> None:
    name = pseudonym(SECRET, "acme", "ada@example.com")
    assert name == pseudonym(SECRET, "acme", "ada@example.com")
    assert len(name) == 32
    assert int(name, 16) >= 0
    assert "ada" not in name
    others = {
        pseudonym(SECRET, "other", "ada@example.com"),
        pseudonym(b"another secret key", "acme", "ada@example.com"),
        pseudonym(SECRET, "acm", "eada@example.com"),
    }
    assert len(others | {name}) == 4


def test_secret_is_made_once_and_only_the_owner_reads_it(settings: Settings) -> None:
    first = pseudonym_secret(settings)
    assert pseudonym_secret(settings) == first
    assert stat.S_IMODE((settings.home / "secret.key").stat().st_mode) == 0o600
    assert [p.name for p in settings.home.iterdir()] == ["secret.key"]


def test_processes_that_start_together_share_one_secret(settings: Settings) -> None:
    code = (
        "import sys; from cluster.settings import load_settings; from data.feedback import pseudonym_secret;"
        "print(pseudonym_secret(load_settings(home=sys.argv[1])[0]).decode())"
    )
    command = [sys.executable, "-c", code, str(settings.home)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({run.communicate()[0] for run in runs}) == 1


def test_secret_from_the_environment_wins(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_CAPTURE__PSEUDONYM_SECRET", "0123456789abcdef!")
    assert pseudonym_secret(load_settings(home=settings.home)[0]) == b"0123456789abcdef!"
    assert not settings.home.exists()


def test_short_secret_file_is_refused(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "secret.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="fewer than 16 bytes"):
        pseudonym_secret(settings)
