"""Recognisers of structured personal data and secrets: a pattern, and a check that confirms it.

In order of precedence: where two matches overlap, the earlier recogniser has it. Each has a hint, a
cheap test of the whole text, so that clean text costs one pass.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

Check = Callable[[re.Match[str]], bool]


@dataclass(frozen=True, slots=True)
class Span:
    """A match in a text: `text[start:end] == value`."""

    kind: str
    start: int
    end: int
    value: str


@dataclass(frozen=True, slots=True)
class Recogniser:
    """One kind of data. Group `value`, where the pattern has it, is what is replaced."""

    kind: str
    pattern: re.Pattern[str]
    hint: str
    """RE2 pattern; a text without it cannot match."""
    check: Check | None = None


def find(text: str, *, domains: bool = True) -> list[Span]:
    """All spans of personal data and secrets, by position, none overlapping."""
    spans: list[Span] = []
    for recogniser in RECOGNISERS:
        if recogniser.kind == "DOMAIN" and not domains:
            continue
        for match in recogniser.pattern.finditer(text):
            if recogniser.check is not None and not recogniser.check(match):
                continue
            group = "value" if "value" in recogniser.pattern.groupindex else 0
            start, end = match.span(group)
            if all(end <= s.start or start >= s.end for s in spans):
                spans.append(Span(recogniser.kind, start, end, match[group]))
    return sorted(spans, key=lambda span: span.start)


def luhn(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1)."""
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def iban_valid(iban: str) -> bool:
    """The check digits of an IBAN (ISO 13616): the number it spells is 1 modulo 97."""
    plain = re.sub(r"\s", "", iban).upper()
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def entropy_bits(word: str) -> float:
    """Shannon entropy a character."""
    counts = Counter(word).values()
    return -sum(n / len(word) * math.log2(n / len(word)) for n in counts)


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _is_card(match: re.Match[str]) -> bool:
    digits = _digits(match[0])
    if not 12 <= len(digits) <= 19 or not luhn(digits):
        return False
    if len(digits) == 12:
        return re.match(r"50|5[6-8]|6", digits) is not None
    return re.match(r"[3-6]|2[2-7]|1800|2131", digits) is not None


def _is_iban(match: re.Match[str]) -> bool:
    return iban_valid(match[0])


def _is_ip(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return address.version == 4 or len(_digits(match[0])) > 0


def _is_ssn(match: re.Match[str]) -> bool:
    area, group, serial = re.split(r"[- ]", match[0])
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


PHONE_CONTEXT = re.compile(
    r"\b(?:phone|mobile|cell|tel|fax|desk|call|dial|reach|contact|sms|whatsapp|answering|messages?)\w*\b"
    r"[^.?!]{0,32}$",
    re.IGNORECASE,
)
PHONE_SHAPE = re.compile(
    r"\+\d[\d ().\-]{6,}"  # international
    r"|00[1-9][\d ().\-]{7,}"
    r"|\(?[2-9]\d\d\)?[ .\-]?[2-9]\d\d[.\- ]\d{4}(?:\s?(?:x|ext\.?)\s?\d{1,6})?"  # North America
    r"|0\d{1,4}[ .\-]\d{2,4}(?:[ .\-]\d{2,4}){1,3}"  # national, with its leading zero
    r"|0\d{2,4}[ \-]\d{6,8}"
    r"|\(\d{1,4}\) ?\d{3,4}[ \-]\d{3,4}"
)


def _is_phone(match: re.Match[str]) -> bool:
    value = match["value"]
    if not 7 <= len(_digits(re.split(r"x|ext", value)[0])) <= 15:
        return False
    if PHONE_SHAPE.fullmatch(value):
        return True
    before = match.string[max(0, match.start("value") - 48) : match.start("value")]
    return PHONE_CONTEXT.search(before) is not None


def _is_assigned_secret(match: re.Match[str]) -> bool:
    """Not a placeholder, and not a plain word such as `password: required`."""
    value = match["value"]
    return not value.startswith(("<", "*", "$", "{")) and not value.isalpha()


KEYS = "|".join(
    [
        r"sk-(?:ant-|proj-|or-v1-|svcacct-|live-)?[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic, OpenRouter
        r"(?:AKIA|ASIA|AGPA|AIDA|AROA)[0-9A-Z]{16}",  # AWS
        r"AIza[0-9A-Za-z_-]{35}",  # Google
        r"ya29\.[0-9A-Za-z_-]{20,}",
        r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,}",
        r"glpat-[A-Za-z0-9_-]{20,}",  # GitLab
        r"xox[abeprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}",  # Slack
        r"(?:sk|pk|rk|whsec)_(?:live_|test_)?[A-Za-z0-9]{16,}",  # Stripe
        r"hf_[A-Za-z0-9]{30,}",  # Hugging Face
        r"npm_[A-Za-z0-9]{36}",
        r"pypi-[A-Za-z0-9_-]{50,}",
        r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",  # SendGrid
        r"(?:AC|SK)[0-9a-f]{32}",  # Twilio
        r"key-[0-9a-f]{32}",  # Mailgun
        r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",  # Shopify
        r"do[op]_v1_[0-9a-f]{64}",  # DigitalOcean
        r"nvapi-[A-Za-z0-9_-]{40,}",
        r"gsk_[A-Za-z0-9]{40,}",
        r"lin_api_[A-Za-z0-9]{32,}",
        r"AccountKey=[A-Za-z0-9+/=]{40,}",  # Azure storage
        r"rl-[A-Za-z0-9_-]{24,}",  # Rayloop
    ]
)
BARE_DOMAINS = (
    "com|net|org|edu|gov|mil|int|info|biz|io|co|dev|app|ai|cloud|xyz|online|site|shop|eu|uk|us|ca|de|fr|it|"
    "es|pt|nl|be|ch|at|dk|se|no|fi|ie|cz|sk|hu|ro|bg|gr|lt|lv|ee|lu|hr|si|ru|ua|tr|il|in|cn|jp|kr|tw|hk|sg|"
    "au|nz|za|br|mx|ar|cl"
)
"""Endings of bare host names; usual endings of files (`.py`, `.rs`, `.sh`, `.pl`) are not here."""

