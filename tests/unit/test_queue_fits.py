"""What a job asks for, and whether a cluster could ever hold it: asked of the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from queue_site import Site

from manta.cluster.dashboard import Node
from manta.cluster.record import Access, ClusterRecord, Launched
from manta.errors import InputError
from manta.jobs import access, fits, http_api, queries, shape
from manta.jobs.access import Role
from manta.plan.demand import Demand, parse_demand

AWS = """\
cluster_name: c
provider: {type: aws, region: us-west-2}
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 2}, node_config: {InstanceType: m5.large}}
  small: {resources: {CPU: 4}, max_workers: 9, node_config: {InstanceType: m5.xlarge}}
  gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 2, node_config: {InstanceType: g4dn.2xlarge}}
"""


@pytest.fixture
def launched(tmp_path: Path) -> ClusterRecord:
    file = tmp_path / "aws.yaml"
    file.write_text(AWS)
    return ClusterRecord(
        name="c",
        cluster_id="i",
        pid=0,
        gcs_address="",
        dashboard_url="",
        serve_url="",
        token_path="",
        temp_dir="",
        storage_url="",
        started_at="",
        launched=Launched(
            provider="aws",
            source=str(file),
            config=str(file),
            is_up=True,
            access=Access(head="", user="u", key=None),
        ),
    )


def test_the_capacity_of_a_cluster_is_what_it_can_grow_to(launched: ClusterRecord) -> None:
    head = Node(id="n", address="a", state="ALIVE", is_head=True, total={"CPU": 2.0, "extra": 1.0})
    most = fits.capacity(launched, [head])
    assert most["GPU"] == 2
    assert most["CPU"] == 2 + 8 + 8 + 4, "three workers at most"
    assert most["extra"] == 1


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        ('{"GPU": 2}', "asks for {GPU: 2}, the largest has {GPU: 1}"),
        ('STRICT_SPREAD[{"GPU": 1}x3]', "needs 3 nodes"),
        ('PACK[{"GPU": 1}x3]', "all 3 bundles must start together"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_plans_reason(
    launched: ClusterRecord, demand: str, reason: str
) -> None:
    with pytest.raises(InputError) as refused:
        fits.require_possible(launched, parse_demand(demand))
    assert str(refused.value).startswith("cluster `c` can never hold ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("demand", ['PACK[{"GPU": 1}x2]', '{"CPU": 8}x500', '{"GPU": 1}'])
def test_what_can_start_with_a_part_of_it_is_accepted(
    launched: ClusterRecord, demand: str
) -> None:
    fits.require_possible(launched, parse_demand(demand))


def test_a_search_counts_one_trial_and_a_training_all_its_workers() -> None:
    search = Demand(gangs=parse_demand('PACK[{"CPU": 2}]').gangs * 8)
    training = parse_demand('PACK[{"CPU": 2}x8]')
    assert shape.of_demand(search) == '[["CPU", 2.0]]'
    assert shape.of_demand(training) == '[["CPU", 16.0]]'
    assert shape.needs(shape.of_demand(Demand())) == (("slot", 1.0),)


def test_who_can_never_be_held_is_refused_over_http_with_the_same_words(site: Site) -> None:
    client = TestClient(http_api.app(site.state))
    key = {"Authorization": f"Bearer {access.add(site.state, 'ci', Role.SUBMITTER, 'test')}"}
    body = {"id": "a", "entrypoint": "true", "resources": {"num_gpus": 8}}
    answer = client.post("/api/v1/jobs", json=body, headers=key)
    assert answer.status_code == 400
    with pytest.raises(InputError) as told:
        fits.require_possible(site.ray.record, parse_demand('{"GPU": 8}'))
    said = answer.json()
    assert "cluster `local` can never hold {GPU: 8}" in said["error"]
    assert (said["error"], said["fix"]) == (told.value.what, told.value.fix)
    assert queries.listed(site.state) == []
