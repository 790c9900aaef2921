"""vLLM's own OpenAI server as a supervised child of the replica: continuous batching, many adapters, GPUs."""
