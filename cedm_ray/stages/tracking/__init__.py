"""MLflow: what it is told, once each, and the pages that people open."""
