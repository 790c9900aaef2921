"""A server that speaks as much of S3 as storing and reading an object takes."""

import hashlib
from typing import Any
from urllib.parse import unquote

XML = (b"content-type", b"application/xml")
Objects = dict[str, bytes]
"""`bucket/key` -> bytes."""


class S3Double:
    """An ASGI application over `objects`; requests are kept as `METHOD path`."""

    def __init__(self) -> None:
        self.objects: Objects = {}
        self.requests: list[str] = []
        self._parts: dict[str, bytes] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name, method, query = unquote(scope["path"]).strip("/"), scope["method"], scope["query_string"]
        headers = dict(scope["headers"])
        self.requests.append(f"{method} {name}")
        body = await _body(receive)
        if method == "PUT":
            data = _unchunked(body) if b"aws-chunked" in headers.get(b"content-encoding", b"") else body
            store = self._parts if b"partNumber" in query else self.objects
            store[name] = store.get(name, b"") + data if b"partNumber" in query else data
            await _answer(send, 200, b"", [(b"etag", _etag(data))])
        elif method == "POST":
            await self._multipart(send, name, query)
        elif b"list-type" in query:
            await _answer(send, 200, _listing(), [XML])
        elif method == "HEAD" and "/" not in name:  # the bucket
            await _answer(send, 200, b"", [])
        elif name not in self.objects:
            missing = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
            await _answer(send, 404, b"" if method == "HEAD" else missing, [XML])
        else:
            await self._object(send, self.objects[name], method, headers.get(b"range"))

    async def _multipart(self, send: Any, name: str, query: bytes) -> None:
        """An upload in parts begins, or is whole; the parts of one come in order."""
        if query.startswith(b"uploads"):
            begun = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            await _answer(send, 200, begun.encode(), [XML])
            return
        self.objects[name] = self._parts.pop(name)
        whole = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        await _answer(send, 200, whole.encode(), [XML])

    async def _object(self, send: Any, data: bytes, method: str, wanted: bytes | None) -> None:
        headers = [(b"etag", _etag(data)), (b"last-modified", b"Mon, 30 Nov 2026 12:00:00 GMT")]
        if method == "HEAD":
            await _answer(send, 200, b"", [*headers, (b"content-length", b"%d" % len(data))])
            return
        first, last = 0, len(data) - 1
        if wanted is not None:
            first, last = (int(part) for part in wanted.removeprefix(b"bytes=").split(b"-"))
            last = min(last, len(data) - 1)
            headers.append((b"content-range", b"bytes %d-%d/%d" % (first, last, len(data))))
        await _answer(send, 206 if wanted else 200, data[first : last + 1], headers)


async def _body(receive: Any) -> bytes:
    parts = b""
    while True:
        message = await receive()
        parts += message.get("body", b"")
        if not message.get("more_body"):
            return parts


def _unchunked(body: bytes) -> bytes:
    """Without the frames of `aws-chunked`: a length in hexadecimal, the bytes, until a length of 0."""
    data, rest = b"", body
    while rest:
        head, _, rest = rest.partition(b"\r\n")
        length = int(head.split(b";")[0], 16)
        if length == 0:
            break
        data, rest = data + rest[:length], rest[length + 2 :]
    return data


def _etag(data: bytes) -> bytes:
    return b'"' + hashlib.md5(data, usedforsecurity=False).hexdigest().encode() + b'"'


def _listing() -> bytes:
    """Nothing below any prefix: there are no folders here."""
    return (
        b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys>'
        b"<IsTruncated>false</IsTruncated></ListBucketResult>"
    )


async def _answer(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    if not any(name == b"content-length" for name, _ in headers):
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
