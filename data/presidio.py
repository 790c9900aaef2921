"""Names and places by presidio's named-entity recognition, with our own rules for what it has no recogniser for.

Needs `pip install 'rayloop[presidio]'` and a spaCy model with entities: install one from its makers, or name a folder
(`curation.scrub.presidio_model`; docs/curation.md says where to get one from PyPI). Nothing is fetched from here.
"""

from functools import cache
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from data.names import add_span, find_names
from data.recognisers import Span

KINDS = ("PERSON", "LOCATION", "NRP", "DATE_TIME", "ORGANIZATION")
UNWANTED = (
    "CARDINAL", "EVENT", "FAC", "LANGUAGE", "LAW", "MONEY", "ORDINAL", "PERCENT", "PRODUCT", "QUANTITY", "WORK_OF_ART",
)  # fmt: skip
"""What spaCy's models also mark, and presidio has no name for: it would warn of each."""
OUR_KINDS = frozenset({"ADDRESS", "AGE", "POSTCODE", "LICENCE", "TITLE"})


def find_with_presidio(text: str, model: str) -> list[Span]:
    """Spans of names, places, addresses and dates, by position, none overlapping."""
    found: list[Span] = []
    for span in find_names(text):
        if span.kind in OUR_KINDS:
            add_span(found, span.kind, text, span.start, span.end)
    results = analyser(model).analyze(text=text, language="en", entities=list(KINDS))
    for result in sorted(results, key=lambda r: (-r.score, r.start)):
        add_span(found, result.entity_type, text, result.start, result.end)
    return sorted(found, key=lambda span: span.start)


@cache
def analyser(model: str) -> Any:
    """Presidio over a spaCy model: the name of an installed one, or its folder.

    Raises:
        InputError: presidio or the model is not installed.
    """
    remedy = "pip install 'rayloop[presidio]', install the model or name its folder, or set builtin"
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NlpEngineProvider
    except ImportError as error:
        raise InputError("curation.scrub.names", "presidio", f"is not installed ({error})", remedy) from None
    if not spacy.util.is_package(model) and not Path(model).is_dir():
        raise InputError("curation.scrub.presidio_model", model, "is no installed spaCy model", remedy)
    models = [{"lang_code": "en", "model_name": model}]
    configuration = {
        "nlp_engine_name": "spacy",
        "models": models,
        "ner_model_configuration": {"labels_to_ignore": list(UNWANTED)},
    }
    engine = NlpEngineProvider(nlp_configuration=configuration).create_engine()
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
