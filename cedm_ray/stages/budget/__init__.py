"""What a search may train, and what that takes."""
