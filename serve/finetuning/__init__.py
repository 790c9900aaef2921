"""OpenAI's files and fine-tuning API (training.md): what it says over HTTP, and who starts the jobs."""
