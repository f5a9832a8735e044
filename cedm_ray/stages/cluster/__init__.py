"""Ray: joined or started, its nodes, and how they are divided."""
