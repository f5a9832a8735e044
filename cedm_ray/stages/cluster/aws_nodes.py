"""AWS instances for ``ray up cluster.yaml``: from the spot market, or on demand where that has none."""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

MARKET = "InstanceMarketOptions"
NO_SPOT = frozenset(
    {
        "InsufficientInstanceCapacity",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
    }
)
"""EC2's error codes that say that the spot market has no such instance for this account at present."""

logger = logging.getLogger(__name__)


class SpotElseOnDemand(AWSNodeProvider):
    """Ray's provider for AWS; what every zone's spot market refuses is asked for on demand.

    Ray 2.60 asks for the same node type again and again when EC2 refuses it, so that a second node type for instances
    on demand would never be reached.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start instances; the spot market is asked first where the node type wants it.

        Args:
            node_config: The arguments of EC2's ``run_instances`` from the cluster file.
            tags: Tags of the instances.
            count: Instances to start.

        Returns:
            The instances by their ids.

        Raises:
            NodeLaunchException: If EC2 refuses for another reason, or refuses on demand too.
        """
        try:
            return self._created(node_config, tags, count)
        except NodeLaunchException as error:
            if MARKET not in node_config or error.category not in NO_SPOT:
                raise
            logger.warning("no spot instance is to be had (%s); asking on demand", error.category)
            on_demand = {name: value for name, value in node_config.items() if name != MARKET}
            return self._created(on_demand, tags, count)

    def _created(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        created: dict[str, Any] = super().create_node(node_config, tags, count)
        return created
