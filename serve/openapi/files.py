"""Files to fine-tune on."""

from serve.finetuning.files_http import FORM_FIELDS, MAX_PAGE, PURPOSE
from serve.openapi.shapes import (
    TEXT,
    WHOLE,
    Schema,
    answered,
    closed,
    in_path,
    in_query,
    maybe,
    operation,
    page,
    ref,
)

FILES, FILE, CONTENT = "/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"
NAMED = [in_path("file_id", "Its id.")]
FORM = {
    "file": {"type": "string", "format": "binary", "description": "JSON lines, each in the format of one method."},
    "purpose": {"const": PURPOSE},
}


def paths(shared: Schema) -> Schema:
    """The routes of files."""
    shared["File"] = _file()
    shared["DeletedFile"] = closed({"id": TEXT, "object": {"const": "file"}, "deleted": {"const": True}})
    return {
        FILES: {"get": _listed(), "post": _upload()},
        FILE: {"get": _retrieved(), "delete": _deleted()},
        CONTENT: {"get": _content()},
    }


def _upload() -> Schema:
    form = {"multipart/form-data": {"schema": closed({name: FORM[name] for name in FORM_FIELDS})}}
    return operation(
        "upload_file",
        "Send a file; every line of it is checked.",
        answered("The file.", ref("File")),
        body=form,
    )


def _listed() -> Schema:
    number = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}
    parameters = [
        in_query("limit", number, "So many at most."),
        in_query("order", {"enum": ["desc", "asc"]}, "By the time of upload."),
        in_query("purpose", TEXT, "Only files for this."),
        in_query("after", TEXT, "The id that the page begins behind."),
    ]
    answer = answered("One page.", page(ref("File")))
    return operation("files", "List files.", answer, refused=("400", "404"), parameters=parameters)


def _retrieved() -> Schema:
    answer = answered("The file.", ref("File"))
    return operation("file", "See what a file is.", answer, refused=("404", "405"), parameters=NAMED)


def _deleted() -> Schema:
    return operation(
        "delete_file",
        "Forget a file; a dataset that was made of it stays.",
        answered("It is gone.", ref("DeletedFile")),
        refused=("404", "405"),
        parameters=NAMED,
    )


def _content() -> Schema:
    bytes_: Schema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    answer = {"description": "The bytes as they were sent.", "content": bytes_}
    return operation("file_content", "Have a file back.", answer, refused=("404",), parameters=NAMED)


def _file() -> Schema:
    return closed(
        {
            "id": TEXT,
            "object": {"const": "file"},
            "bytes": WHOLE,
            "created_at": WHOLE,
            "expires_at": maybe(WHOLE),
            "filename": TEXT,
            "purpose": TEXT,
            "status": {"const": "processed"},
            "status_details": maybe(TEXT),
        }
    )
