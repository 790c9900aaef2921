"""Names, places, addresses and dates without a model: shapes, context words and short lists. Off by default.

A capitalised run inside a sentence that is no ordinary word is taken for a name; what stands before and after
it says of what. Parts of one address become one span. That finds most of what people mark, and also marks products
and titles, so it belongs where hiding too much is the smaller harm. For better judgement name presidio
(`curation.scrub.names`, `data.presidio`).
"""

import re
from collections.abc import Iterator

from data.recognisers import Span
from data.wordlists import word_list

ORDINARY, FUNCTION = word_list("ordinary"), word_list("function_words")
TITLES = (
    "Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Sir|Madam|Lady|Lord|Herr|Frau|Monsieur|Madame|Mme|Captain|Reverend|"
    "Judge|President|Minister"
)
STREETS = (
    r"[Ss]treets?|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Squares|Way|Terrace|"
    r"Highway|Hwy|Parkway|Pkwy|Crescent|Close|Alley|Circle|Row|Quay|Route|Rte|Trail|Mews|Hill|Gardens?|"
    r"\w*(?:stra(?:ß|ss)e|str\.|gasse|weg|platz|allee|gatan|vägen|gata|veien|vej|gade|straat|laan|plein|katu|tie)|"
    r"utca|[uú]tja|[uú]t|u\.|tér|ulica|ul\.|[Rr]ue|[Vv]ia|[Cc]alle|[Aa]venida|[Pp]laza|[Pp]iazza"
)
STREETS_FIRST = (
    r"(?i:rua|rue|calle|via|viale|corso|paseo|avda\.|av\.|avenida|avenue|boulevard|plaza|piazza|praça|place|ul\.|ulica"
    r"|trg|chaussée|chemin|carrer)"
)
"""Kinds of street that stand before the name."""
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
PERSON_VERBS = (
    "lives|lived|spent|said|says|told|thinks|wants|asked|wrote|married|moved|studied|was born|had given|is from|and I"
)
"""What a lone word at the beginning of a sentence does that people do."""
NO_NAME = "|".join(sorted(ORDINARY | FUNCTION | {"wrong", "missing", "hidden", "unknown"}))
NAME_WORD = rf"(?!(?:{NO_NAME})\b)[^\W\d_]{{2,}}"
MONTHS = (
    "Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?|Oct(?:ober)?|"
    "Nov(?:ember)?|Dec(?:ember)?"
)
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
HOUSE = r"\d{3,5}"
UNIT = r"(?i:suite|apt\.?|apartment|st\b|street)"
BLOCK = (
    rf"(?:[,\n] ?\s*(?:(?:Suite|Apt\.?|Unit|Box|Floor|PSC|APO|FPO)\s?[\w-]*|{CAPITAL}(?: {CAPITAL})*)?"
    r"(?: ?[A-Z]{2})?(?: ?\d{3,6}(?:[ -]?\d{2,4}|\s?[A-Z]{2})?)?)"
)
"""A further line of an address: part of a building, a place, a postcode."""

