"""The HTTP server over an engine: OpenAI's API with its limits, metrics and a chat page."""
