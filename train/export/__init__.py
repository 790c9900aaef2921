"""A version as files that other tools load: adapter, merged weights, GGUF, Ollama."""
