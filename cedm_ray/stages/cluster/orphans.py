"""Room on the cluster that a training still holds although all its processes are dead.

Ray gives a placement group back when the job ends, not when the process ends that asked for it; Ray Train's own cleaner
knows a group only once all workers have started. A controller that is killed before, or together with the cleaner,
would keep its share of the cluster from all trainings that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.state import list_actors

LOOK_EVERY_S = 30.0
"""Between two looks; a group without a process at two of them in a row is removed."""
MOST_ACTORS = 10_000

Group = Mapping[str, Any]


class Orphans:
    """Finds the groups of this job's trainings that nobody is in or about to be, and gives them back.

    Args:
        bundle: What one worker of a training asks for; groups of anything else are others' (Tune's among them).
        groups: Lists the job's groups as ``placement_group_table`` does, by their hexadecimal ids.
        taken: Lists the ids of groups that actors of the job are in, or are to start in.
        remove: Gives a group back.
    """

    def __init__(
        self,
        bundle: Mapping[str, float],
        groups: Callable[[], Mapping[str, Group]] | None = None,
        taken: Callable[[], Iterable[str]] | None = None,
        remove: Callable[[str], None] | None = None,
    ) -> None:
        self._bundle = {name: float(much) for name, much in bundle.items() if much}
        self._groups, self._taken, self._remove = groups or _groups, taken or _taken, remove or _remove
        self._suspects: frozenset[str] = frozenset()
        self._looked_s: float | None = None

    def freed(self, now_s: float) -> int:
        """Look, where it is time to, and give back what nobody was in the last time either; returns how many."""
        if self._looked_s is not None and now_s - self._looked_s < LOOK_EVERY_S:
            return 0
        self._looked_s = now_s
        try:
            held = frozenset(group for group, facts in self._groups().items() if self._is_training(facts))
            empty = held.difference(self._taken()) if held else held
        except Exception:  # of several kinds, by what is in the way; an answer that does not come says nothing
            self._suspects = frozenset()
            return 0
        freed = [group for group in empty & self._suspects if self._given_back(group)]
        self._suspects = empty.difference(freed)
        return len(freed)

    def _given_back(self, group: str) -> bool:
        try:
            self._remove(group)
        except Exception:  # as above; the next look comes upon it again
            return False
        return True

    def _is_training(self, group: Group) -> bool:
        bundles = [{name: much for name, much in each.items() if much} for each in group["bundles"].values()]
        return group["state"] == "CREATED" and all(bundle == self._bundle for bundle in bundles)


def _groups() -> dict[str, Group]:
    job = ray.get_runtime_context().get_job_id()  # a group's id ends with its job's
    return {group: facts for group, facts in placement_group_table().items() if group.endswith(job)}


def _taken() -> list[str]:
    context = ray.get_runtime_context()
    actors = list_actors(
        address=context.gcs_address,  # of several Rays on a machine it does not know which one is meant
        filters=[("job_id", "=", context.get_job_id()), ("state", "!=", "DEAD")],
        detail=True,
        limit=MOST_ACTORS,
    )
    return [actor.placement_group_id for actor in actors if actor.placement_group_id]


def _remove(group: str) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
