import json
from urllib.parse import parse_qs, urlsplit

import pytest

from cedm_ray.stages.tracking import links

IDS = {"key": "1a2b", "key/trial": "3c4d"}


def query(address: str) -> dict[str, list[str]]:
    """What a browser's router reads of an address behind the #."""
    return parse_qs(urlsplit(links.filled(address, "7", IDS.get).removeprefix("#")).query)


def test_ids_go_into_the_gaps_and_a_run_that_nobody_knows_stays_a_gap() -> None:
    text = (
        f"[a]({links.page('key')}) [b]({links.artifacts('key/trial', 'export/my model.json')}) {links.run_id('other')}"
    )
    kind = "workflowType=machine_learning"
    assert links.filled(text, "7", IDS.get) == (
        f"[a](#/experiments/7/runs/1a2b?{kind}) "
        f"[b](#/experiments/7/runs/3c4d/artifacts/export/my%20model.json?{kind}) ~run/other~"
    )


def test_a_comparison_names_its_runs_and_the_experiment_as_json() -> None:
    found = query(links.compare(["key", "key/trial"]))
    assert json.loads(found["runs"][0]) == ["1a2b", "3c4d"] and json.loads(found["experiments"][0]) == ["7"]


def test_a_filter_and_an_order_arrive_as_they_were_meant() -> None:
    wanted = f'tags.mlflow.parentRunId = "{links.run_id("key")}" and tags.stage = "upper_bound"'
    found = query(links.runs(wanted, "num_clusters"))
    assert found["searchFilter"] == ['tags.mlflow.parentRunId = "1a2b" and tags.stage = "upper_bound"']
    assert found["orderByKey"] == ["metrics.`num_clusters`"] and found["orderByAsc"] == ["true"]


@pytest.mark.parametrize("charts", [False, True])
def test_a_view_is_called_by_its_name(charts: bool) -> None:
    found = query(links.view("digits-1a2b", charts=charts))
    assert found["viewStateShareKey"] == ["digits-1a2b"] and ("compareRunsMode" in found) == charts


def test_no_address_holds_a_space_or_a_bracket_that_would_end_it_in_markdown() -> None:
    for address in (links.compare(["key"]), links.runs('tags.a = "(b)"', "c"), links.picture("key", "a b(1).png")):
        assert not set(' ()[]"') & set(address)
