"""Recall on marked sentences (presidio-research); run with `-s` to see it by kind."""

import json
from collections import Counter
from pathlib import Path

from data.recognisers import find

STRUCTURED = {
    "EMAIL_ADDRESS": "EMAIL",
    "CREDIT_CARD": "CARD",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "US_SSN": "SSN",
    "PHONE_NUMBER": "PHONE",
    "DOMAIN_NAME": "DOMAIN",
}


def test_structured_kinds_are_found_on_marked_sentences(shared_data: Path) -> None:
    sentences = json.loads((shared_data / "pii_synthetic_sentences.json").read_text())
    total: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for sentence in sentences:
        spans = find(sentence["full_text"])
        marked = sentence["spans"]
        for mark in marked:
            if mark["entity_type"] not in STRUCTURED:
                continue
            start, end = mark["start_position"], mark["end_position"]
            covered = sum(max(0, min(end, s.end) - max(start, s.start)) for s in spans)
            host_only = mark["entity_type"] == "DOMAIN_NAME"
            total[mark["entity_type"]] += 1
            hit = covered > 0 if host_only else covered == end - start
            found[mark["entity_type"]] += hit
            if not hit:
                print(
                    "missed",
                    mark["entity_type"],
                    repr(mark["entity_value"]),
                    repr(sentence["full_text"][:90]),
                )
        for span in spans:
            if not any(m["start_position"] < span.end and span.start < m["end_position"] for m in marked):
                wrong[span.kind] += 1
                print("wrong", span)
    for kind in STRUCTURED:
        print(f"{kind:15} recall {found[kind]}/{total[kind]}  spurious {wrong[STRUCTURED[kind]]}")
    for kind in STRUCTURED:
        assert found[kind] >= 0.95 * total[kind], kind
    assert sum(wrong.values()) <= 0.02 * sum(total.values())
