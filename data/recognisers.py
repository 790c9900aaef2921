"""Recognisers of structured personal data and secrets: a pattern, and a check that confirms it.

In order of precedence: where two matches overlap, the earlier recogniser has it. Each has a hint, a
cheap pattern; one pass looks for all hints, so clean text costs little (`data.prefilter`).
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from data.prefilter import Prefilter

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
    """A pattern over bytes, in the syntax Hyperscan and `re` share; a text without it cannot match."""
    check: Check | None = None


def find(text: str, *, domains: bool = True) -> list[Span]:
    """All spans of personal data and secrets, by position, none overlapping."""
    (mask,) = prefilter().masks([text.encode("utf-8", "surrogatepass")])
    return find_among(text, mask, domains=domains)


@cache
def prefilter() -> Prefilter:
    """The hints of all recognisers, compiled once a process."""
    return Prefilter([recogniser.hint for recogniser in RECOGNISERS])


def find_among(text: str, mask: int, *, domains: bool = True) -> list[Span]:
    """`find` with the recognisers of a mask only: bit `i` stands for `RECOGNISERS[i]`."""
    spans: list[Span] = []
    for number, recogniser in enumerate(RECOGNISERS):
        if not mask >> number & 1 or (recogniser.kind == "DOMAIN" and not domains):
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
    r"\.?[^.?!]{0,32}$",
    re.IGNORECASE,
)
PHONE_SHAPE = re.compile(
    r"(?:\+\d[\d ().\-]{6,}|00[1-9][\d ().\-]{7,})(?:\s?(?:x|ext\.?)\s?\d{1,6})?"  # international
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


IBAN_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "PT ST", 26: "IS TR", 27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA",
    30: "JO KW MU", 31: "MT SC", 32: "LC",
}  # fmt: skip
"""Characters of an IBAN by country (the SWIFT registry)."""


def _iban_shapes() -> str:
    """Each country's code, two digits, and as many more characters as its IBANs have, single blanks allowed."""
    shapes = (
        rf"(?:{'|'.join(countries.split())})\d\d(?: ?[A-Z0-9]){{{length - 4}}}"
        for length, countries in IBAN_LENGTHS.items()
    )
    return "|".join(shapes)


