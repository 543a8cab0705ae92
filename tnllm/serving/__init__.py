"""The HTTP server: an engine that batches requests continuously, and OpenAI's API in front of it."""
