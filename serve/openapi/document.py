"""The document itself, at `/openapi.json`: all that clients may ask of the router, and of grader and tools beside."""

from functools import cache

import orjson

from serve.openapi.shapes import Schema, error, results

PATH = "/openapi.json"


@cache
def document() -> bytes:
    """The document as JSON."""
    return orjson.dumps(build())


def build() -> Schema:
    """The document."""
    from serve.openapi import completions, files, graders, intake, jobs, labels, models, probes, tools, users

    schemas: Schema = {"Error": error(), "Results": results()}
    paths: Schema = {}
    for group in (completions, models, intake, labels, users, files, jobs, graders, tools, probes):
        for path, operations in group.paths(schemas).items():
            paths[path] = paths.get(path, {}) | operations
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rayloop", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }
