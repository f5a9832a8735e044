"""Images, embeddings, clusterings, detectors and features: made once, and kept."""
