"""Files for the fine-tuning API: kept for their tenant, read in OpenAI's formats, made into datasets."""
