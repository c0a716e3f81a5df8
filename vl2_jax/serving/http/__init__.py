"""An engine behind OpenAI's API: requests are read and bounded here, and nothing unread reaches the engine."""

MOST_BODY_BYTES = 32 << 20  # of a request, by default
