"""Ends a Tune run when a disk cannot be written, instead of letting trial after trial fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cedm_ray.stages.storage.disk_faults import DiskFaultError, fault_in_text, find_fault
from cedm_ray.stages.training.driver_only import DriverCallback


class StorageWatch(DriverCallback):
    """Stands before another callback, which never hears of a trial that failed for want of a disk.

    The trial's record stays as it was, so that the same command goes on from its newest checkpoint.

    Args:
        storage: The storage path.
        told: Hears the rest.
    """

    def __init__(self, storage: Path, told: DriverCallback) -> None:
        self._storage, self._told = storage, told
        self._held: Exception | None = None

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._held is not None:
            raise self._held

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._told.on_trial_start(iteration, trials, trial, **info)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._told.on_trial_result(iteration, trials, trial, result, **info)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        try:
            self._told.on_trial_complete(iteration, trials, trial, **info)
        except Exception as error:
            if find_fault(error) is None:
                raise
            self._held = error  # Tune would take it for a failure of the trial, or for nothing

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._look(trial)
        self._told.on_trial_recover(iteration, trials, trial, **info)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._look(trial)
        self._told.on_trial_error(iteration, trials, trial, **info)

    def _look(self, trial: Any) -> None:
        """Tune passes on what a callback raises here, and ends.

        Raises:
            DiskFaultError: If a disk is behind the trial's error.
        """
        file = Path(trial.error_file or "")
        fault = fault_in_text(file.read_text(errors="replace")) if file.is_file() else None
        if fault is not None and fault.concerns(self._storage):
            raise DiskFaultError(fault)
