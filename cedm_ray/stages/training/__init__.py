"""Trials, from Tune's decisions down to a worker's steps, and their records."""
