"""What a search found: read, printed, logged and exported."""
