from cluster.reference import configuration_page
from cluster.settings import Settings


def test_every_setting_has_a_meaning_in_the_reference() -> None:
    rows = [line for line in configuration_page().splitlines() if line.startswith("| `")]
    assert len(rows) > len(Settings.model_fields)
    without = [row for row in rows if not row.split("|")[3].strip()]
    assert without == []