GAP = re.compile(rf"(?:[ ,.\n]+(?:\d{{1,6}}|[A-Z]{{2,3}}|{LINK}))*[ ,.\n]+")
"""What may stand between two parts of one address."""
NUMBERS_BEFORE = re.compile(r"(?<![\w.,-])(?:\d{1,5} ){1,2}$")
POSTCODE_AFTER = re.compile(r"(?:,? [A-Z]{2})?,?[ \n]+\d{4,6}\b|,? [A-Z]{2}\b(?![\w'])")
ADDRESS_PARTS = frozenset({"ADDRESS", "PLACE", "NAME", "NATIONALITY"})

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
    (
        "ADDRESS",
        re.compile(
            rf"\b{STREETS_FIRST} (?:{LINK} ){{0,2}}{CAPITAL}(?: (?:{LINK} )?{CAPITAL}){{0,3}} \d{{1,4}}\b"
            rf"|\b\d{{1,5}}(?: \d{{1,4}})? {STREETS_FIRST} (?:{LINK} ){{0,2}}{CAPITAL}(?: {CAPITAL})*"
            r"|\b(?:Unit|PSC|CMR) \d+,? Box \d+|\b[ADF]PO,? A[AEP] \d{5}\b"
            rf"|\b(?!(?:19|20)\d\d ){HOUSE} (?:{CAPITAL} ){{1,3}}\d{{1,4}}(?=[\n,.]| {UNIT}|$)"
            rf"|\b{HOUSE} (?:\d{{1,4}} )?(?:{WORD}+ ){{1,4}}(?:\d{{1,4}} )?(?i:suite|apt\.?) \d+"
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
    (
        "PLACE",
        re.compile(
            r"\b(?:New Zealand|South Africa|South Sudan|(?:North|South) Korea|Saudi Arabia|Costa Rica|Sri Lanka"
            r"|El Salvador|San Marino|Sierra Leone|Puerto Rico|United (?:Kingdom|States|Arab Emirates)|Papua New Guinea"
            r"|(?:Czech|Dominican) Republic|Ivory Coast|Cape Verde|Burkina Faso)\b"
        ),
    ),
    ("NATIONALITY", re.compile(rf"\b(?:{NATIONS})s?\b", re.I)),
    ("TITLE", re.compile(rf"\b(?:{TITLES}|(?:mr|mrs|ms|dr)(?=\.))\b\.?(?= {UPPER})")),
    ("ORGANIZATION", re.compile(rf"\b{CAPITAL}, {CAPITAL} and {CAPITAL}(?: (?:{COMPANY}))?\b")),
    (
        "ORGANIZATION",
        re.compile(rf"\b{RUN}(?:,? (?:{COMPANY})\b\.?|-{CAPITAL})(?:, {CAPITAL} and {CAPITAL})?"),
    ),
    ("ORGANIZATION", re.compile(r"\b[^\W_][\w&-]*(?: [\w&-]+)? (?:inc|llc|ltd|gmbh|plc)\b\.?")),
    ("PERSON", re.compile(rf"\b(?:{TITLES}|(?:mr|mrs|ms|dr)(?=\.))\b\.? (?P<value>{RUN})")),
    ("PERSON", re.compile(rf"(?:^|[.!?] |\n)(?P<value>{CAPITAL})(?= (?:{PERSON_VERBS})\b)")),
    (
        "PERSON",
        re.compile(rf"(?:^|[.!?] |\n)(?P<value>{CAPITAL})(?=, (?:can|could|will|would) (?:you|I|we)\b|, please\b)"),
    ),
    ("PERSON", re.compile(rf"(?:(?<=name is )|(?<=\bI am )|(?<=\bI'm )|(?<=call me )|(?<=named ))(?P<value>{RUN})")),
    ("PERSON", re.compile(rf"\b(?i:my|his|her|whose|maiden) name is (?P<value>{NAME_WORD}(?: {NAME_WORD}){{0,2}})\b")),
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
            if kind != "PERSON" or not _is_ordinary(match[group]):
                add_span(found, kind, text, *match.span(group))
    for match in NAME.finditer(text):
        for start, end in _trimmed(text, match.start(), match.end()):
            add_span(
                found, "PLACE" if PLACE_BEFORE.search(text[max(0, start - 24) : start]) else "NAME", text, start, end
            )
    return _whole_addresses(text, sorted(found, key=lambda span: span.start))


def _whole_addresses(text: str, found: list[Span]) -> list[Span]:
    """Parts of one address as one span: what only blanks, commas, numbers and short codes keep apart."""
    joined: list[Span] = []
    for span in found:
        last = joined[-1] if joined else None
        if last is not None and _belong_together(text, last, span):
            joined[-1] = Span("ADDRESS", last.start, span.end, text[last.start : span.end])
        else:
            joined.append(span)
    edges = [0, *(span.end for span in joined)], [*(span.start for span in joined), len(text)][1:]
    bounds = zip(joined, *edges, strict=False)
    return [_with_numbers(text, s, low, high) if s.kind == "ADDRESS" else s for s, low, high in bounds]


def _belong_together(text: str, left: Span, right: Span) -> bool:
    gap = text[left.end : right.start]
    if "ADDRESS" not in (left.kind, right.kind) or not {left.kind, right.kind} <= ADDRESS_PARTS:
        return False
    if left.kind != "ADDRESS" and ("\n" in gap or "." in gap):  # a line or a sentence before is somebody's name
        return False
    return GAP.fullmatch(gap) is not None and ". " not in gap


def _with_numbers(text: str, span: Span, low: int, high: int) -> Span:
    """An address with the house number before it and the postcode behind it, between its neighbours."""
    before = NUMBERS_BEFORE.search(text[max(low, span.start - 16) : span.start])
    after = POSTCODE_AFTER.match(text, span.end, high)
    start = span.start - (len(before[0]) if before else 0)
    end = after.end() if after else span.end
    return Span(span.kind, start, end, text[start:end])


def add_span(found: list[Span], kind: str, text: str, start: int, end: int) -> None:
    """Adds a span unless it overlaps one that is there; blanks and commas at its end stay outside."""
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
    return (
        plain.lower() in ORDINARY
        or plain.lower() in FUNCTION
        or (plain.isupper() and 1 < len(plain) <= SHORT_CAPITALS)
        or plain in ALONE_TITLES
    )


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
