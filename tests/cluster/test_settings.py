from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.settings import load_settings


def test_defaults_put_everything_under_home(tmp_path: Path) -> None:
    settings, origin = load_settings(home=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path / 'rayloop.db'}"
    assert origin["ray.num_cpus"] == "default"
    assert origin["home"] == "command line"


def test_environment_beats_file_and_origin_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rayloop.yaml"
    file.write_text("tenant: acme\nray:\n  num_cpus: 8\n  object_store_mb: 100\n")
    monkeypatch.setenv("RAYLOOP_RAY__NUM_CPUS", "4")
    settings, origin = load_settings(file)
    assert (settings.tenant, settings.ray.num_cpus, settings.ray.object_store_mb) == ("acme", 4, 100)
    assert origin["ray.num_cpus"] == "RAYLOOP_RAY__NUM_CPUS"
    assert origin["ray.object_store_mb"] == "rayloop.yaml:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ray:\n  num_cpus: 0\n",
            "ray.num_cpus=0 input should be greater than or equal to 1; set `ray.num_cpus` in rayloop.yaml:2",
        ),
        ("ray:\n  cpus: 1\n", "ray.cpus=1 is not a known setting; remove it from rayloop.yaml:2"),
        ("ray: [1\n", "is not valid YAML"),
        ("- 1\n", "must be a mapping of sections"),
        ("tenant: .nan\n", "tenant=nan input should be a valid string"),
        (
            "rollout:\n  tick_s: 2\n  stages: [0.5, 0.1]\n",
            "rollout={'stages': [0.5, 0.1]} rollout.stages must grow; set `rollout` in rayloop.yaml:1",
        ),
        (
            "experiment:\n  guardrails: [win_rate]\n",
            "experiment.guardrails='win_rate' needs shadow answers to be compared with; set `shadow.enabled: true`",
        ),
    ],
)
def test_broken_file_gives_one_line_with_field_value_rule_remedy(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rayloop.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_misspelt_variable_is_refused_with_the_likely_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLOOP_RAY__NUM_CPU", "4")
    with pytest.raises(ConfigError, match="did you mean RAYLOOP_RAY__NUM_CPUS"):
        load_settings()
