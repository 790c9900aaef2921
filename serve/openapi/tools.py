"""The tool server, an application beside the router at `/tools`."""

from serve.openapi.shapes import (
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    WHOLE,
    Schema,
    answered,
    as_json,
    closed,
    in_header,
    in_path,
    listed,
    maybe,
    of_model,
    operation,
    ref,
)
from serve.tools.call import MCP_PATH, PATH, Call

MOUNTED = [{"url": "/tools"}]
"""Where the application is, from the address of the router."""
REFUSED = ("404", "405", "409", "422", "500", "504")
CALLED = (
    "`GET /v1/tools` has the schema of each tool's arguments and of its result. What stands beside `arguments` says "
    "which trajectory the call belongs to."
)
SPOKEN = "The same tools over MCP (streamable HTTP, stateless): one JSON-RPC message, one JSON answer."
KEY = "Where the tool writes: a call that is sent again under the same key gets the first one's answer."


def paths(shared: Schema) -> Schema:
    """The list, a call, and MCP; the tools themselves are each installation's own, and its server lists them."""
    shared["ToolCall"] = of_model(Call, shared)
    shared["ToolCall"]["properties"]["arguments"] = OBJECT
    return {
        PATH: {"servers": MOUNTED, "get": _tools()},
        f"{PATH}/{{name}}": {"servers": MOUNTED, "post": _call()},
        MCP_PATH: {"servers": MOUNTED, "post": _mcp()},
    }


def _tools() -> Schema:
    function = closed({"name": TEXT, "description": TEXT, "parameters": OBJECT})
    tool = closed({"type": {"const": "function"}, "function": function, "output": OBJECT, "writes": FLAG})
    return operation("tools", "The tools that may be called.", answered("Their schemas.", listed(tool)))


def _call() -> Schema:
    result = closed({"object": {"const": "tool.result"}, "name": TEXT, "result": {}})
    return operation(
        "call_tool",
        "Call a tool.",
        answered("What it gave.", result),
        refused=REFUSED,
        body=as_json({"$ref": "#/components/schemas/ToolCall"}),
        parameters=[in_path("name", "The tool."), in_header("idempotency-key", KEY, 128)],
        description=CALLED,
    )


def _mcp() -> Schema:
    version: Schema = {"const": "2.0"}
    message = {
        "type": "object",
        "properties": {"jsonrpc": version, "id": {"anyOf": [TEXT, WHOLE]}, "method": TEXT, "params": OBJECT},
        "required": ["jsonrpc", "method"],
    }
    error = {"type": "object", "properties": {"code": NUMBER, "message": TEXT}, "required": ["code", "message"]}
    answer = {
        "type": "object",
        "properties": {"jsonrpc": version, "id": maybe({"anyOf": [TEXT, WHOLE]}), "result": OBJECT, "error": error},
        "required": ["jsonrpc"],
    }
    described = operation(
        "mcp", "Speak MCP.", answered("Its answer.", answer), refused=("405",), body=as_json(message),
        description=SPOKEN,
    )  # fmt: skip
    either = {"anyOf": [answer, ref("Error")]}
    described["responses"] |= {
        "202": {"description": "A notification, which has no answer."},
        "400": answered("No JSON-RPC message.", either),
        "406": answered("The client takes no JSON.", answer),
        "415": answered("The body is of another content type or encoding.", either),
    }
    return described
