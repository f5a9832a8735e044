"""The terminal, and what Ctrl-C does."""
