"""An engine behind OpenAI's API: requests are read and bounded here, and nothing unread reaches the engine."""
