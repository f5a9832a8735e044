"""Paths that processes in other folders are given, and what stands where below the storage path."""

from __future__ import annotations

from pathlib import Path

DATABASE_FILE, ARTIFACTS_FOLDER = "mlflow.db", "mlflow-artifacts"
"""MLflow's, beside the run folders."""
SPEEDS_FOLDER = "speeds"
"""How fast trainings were, beside the run folders."""
LOCK_FILE = "driver.lock"
"""In a run folder: who drives it."""


def absolute(path: Path | None) -> Path | None:
    """The same file for a process in another folder."""
    return None if path is None else path.expanduser().absolute()


def database_uri(storage: Path) -> str:
    """The tracking database in a storage folder."""
    return f"sqlite:///{storage / DATABASE_FILE}"