RECOGNISERS: tuple[Recogniser, ...] = (
    Recogniser(
        "PRIVATE_KEY",
        re.compile(
            r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?"
            r"-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----",
            re.S,
        ),
        r"PRIVATE KEY",
    ),
    Recogniser(
        "JWT",
        re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
        r"eyJ",
    ),
    Recogniser(
        "CREDENTIAL_URL",
        re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>]*:[^\s/@\"'<>]+@[^\s\"'<>]+", re.I),
        r"://[^/]*@",
    ),
    Recogniser(
        "API_KEY",
        re.compile(rf"(?<![A-Za-z0-9_-])(?:{KEYS})(?![A-Za-z0-9])"),
        r"sk-|A[KSGIR][IPDO]A|AIza|ya29|gh[pousr]_|github_pat|glpat|xox|xapp|[sprk]k_|whsec|hf_|npm_|pypi-|SG\."
        r"|AC[0-9a-f]|SK[0-9a-f]|key-|shp|do[op]_v1|nvapi|gsk_|lin_api|AccountKey|rl-",
    ),
    Recogniser(
        "SECRET",
        re.compile(
            r"(?:api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|access[_-]?token|auth[_-]?token|passwd|password|pwd"
            r"|authorization: ?(?:bearer|basic)|bearer)[\"']?\s*(?:[:=]|is\b|(?<=bearer)|(?<=basic))\s*[\"']?"
            r"(?P<value>[^\s\"',;<>]{6,})",
            re.I,
        ),
        r"(?i)api[_-]?key|secret|token|passw|pwd|authorization|bearer",
        _is_assigned_secret,
    ),
    Recogniser(
        "EMAIL",
        re.compile(r"(?<![\w.+%-])[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"),
        r"@",
    ),
    Recogniser(
        "IBAN",
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b", re.I),
        r"[A-Za-z]{2}\d{2} ?[A-Za-z0-9]{4}",
        _is_iban,
    ),
    Recogniser(
        "IP",
        re.compile(
            r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"
            r"|(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:]|\.\d))",
            re.I,
        ),
        r"\d\.\d{1,3}\.\d|[0-9a-fA-F]{0,4}:[0-9a-fA-F]{0,4}:",
        _is_ip,
    ),
    Recogniser(
        "CARD",
        re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w-]|\.\d)"),
        r"\d(?:[ -]?\d){11}",
        _is_card,
    ),
    Recogniser(
        "SSN",
        re.compile(r"(?<![\w-])\d{3}([- ])\d{2}\1\d{4}(?![\w-])"),
        r"\d{3}[- ]\d{2}[- ]\d{4}",
        _is_ssn,
    ),
    Recogniser(
        "PHONE",
        re.compile(
            r"(?<![\w.,$€£#=/:-])(?<!\d )(?P<value>(?:\+|\()?\d{1,6}\)?(?:[ .\-]?\(?\d{1,7}\)?){1,6}"
            r"(?:\s?(?:x|ext\.?)\s?\d{1,6})?)(?![\w%]|[.,-]\d)"
        ),
        r"\d[ .()\-\d]{5,}\d",
        _is_phone,
    ),
    Recogniser(
        "DOMAIN",
        re.compile(
            r"(?:(?<=://)|(?<![\w@./-])(?=www\.))(?P<value>(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24})(?![\w-])",
            re.I,
        ),
        r"://|www\.",
    ),
    Recogniser(
        "DOMAIN",
        re.compile(
            rf"(?<![\w@./-])(?:[a-z0-9](?:[a-z0-9-]{{0,61}}[a-z0-9])?\.)+(?:{BARE_DOMAINS})(?![\w(-]|\.\w)",
            re.I,
        ),
        r"\w\.[A-Za-z]{2}",
    ),
)
