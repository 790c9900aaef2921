"""`multipart/form-data` of any size, read by starlette: files go to disk as they come."""

import asyncio

from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from serve.openai import ApiError, ClientGoneError, Receive, Scope, header

MAX_FIELDS = 16


async def read_form(scope: Scope, receive: Receive, limit: int, timeout_s: float) -> FormData:
    """The fields of a form; the caller closes it.

    Raises:
        ApiError: 415 for another content type, 413 for more than `limit` bytes, 408 when it does not come in
            time, 400 when it cannot be read.
        ClientGoneError: the client went away before its end.
    """
    kind = (header(scope, b"content-type") or b"").decode("latin-1")
    if not kind.lower().startswith("multipart/form-data") or "boundary=" not in kind:
        raise ApiError(415, "Send the file as multipart/form-data.", code="invalid_content_type")
    received = 0

    async def counted() -> dict[str, object]:
        nonlocal received
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        received += len(message.get("body", b""))
        if received > limit:
            raise ApiError(413, f"The request is longer than {limit} bytes.", code="file_too_large")
        return dict(message)

    try:
        async with asyncio.timeout(timeout_s):
            form = await Request(dict(scope), counted).form(max_files=1, max_fields=MAX_FIELDS)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} seconds.", code="body_timeout") from None
    except MultiPartException as error:
        raise ApiError(400, f"The form cannot be read: {error.message}", code="invalid_form") from None
    return form
