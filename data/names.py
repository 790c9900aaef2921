"""Names, places, addresses and dates without a model: shapes, context words and short lists. Off by default.

A capitalised run inside a sentence that is no ordinary word is taken for a name; what stands before and after
it says of what. That finds most of what people mark, and also marks products and titles, so it belongs where
hiding too much is the smaller harm. For better judgement name presidio (`curation.scrub.names`).
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from cluster.errors import InputError
from data.recognisers import Span
from data.wordlists import word_list

TITLES = (
    "Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Sir|Madam|Lady|Lord|Herr|Frau|Monsieur|Madame|Mme|Captain|Reverend|"
    "Judge|President|Minister"
)
STREETS = (
    r"[Ss]treets?|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Squares|Way|Terrace|"
    r"Highway|Hwy|Parkway|Pkwy|Crescent|Close|Alley|Circle|Row|Quay|Route|Rte|Trail|Mews|Hill|Gardens?|"
    r"\w*(?:stra(?:ß|ss)e|str\.|gasse|weg|platz|allee|gatan|vägen|gata|veien|vej|gade|straat|laan|plein|katu|tie)|"
    r"utca|[uú]t|u\.|tér|ulica|ul\.|[Rr]ue|[Vv]ia|[Cc]alle|[Aa]venida|[Pp]laza|[Pp]iazza"
)
COMPANY = (
    r"Inc|Ltd|LLC|LLP|PLC|Corp|Corporation|Company|Co|GmbH|AG|SA|SARL|BV|NV|Oy|AB|AS|KG|Group|Holdings?|Partners|"
    r"Bank|University|College|Institute|Hospital|Church|Orchestra|Association|Foundation|Ministry|Department|Agency|"
    r"Council|Committee|Party|Records|Airlines|Motors|Systems|Solutions|Technologies|Industries|and Sons"
)
UPPER, WORD = r"[^\W\d_a-zà-öø-ÿ]", r"[^\W\d_]"
CAPITAL = rf"(?:{UPPER}(?:{WORD}|['\u2019-](?={WORD}))*)"
"""A word that begins with an upper-case letter."""
LINK = r"(?:de|da|di|del|della|van|von|der|den|la|le|du|dos|bin|ibn|al|el|of|the|y|e)"
RUN = rf"{CAPITAL}(?:(?: {UPPER}\.)? (?:{LINK} ){{0,2}}{CAPITAL}|\.? (?={UPPER}\.){UPPER}\.)*"
MONTHS = (
    "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?|Oct(?:ober)?|"
    "Nov(?:ember)?|Dec(?:ember)?"
)
ORDINARY = word_list("ordinary")
NATIONS = (
    "Afghan|Albanian|Algerian|American|Angolan|Argentinian|Armenian|Australian|Austrian|Azerbaijani|"
    "Bangladeshi|Belarusian|Belgian|Bolivian|Bosnian|Brazilian|British|Bulgarian|Cambodian|Canadian|Chechen|"
    "Chilean|Chinese|Colombian|Croatian|Cuban|Cypriot|Czech|Danish|Dutch|Egyptian|English|Estonian|Ethiopian|"
    "Filipino|Finnish|French|Georgian|German|Greek|Hungarian|Icelandic|Indian|Indonesian|Iranian|Iraqi|Irish|"
    "Israeli|Italian|Jamaican|Japanese|Jewish|Jordanian|Kazakh|Kenyan|Korean|Kurdish|Latvian|Lebanese|Libyan|"
    "Lithuanian|Malaysian|Mexican|Moroccan|Muslim|Nepalese|Nigerian|Norwegian|Pakistani|Palestinian|Peruvian|"
    "Polish|Portuguese|Romanian|Russian|Saudi|Scottish|Serbian|Slovak|Slovenian|Somali|Spanish|Swedish|Swiss|"
    "Syrian|Taiwanese|Thai|Tunisian|Turkish|Ukrainian|Vietnamese|Welsh|Christian|Catholic"
)
BLOCK = (
    rf"(?:[,\n] ?\s*(?:(?:Suite|Apt\.?|Unit|Box|Floor|PSC|APO|FPO)\s?[\w-]*|{CAPITAL}(?: {CAPITAL})*)?"
    r"(?: ?[A-Z]{2})?(?: ?\d{3,6}(?:[ -]?\d{2,4}|\s?[A-Z]{2})?)?)"
)
"""A further line of an address: part of a building, a place, a postcode."""

GIVEN_NAMES = word_list("given_names")
COUNTRIES = word_list("countries")
SHORT_CAPITALS = 4
HEADLINE = 0.8
ALONE_TITLES = frozenset(TITLES.split("|"))

PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "ADDRESS",
        re.compile(
            rf"(?:\b\d{{1,5}}[A-Za-z]? (?:\d{{1,4}} )?(?:{CAPITAL} ){{1,4}}(?:{STREETS})\b\.?"
            rf"|\b(?:{CAPITAL} ?){{1,3}}(?:{STREETS})\.? ?\d{{1,4}}[a-z]?\b\.?"
            r"|(?:(?<=address is )|(?<=address: )|(?<=[Aa]ddress:\n)|(?<=located at )|(?<=live at )|(?<=lives at )"
            r"|(?<=office is at ))"
            rf"\d{{1,5}}[A-Za-z]? [^\n,.;!?]{{3,40}}"
            rf"|\b\d{{2,5}} (?:{CAPITAL} ?){{1,3}}\d{{0,4}}(?=\s+(?:Suite|Apt))"
            rf"|\b(?:PSC|Unit) \d+, Box \d+|\bP\.?O\.? Box \d+"
            rf"|\b(?:Suite|Apt\.?|Apartment) \d+\w?){BLOCK}{{0,6}}"
        ),
    ),
    ("DATE", re.compile(r"\b\d{4}-\d{2}-\d{2}(?:[ T]\d{2}:\d{2}(?::\d{2})?)?\b|\b\d{1,2}[/.]\d{1,2}[/.]\d{2,4}\b")),
    (
        "DATE",
        re.compile(rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)? )?(?:{MONTHS})\.? \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?\b"),
    ),
    (
        "DATE",
        re.compile(
            r"(?<![\w.,/:#$€£+-])(?:19\d\d|20[0-4]\d)(?![\w%/:-]|[.,]\d)(?! (?:times|items|euros|dollars|words|tokens))"
        ),
    ),
    ("DATE", re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b")),
    (
        "AGE",
        re.compile(
            r"\b\d{1,3}(?=[ -]years?[ -]old)|(?i:(?<=\baged )|(?<=\bage )|(?<=\bage: )|(?<=\bturned )|(?<=\bi'm )"
            r"|(?<=\bi am )|(?<=\bhe was )|(?<=\bshe was ))\d{1,3}(?=[.,!?;)\n ]|$)"
            r"(?! (?:%|percent|minutes|hours|days|km|kg|euros|dollars))"
        ),
    ),
    (
        "POSTCODE",
        re.compile(
            r"(?i:\b(?:zip|post ?code|postal code)(?: code)?(?: is)?:? )(?P<value>\d[\d -]{2,8}\d(?: ?[A-Z]{2}\b)?)"
        ),
    ),
    (
        "LICENCE",
        re.compile(r"(?i:\b(?:licen[cs]e|passport|id|tax) (?:number|no\.?)(?: is)?:? )(?P<value>[A-Z]?\d[\d-]{5,14})"),
    ),
    ("NATIONALITY", re.compile(rf"\b(?:{NATIONS})s?\b", re.I)),
    ("TITLE", re.compile(rf"\b(?:{TITLES})\b\.?(?= {UPPER})")),
    (
        "ORGANIZATION",
        re.compile(rf"\b{RUN}(?:,? (?:{COMPANY})\b\.?|-{CAPITAL})(?:, {CAPITAL} and {CAPITAL})?"),
    ),
    ("ORGANIZATION", re.compile(rf"\b{CAPITAL}, {CAPITAL} and {CAPITAL}\b")),
    ("PERSON", re.compile(rf"\b(?:{TITLES})\b\.? (?P<value>{RUN})")),
    ("PERSON", re.compile(rf"(?:(?<=name is )|(?<=\bI am )|(?<=\bI'm )|(?<=call me )|(?<=named ))(?P<value>{RUN})")),
)
NAME = re.compile(rf"(?<![\w@/.#-]){RUN}(?![\w@/])")
BEGINS = re.compile(r"(?:^|[.!?:\"”»(]\s*|\n\s*|[-*•]\s+)$")
PLACE_BEFORE = re.compile(r"\b(?:in|at|from|near|to|of|visit|visiting|leaving|around|via)\s+(?:the\s+)?$", re.I)


def find_names(text: str) -> list[Span]:
    """Spans of names, places, addresses, dates and ages, by position, none overlapping."""
    found: list[Span] = []
    for kind, pattern in PATTERNS:
        for match in pattern.finditer(text):
            group = "value" if "value" in pattern.groupindex else 0
            _add(found, kind, text, *match.span(group))
    for match in NAME.finditer(text):
        for start, end in _trimmed(text, match.start(), match.end()):
            _add(found, "PLACE" if PLACE_BEFORE.search(text[max(0, start - 24) : start]) else "NAME", text, start, end)
    return sorted(found, key=lambda span: span.start)


def _add(found: list[Span], kind: str, text: str, start: int, end: int) -> None:
    end -= len(text[start:end]) - len(text[start:end].rstrip(" ,\n"))
    if end > start and all(end <= s.start or start >= s.end for s in found):
        found.append(Span(kind, start, end, text[start:end]))


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """A capitalised run without ordinary words at its ends; nothing for a lone word that begins a sentence."""
    if _is_headline(text, start):
        return
    words = [(m.start() + start, m.end() + start) for m in re.finditer(r"\S+", text[start:end])]
    begins = BEGINS.search(text[max(0, start - 4) : start]) is not None
    while words and _is_ordinary(text[slice(*words[0])]):
        words, begins = words[1:], False
    while words and _is_ordinary(text[slice(*words[-1])]):
        words = words[:-1]
    if not words or (begins and len(words) == 1 and not _stands_alone(text, *words[0])):
        return
    yield words[0][0], words[-1][1]


def _is_ordinary(word: str) -> bool:
    """Function words, titles, and abbreviations of up to four capitals."""
    plain = word.strip(".")
    return plain.lower() in ORDINARY or (plain.isupper() and 1 < len(plain) <= SHORT_CAPITALS) or plain in ALONE_TITLES


def _is_headline(text: str, at: int) -> bool:
    """True within a line of six words and more that are nearly all capitalised."""
    begin, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    line = re.split(r"[.?!(),]", text[begin : len(text) if end < 0 else end])
    offset = begin
    for part in line:
        if offset <= at <= offset + len(part):
            words = [word for word in part.split() if word[:1].isalpha()]
            return len(words) >= 6 and sum(word[0].isupper() for word in words) >= HEADLINE * len(words)
        offset += len(part) + 1
    return False


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether a lone word that begins a sentence is a name all the same: known, foreign, or a line of its own."""
    word = text[start:end]
    known = word.lower() in GIVEN_NAMES or word.lower() in COUNTRIES
    return known or not word.isascii() or _is_whole_line(text, start, end)


