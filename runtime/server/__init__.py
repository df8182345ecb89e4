"""The HTTP server: OpenAI's interface over an engine (extra `server`)."""
