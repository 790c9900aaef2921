"""`/v1/files`: upload, list, get, content, delete."""

import asyncio
import re
import shutil
from dataclasses import dataclass, field

from starlette.datastructures import FormData, UploadFile

from cluster.settings import Settings
from data.finetuning.rows import check_file
from data.finetuning.uploads import StoredFile, Uploads
from serve.finetuning.form import read_form
from serve.finetuning.objects import Json, file_object, page
from serve.openai import ApiError, Headers, Receive, Scope, Send, header
from serve.query import Query

PURPOSE = "fine-tune"
FORM_FIELDS = ("file", "purpose")
SPARE_BYTES = 1 << 16  # of a form around its file
MAX_PAGE = 10_000
PIECE = 1 << 18
UNNAMED = "upload.jsonl"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(slots=True)
class FileRoutes:
    """The routes of one router; `uploads` is the store of the tenant that asks."""

    settings: Settings
    _uploading: int = field(default=0)

    async def upload(self, uploads: Uploads, scope: Scope, receive: Receive) -> Json:
        """Take in one file; every line of it is checked before it gets an id."""
        limits = self.settings.finetuning
        limit = round(limits.max_file_mb * 2**20) + SPARE_BYTES
        declared = header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise ApiError(413, f"The request is longer than {limit} bytes.", code="file_too_large")
        if self._uploading >= limits.max_uploads_at_once:
            raise ApiError(429, "Too many files are being sent; try again later.", code="overloaded", retry_after_s=5.0)
        self._uploading += 1
        try:
            form = await read_form(scope, receive, limit, limits.upload_timeout_s)
            try:
                stored = await asyncio.to_thread(self._take_in, uploads, form)
            finally:
                await form.close()
        finally:
            self._uploading -= 1
        return file_object(stored)

    def _take_in(self, uploads: Uploads, form: FormData) -> StoredFile:
        given = _fields(form)
        if given["purpose"] != PURPOSE:
            message = f"purpose must be {PURPOSE}, not {str(given['purpose'])[:80]!r}."
            raise ApiError(400, message, code="invalid_value", param="purpose")
        limits, sent = self.settings.finetuning, given["file"]
        if not isinstance(sent, UploadFile):
            raise ApiError(400, "The field file must be a file with a name.", code="invalid_value", param="file")
        with uploads.draft() as (path, file):
            shutil.copyfileobj(sent.file, file, PIECE)
            file.flush()
            checked = check_file(path, min_rows=limits.min_examples, max_rows=limits.max_examples)
            name = CONTROL.sub("", sent.filename or "").replace("%22", '"')  # as the HTML standard escapes it
            return uploads.keep(
                path, name or UNNAMED, PURPOSE, format=checked.format, rows=checked.rows, max_files=limits.max_files
            )

    async def list(self, uploads: Uploads, query: Query) -> Json:
        """One page."""
        limit, order = query.number("limit", MAX_PAGE, MAX_PAGE), query.choice("order", ("desc", "asc"))
        purpose, after = query.text("purpose"), query.text("after")
        found = await asyncio.to_thread(
            lambda: uploads.list(purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc")
        )
        return page([file_object(stored) for stored in found[:limit]], has_more=len(found) > limit)

    async def content(self, uploads: Uploads, file_id: str, send: Send, headers: Headers) -> None:
        """The bytes as they were sent."""
        stored = await asyncio.to_thread(uploads.get, file_id)
        with uploads.path(stored).open("rb") as file:
            head = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % stored.bytes)]
            await send({"type": "http.response.start", "status": 200, "headers": [*head, *headers]})
            while piece := await asyncio.to_thread(file.read, PIECE):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def delete(self, uploads: Uploads, file_id: str) -> Json:
        """Forget it; a dataset that was made of it stays."""
        await asyncio.to_thread(uploads.delete, file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def _fields(form: FormData) -> dict[str, UploadFile | str]:
    """The fields by name: each that is needed, once, and no other."""
    names = [name for name, _ in form.multi_items()]
    for name in names:
        if name not in FORM_FIELDS:
            raise ApiError(400, f"The field {name[:80]} is not supported.", code="invalid_value", param=name[:80])
        if names.count(name) > 1:
            raise ApiError(400, f"The field {name} comes twice.", code="invalid_value", param=name)
    for name in FORM_FIELDS:
        if name not in names:
            raise ApiError(400, f"The field {name} is missing, or breaks off.", code="missing_field", param=name)
    return dict(form.items())
