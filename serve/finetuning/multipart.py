"""`multipart/form-data` of any size: the body goes to disk as it comes and is taken apart there.

Source: RFC 7578, RFC 2046 section 5.1; quotes in names are escaped as https://html.spec.whatwg.org says.
"""

import asyncio
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from serve.openai import ApiError, ClientGoneError, Receive, Scope, header

CHUNK = 1 << 20
MAX_HEAD = 4096  # bytes of a part's own header


@dataclass(frozen=True)
class Field:
    """One field of a form: where its value lies in the body."""

    name: str
    filename: str | None
    start: int
    end: int


async def body_to_file(receive: Receive, file: BinaryIO, limit: int, timeout_s: float) -> None:
    """Write a request body to a file.

    Raises:
        ApiError: 413 when it becomes longer than `limit` bytes, 408 when it does not come in time.
        ClientGoneError: the client went away before its end.
    """
    length = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                piece: bytes = message.get("body", b"")
                length += len(piece)
                if length > limit:
                    raise ApiError(413, f"The request is longer than {limit} bytes.", code="file_too_large")
                file.write(piece)
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} seconds.", code="body_timeout") from None
    file.flush()


def boundary_of(scope: Scope) -> bytes:
    """The boundary that the request's content type names.

    Raises:
        ApiError: 415 for another content type.
    """
    message = Message()
    message["content-type"] = (header(scope, b"content-type") or b"").decode("latin-1")
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/form-data" or not boundary:
        raise ApiError(415, "Send the file as multipart/form-data.", code="invalid_content_type")
    return b"--" + boundary.encode("latin-1")


def read_fields(path: Path, boundary: bytes) -> dict[str, Field]:
    """The fields of a form in a file, by name.

    Raises:
        ApiError: 400 when it breaks off, a part has no name, or a name comes twice.
    """
    if path.stat().st_size == 0:
        raise _malformed("it is empty")
    fields: dict[str, Field] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        for field in _fields(body, boundary):
            if field.name in fields:
                raise _malformed(f"the field {field.name} comes twice")
            fields[field.name] = field
    return fields


def _fields(body: mmap.mmap, boundary: bytes) -> Iterator[Field]:
    if body[: len(boundary)] != boundary:
        raise _malformed("it does not begin with its boundary")
    place = len(boundary)
    while body[place : place + 2] != b"--":
        head_end = body.find(b"\r\n\r\n", place, place + MAX_HEAD)
        end = body.find(b"\r\n" + boundary, place)
        if body[place : place + 2] != b"\r\n" or head_end < 0 or end < head_end:
            raise _malformed("it breaks off within a part")
        head = message_from_string(body[place + 2 : head_end + 2].decode("utf-8", errors="replace"))
        name = head.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise _malformed("a part has no name")
        filename = head.get_filename()
        yield Field(name, filename.replace("%22", '"') if filename else None, head_end + 4, end)
        place = end + 2 + len(boundary)


def copy_value(path: Path, field: Field, out: BinaryIO) -> None:
    """Write a field's value to another file."""
    with path.open("rb") as file:
        file.seek(field.start)
        left = field.end - field.start
        while left and (piece := file.read(min(CHUNK, left))):
            out.write(piece)
            left -= len(piece)
    out.flush()


def text_value(path: Path, field: Field, limit: int = 256) -> str:
    """A short field as text."""
    with path.open("rb") as file:
        file.seek(field.start)
        return file.read(min(field.end - field.start, limit)).decode("utf-8", errors="replace").strip()


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"The form cannot be read: {reason}.", code="invalid_form")