PROVIDERS: dict[str, tuple[str, str]] = {
    "OpenAI, Anthropic, OpenRouter": (r"sk-", r"sk-(?:ant-|proj-|or-v1-|svcacct-|live-)?[A-Za-z0-9_-]{16,}"),
    "AWS": (r"A[KSGIRBC][IPDOC]A", r"(?:AKIA|ASIA|AGPA|AIDA|AROA|AIPA|ABIA|ACCA)[0-9A-Z]{16}"),
    "Google": (r"AIza", r"AIza[0-9A-Za-z_-]{35}"),
    "Google OAuth": (r"ya29|GOCSPX", r"ya29\.[0-9A-Za-z_-]{20,}|GOCSPX-[A-Za-z0-9_-]{28}"),
    "GitHub": (r"gh[pousr]_|github_pat", r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,}"),
    "GitLab": (r"gl[a-z]{2,5}-", r"gl(?:pat|ptt|dt|rt|cbt|agent|oas|soat|ft)-[A-Za-z0-9_-]{20,}(?:\.[0-9a-z.]{9,12})?"),
    "Slack": (r"xox|xapp", r"xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}"),
    "Slack webhook": (r"hooks\.slack", r"hooks\.slack\.com/services/T[A-Z0-9]+/B[A-Z0-9]+/[A-Za-z0-9]{16,}"),
    "Stripe": (r"[sprk]k_|whsec", r"(?:sk|pk|rk|whsec)_(?:live_|test_)?[A-Za-z0-9]{16,}"),
    "Hugging Face": (r"hf_", r"hf_[A-Za-z0-9]{30,}"),
    "npm": (r"npm_", r"npm_[A-Za-z0-9]{36}"),
    "PyPI": (r"pypi-", r"pypi-[A-Za-z0-9_-]{50,}"),
    "RubyGems": (r"rubygems_", r"rubygems_[0-9a-f]{48}"),
    "Docker": (r"dckr_pat", r"dckr_pat_[A-Za-z0-9_-]{20,}"),
    "SendGrid": (r"SG\.", r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    "Twilio": (r"AC[0-9a-f]{8}|SK[0-9a-f]{8}", r"(?:AC|SK)[0-9a-f]{32}"),
    "Mailgun": (r"key-[0-9a-f]", r"key-[0-9a-f]{32}"),
    "Mailchimp": (r"-us[0-9]", r"[0-9a-f]{32}-us[0-9]{1,2}"),
    "Shopify": (r"shp[acps]", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
    "Square": (r"sq0", r"sq0(?:atp|csp|idp)-[A-Za-z0-9_-]{22,}"),
    "DigitalOcean": (r"do[opr]_v1", r"do[opr]_v1_[0-9a-f]{64}"),
    "Databricks": (r"dapi[0-9a-f]", r"dapi[0-9a-f]{32}(?:-[0-9])?"),
    "Nvidia": (r"nvapi", r"nvapi-[A-Za-z0-9_-]{40,}"),
    "Groq": (r"gsk_", r"gsk_[A-Za-z0-9]{40,}"),
    "xAI, Perplexity": (r"xai-|pplx-", r"(?:xai|pplx)-[A-Za-z0-9]{32,}"),
    "Replicate": (r"r8_", r"r8_[A-Za-z0-9]{37}"),
    "Linear": (r"lin_api", r"lin_api_[A-Za-z0-9]{32,}"),
    "Notion": (r"ntn_|secret_", r"ntn_[A-Za-z0-9]{40,}|secret_[A-Za-z0-9]{43}"),
    "Figma": (r"figd_", r"figd_[A-Za-z0-9_-]{30,}"),
    "Airtable": (r"pat[A-Za-z0-9]{14}\.", r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}"),
    "Atlassian": (r"ATATT", r"ATATT3[A-Za-z0-9_=-]{60,}"),
    "Grafana": (r"glsa_|glc_", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}|glc_[A-Za-z0-9+/=]{32,}"),
    "New Relic": (r"NRAK-", r"NRAK-[A-Z0-9]{27}"),
    "Sentry": (r"sntry", r"sntry[su]_[A-Za-z0-9+/=_-]{40,}"),
    "HashiCorp": (r"hv[sb]\.|atlasv1", r"hv[sb]\.[A-Za-z0-9_-]{24,}|[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_-]{60,}"),
    "Doppler": (r"dp\.[a-z]{2}", r"dp\.(?:pt|st|ct|sa|scim|audit)\.[A-Za-z0-9._-]{40,}"),
    "Telegram": (r"[0-9]{8}:A", r"[0-9]{8,10}:A[A-Za-z0-9_-]{33,34}"),
    "Discord": (r"[MNO][A-Za-z0-9_-]{23,27}\.", r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38}"),
    "Postman": (r"PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
    "age": (r"AGE-SECRET", r"AGE-SECRET-KEY-1[0-9A-Z]{58}"),
    "Azure storage": (r"AccountKey", r"AccountKey=[A-Za-z0-9+/=]{40,}"),
    "Rayloop": (r"rl-", r"rl-[A-Za-z0-9_-]{24,}"),
}  # fmt: skip
"""Provider -> (hint, pattern) of its keys and tokens."""
KEYS = "|".join(pattern for _, pattern in PROVIDERS.values())
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
        "|".join(hint for hint, _ in PROVIDERS.values()),
    ),
    Recogniser(
        "SECRET",
        re.compile(
            r"(?:api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|access[_-]?token|auth[_-]?token|passwd|password|pwd"
            r"|authorization: ?(?:bearer|basic)|bearer)[\"']?\s*(?:[:=]|is\b|(?<=bearer)|(?<=basic))\s*[\"']?"
            r"(?P<value>[^\s\"',;<>]{6,})",
            re.I,
        ),
        r"(?i:api[_-]?key|secret|token|passw|pwd|authorization|bearer)",
        _is_assigned_secret,
    ),
    Recogniser(
        "EMAIL",
        re.compile(r"(?<![\w.+%-])[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"),
        r"@",
    ),
    Recogniser(
        "IBAN",
        re.compile(rf"(?<![A-Z0-9])(?:{_iban_shapes()})(?![A-Z0-9])", re.I),
        rf"(?i:{'|'.join(' '.join(IBAN_LENGTHS.values()).split())})[0-9][0-9](?: ?[A-Za-z0-9]){{11}}",
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
            r"(?:(?<=://)|(?<![\w@./-])(?=www\.))"
            r"(?P<value>(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24})(?![\w-])",
            re.I,
        ),
        r"://|(?i:www\.)",
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
