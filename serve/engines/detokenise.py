"""From tokens to text as they come: characters whose bytes are split over tokens, and stop strings."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
REPLACEMENT = "\ufffd"


class AnswerText:
    """The text of one growing answer.

    Without stop strings, tokens are decoded only when text is asked for. With them, every push decodes,
    text from a stop string on is dropped, and an end that may still become one is held back.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0  # decoding restarts here: a token's text may depend on the one before it
        self._done = 0  # tokens whose text is in `_text`
        self._text = ""
        self._sent = 0
        self._searched = 0
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> None:
        """Take more tokens."""
        self._ids.extend(token_ids)
        if self._stop and not self.stopped:
            self._advance()
            self._search()

    def take(self, *, final: bool) -> str:
        """Text that is certain since the last call; everything left when `final`."""
        if not self.stopped:
            self._advance(final=final)
            if self._stop:
                self._search()
        end = len(self._text)
        if not final and not self.stopped:
            end -= self._held_back()
        piece = self._text[self._sent : end]
        self._sent = max(end, self._sent)
        return piece

    def _advance(self, *, final: bool = False) -> None:
        if self._done == len(self._ids):
            return
        before = self._decode(self._ids[self._start : self._done])
        after = self._decode(self._ids[self._start :])
        if after.endswith(REPLACEMENT) and not final:
            return  # the last character may be waiting for its other bytes
        self._text += after[len(before) :]
        self._start, self._done = self._done, len(self._ids)

    def _search(self) -> None:
        found = [at for stop in self._stop if (at := self._text.find(stop, max(0, self._searched - len(stop)))) >= 0]
        self._searched = len(self._text)
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class TokenTexts:
    """The text and bytes of single tokens, as OpenAI's log-probs show them."""

    def __init__(self, decode: Decode, to_token: Callable[[int], str | None]) -> None:
        self._decode, self._to_token = decode, to_token
        self._known: dict[int, tuple[str, list[int]]] = {}

    def get(self, token_id: int) -> tuple[str, list[int]]:
        """The token's text, with a replacement character for a part of one, and its bytes."""
        known = self._known.get(token_id)
        if known is None:
            text = self._decode([token_id])
            known = self._known[token_id] = (text, self._bytes(token_id, text))
        return known

    def _bytes(self, token_id: int, text: str) -> list[int]:
        if REPLACEMENT in text:
            token = self._to_token(token_id) or ""
            if token.startswith("<0x") and token.endswith(">"):  # SentencePiece byte fallback
                return [int(token[3:-1], 16)]
            if token and all(c in BYTE_OF_CHARACTER for c in token):
                return [BYTE_OF_CHARACTER[c] for c in token]
        return list(text.encode())


def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()
