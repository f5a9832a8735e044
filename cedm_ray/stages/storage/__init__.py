"""Whole files, checkpoints, the store, and its copy in a bucket."""
