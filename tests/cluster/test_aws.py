"""cluster.yaml on an AWS that runs in this process: what Ray makes of the file, and where instances come from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

from cedm_ray.stages.cluster.aws_nodes import NO_SPOT, SpotElseOnDemand

CLUSTER_FILE = Path(__file__).parents[2] / "cluster.yaml"
REGION = "eu-central-1"
RUN_INSTANCES = "before-call.ec2.RunInstances"
Refuse = Callable[..., list[str]]
TAGS = {"ray-node-type": "worker", "ray-user-node-type": "gpu_worker"}


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The file, filled in, as Ray completes it on AWS: images, subnets, security group, roles, keys."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    with pytest.MonkeyPatch.context() as patch, mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        patch.setenv("HOME", str(home))
        patch.setattr(aws_config.time, "sleep", lambda seconds: None)  # for AWS to spread a new role
        image = boto3.client("ec2", REGION).describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        text = CLUSTER_FILE.read_text().replace("EDIT_REGION", REGION).replace("EDIT_IMAGE_ID", image)
        yield commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)


@pytest.fixture
def provider(resolved: dict[str, Any]) -> SpotElseOnDemand:
    return SpotElseOnDemand(resolved["provider"], resolved["cluster_name"])


@pytest.fixture
def refuse(provider: SpotElseOnDemand) -> Iterator[Refuse]:
    """Has EC2 refuse instances; returns the list that the markets asked for are written to."""
    asked: list[str] = []
    answers: list[Callable[..., None]] = []
    events = provider.ec2_fail_fast.meta.client.meta.events

    def from_now_on(code: str, *, spot_alone: bool) -> list[str]:
        def answer(params: dict[str, Any], **_: Any) -> None:
            asked.append("spot" if "InstanceMarketOptions" in str(params["body"]) else "on demand")
            if asked[-1] == "spot" or not spot_alone:
                raise botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "no"}}, "RunInstances")

        answers.append(answer)
        events.register(RUN_INSTANCES, answer)
        return asked

    yield from_now_on
    for answer in answers:  # Ray keeps one client for all providers
        events.unregister(RUN_INSTANCES, answer)


def markets(created: dict[str, Any]) -> list[str | None]:
    return [instance.instance_lifecycle for instance in created.values()]


def test_aws_completes_the_file(resolved: dict[str, Any]) -> None:
    worker = resolved["available_node_types"]["gpu_worker"]
    assert (worker["resources"]["GPU"], worker["resources"]["CPU"]) == (4, 48)
    assert resolved["available_node_types"]["head"]["resources"]["CPU"] == 0
    groups = {node["node_config"]["SecurityGroupIds"][0] for node in resolved["available_node_types"].values()}
    rules = boto3.client("ec2", REGION).describe_security_groups(GroupIds=list(groups))["SecurityGroups"][0]
    open_to_all = [rule for rule in rules["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]


def test_a_file_that_was_not_filled_in_is_refused_before_anything_is_asked_of_aws() -> None:
    with pytest.raises(botocore.exceptions.InvalidRegionError, match="EDIT_REGION"):
        commands._bootstrap_config(yaml.safe_load(CLUSTER_FILE.read_text()), no_config_cache=True)


def test_workers_come_from_the_spot_market(resolved: dict[str, Any], provider: SpotElseOnDemand) -> None:
    node_config = resolved["available_node_types"]["gpu_worker"]["node_config"]
    assert markets(provider.create_node(node_config, TAGS, 1)) == ["spot"]


@pytest.mark.parametrize("code", sorted(NO_SPOT))
def test_what_the_spot_market_has_not_is_taken_on_demand(
    resolved: dict[str, Any], provider: SpotElseOnDemand, refuse: Refuse, code: str
) -> None:
    asked = refuse(code, spot_alone=True)
    node_config = resolved["available_node_types"]["gpu_worker"]["node_config"]
    assert markets(provider.create_node(node_config, TAGS, 1)) == [None]
    zones = len(node_config["SubnetIds"])
    assert asked[-1] == "on demand" and asked.count("on demand") == 1 and asked.count("spot") >= zones > 1
    assert node_config["InstanceMarketOptions"] == {"MarketType": "spot"}  # the next one is asked for there again


def test_another_reason_is_no_reason_to_pay_more(
    resolved: dict[str, Any], provider: SpotElseOnDemand, refuse: Refuse
) -> None:
    asked = refuse("UnauthorizedOperation", spot_alone=True)
    with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
        provider.create_node(resolved["available_node_types"]["gpu_worker"]["node_config"], TAGS, 1)
    assert set(asked) == {"spot"}


def test_the_head_is_asked_for_on_demand_alone(
    resolved: dict[str, Any], provider: SpotElseOnDemand, refuse: Refuse
) -> None:
    asked = refuse("InsufficientInstanceCapacity", spot_alone=False)
    with pytest.raises(NodeLaunchException, match="InsufficientInstanceCapacity"):
        provider.create_node(resolved["available_node_types"]["head"]["node_config"], TAGS, 1)
    assert set(asked) == {"on demand"} and len(asked) < 10  # once for each zone, not a second round
