"""The tool server: typed Python functions that agents call over HTTP and MCP."""

from serve.tools.registry import Caller, tool

__all__ = ["Caller", "tool"]