def _is_whole_line(text: str, start: int, end: int) -> bool:
    """True for a signature: a word with a line of its own, in a text of several."""
    before, after = text[:start].rstrip(" ,"), text[end:].lstrip(" ,")
    return "\n" in text.strip() and (not before or before[-1] == "\n") and (not after or after[0] == "\n")


@cache
def presidio_analyser() -> Any:
    """Presidio with its English language model.

    Raises:
        InputError: presidio or the model is not installed.
    """
    remedy = "pip install 'rayloop[presidio]' and its spaCy model en_core_web_lg, or set builtin"
    try:
        from presidio_analyzer import AnalyzerEngine

        return AnalyzerEngine()
    except (ImportError, OSError, SystemExit) as error:  # spaCy ends the process where it cannot fetch the model
        raise InputError("curation.scrub.names", "presidio", f"is not installed ({error})", remedy) from None


PRESIDIO_KINDS = ("PERSON", "LOCATION", "NRP", "DATE_TIME", "ORGANIZATION")


def find_with_presidio(text: str) -> list[Span]:
    """The same by presidio's named-entity recognition."""
    results = presidio_analyser().analyze(text=text, language="en", entities=list(PRESIDIO_KINDS))
    found: list[Span] = []
    for result in sorted(results, key=lambda r: (-r.score, r.start)):
        _add(found, result.entity_type, text, result.start, result.end)
    return sorted(found, key=lambda span: span.start)
