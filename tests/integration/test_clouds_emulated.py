"""`cluster/gcp.yaml` and `cluster/azure.yaml` through Ray's own launcher and providers.

What this shows: `ray up` and `ray down` as a user runs them, and the workers as the head's
autoscaler starts them, accept the files; what Ray then asks of the cloud; what is left afterwards.
What it does not show: the clouds are emulated (`emulated_clouds`), written after their references,
and Google's and Azure's SDKs are stand-ins (`cloud_sdk`): no URL, credential, quota, image,
machine type or network of a real cloud is tried. An Azure deployment is held to the parameters
that Ray's templates declare, but the templates are not evaluated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from discovery import faults
from emulated_clouds import Azure, Cloud, Google, serving
from ray_launcher import ROOT, Ended, Launcher, launcher

SDK = (sys.executable, str(Path(__file__).with_name("cloud_sdk.py")))
WORKERS = {
    "gcp": ("cpu", "gpu-spot", "gpu", "gpu8", "tpu"),
    "azure": ("cpu", "gpu-spot", "gpu", "gpu8"),
}

DOCUMENTS = {
    "cloudresourcemanager": "cloudresourcemanager.v1.json",
    "compute": "compute.v1.json",
    "iam": "iam.v1.json",
    "tpu": "tpu.v2.json",
}


@dataclass(frozen=True, kw_only=True)
class Story:
    """One cluster from `ray up` to `ray down`, told once for all tests of its cloud."""

    cloud: Cloud
    up: Ended
    ssh_calls: list[str]
    launched: Ended
    down: Ended


@pytest.fixture(scope="module")
def stories() -> Mapping[str, Story]:
    """Both at once: most of their time is Ray waiting for SSH."""
    clouds = {"gcp": Google(), "azure": Azure()}
    with ThreadPoolExecutor() as pool:
        return dict(zip(clouds, pool.map(_told, clouds, clouds.values()), strict=True))


@pytest.fixture
def on_google(stories: Mapping[str, Story]) -> Story:
    return stories["gcp"]


@pytest.fixture
def on_azure(stories: Mapping[str, Story]) -> Story:
    return stories["azure"]


def _told(provider: str, cloud: Cloud) -> Story:
    file = str(ROOT / f"cluster/{provider}.yaml")
    with serving(cloud) as url, _machine(url) as here:
        up = here.run("up", "--yes", file)
        config = here.write("bootstrap.json", json.dumps(here.resolved()))
        launched = here.run("launch", config, *WORKERS[provider])
        down = here.run("down", "--yes", file)
        ssh = here.ssh_calls()
    return Story(cloud=cloud, up=up, ssh_calls=ssh, launched=launched, down=down)


@contextmanager
def _machine(url: str) -> Iterator[Launcher]:
    # The proxy that nobody runs keeps the providers' look at metadata servers from leaving.
    environment = {"EMULATED_CLOUD_URL": url, "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    with launcher(environment, SDK) as here:
        yield here


def node_config(provider: str, node_type: str) -> Any:
    file = ROOT / f"cluster/{provider}.yaml"
    return yaml.safe_load(file.read_text())["available_node_types"][node_type]["node_config"]


# Google


def google_nodes(story: Story) -> dict[str, Any]:
    """The bodies of what was created, by Ray's node type."""
    bodies = [asked["body"] for asked in story.cloud.asked("compute.instances.insert")]
    bodies += [asked["body"] for asked in story.cloud.asked("tpu.projects.locations.nodes.create")]
    return {body["labels"]["ray-user-node-type"]: body for body in bodies}


def test_google_up_starts_the_head_and_gets_as_far_as_ssh(on_google: Story) -> None:
    assert on_google.up.exit_code == 1
    assert "Failed to setup head node." in on_google.up.stderr
    assert " ubuntu@10.1.0.0 " in on_google.ssh_calls[0]


def test_google_starts_every_group_of_the_file(on_google: Story) -> None:
    assert on_google.launched.exit_code == 0, on_google.launched.stderr
    assert google_nodes(on_google).keys() == {"head", *WORKERS["gcp"]}


def test_google_gets_the_files_machines_whole(on_google: Story) -> None:
    """Every key of a node_config arrives as it was written; Ray adds to it."""
    for name, body in google_nodes(on_google).items():
        wanted = dict(node_config("gcp", name))
        if machine := wanted.pop("machineType", None):
            assert body["machineType"] == f"zones/us-central1-a/machineTypes/{machine}"
        account = wanted.pop("serviceAccounts", None)
        if account:
            assert body["serviceAccounts"] == account
        assert body["labels"].items() >= wanted.pop("labels").items()
        assert wanted.items() <= body.items()


def test_google_gives_no_node_a_public_address(on_google: Story) -> None:
    nodes = google_nodes(on_google)
    assert nodes.pop("tpu")["networkConfig"]["enableExternalIps"] is False
    for body in nodes.values():
        assert not [card for card in body["networkInterfaces"] if "accessConfigs" in card]


def test_google_runs_only_the_spot_group_on_spot(on_google: Story) -> None:
    models = {
        name: body.get("scheduling", {}).get("provisioningModel")
        for name, body in google_nodes(on_google).items()
    }
    assert [name for name, model in models.items() if model == "SPOT"] == ["gpu-spot"]


def test_google_gives_the_eight_gpu_group_five_cards_close_to_each_other(on_google: Story) -> None:
    body = google_nodes(on_google)["gpu8"]
    assert [card["nicType"] for card in body["networkInterfaces"]] == ["GVNIC"] * 5
    assert len({card["subnetwork"] for card in body["networkInterfaces"]}) == 5
    assert body["resourcePolicies"][0].endswith("/resourcePolicies/manta-gpu")


def test_google_lets_the_head_alone_start_machines(on_google: Story) -> None:
    """Ray makes one account with these roles; workers run as the file's own."""
    cloud = on_google.cloud
    assert isinstance(cloud, Google)
    (account,) = (item["email"] for item in cloud.accounts.values())
    roles = {binding["role"] for binding in cloud.policy["bindings"]}
    assert roles == {
        "roles/compute.admin",
        "roles/iam.roleViewer",
        "roles/iam.serviceAccountUser",
        "roles/storage.objectAdmin",
        "roles/tpu.admin",
    }
    nodes = google_nodes(on_google)
    assert nodes.pop("head")["serviceAccounts"][0]["email"] == account
    assert account not in json.dumps(nodes)


def test_google_down_leaves_no_machine(on_google: Story) -> None:
    """Left, and free: Ray's service account, its roles, one SSH key in the project's metadata."""
    cloud = on_google.cloud
    assert isinstance(cloud, Google)
    assert on_google.down.exit_code == 0, on_google.down.stderr
    assert (cloud.instances, cloud.tpus) == ({}, {})
    assert [item["key"] for item in cloud.metadata["items"]] == ["ssh-keys"]


def test_google_knows_every_call_that_ray_made(on_google: Story) -> None:
    """By Google's own descriptions; that of TPU's v2 stands in for v2alpha, which Ray asks."""
    reason = "google-api-python-client, which holds the descriptions, is not in the lock"
    client = pytest.importorskip("googleapiclient", reason=reason)
    folder = Path(client.__file__).parent / "discovery_cache" / "documents"
    described = {name: json.loads((folder / file).read_text()) for name, file in DOCUMENTS.items()}
    found = [
        fault
        for method, arguments in on_google.cloud.calls
        for fault in faults(described[method.partition(".")[0]], method, arguments)
    ]
    assert found == []


def test_a_call_that_google_does_not_describe_is_found() -> None:
    get = {"parameters": {"name": {"required": True, "pattern": "^nodes/"}}}
    create = {"parameters": {}, "request": {"$ref": "Node"}}
    document = {
        "resources": {"nodes": {"methods": {"get": get, "create": create}}},
        "schemas": {"Node": {"properties": {"kind": {"enum": ["SPOT"]}, "labels": {}}}},
    }
    found = partial(faults, document)
    assert not [*found("tpu.nodes.get", {"name": "nodes/1"})]
    assert not [*found("tpu.nodes.create", {"body": {"kind": "SPOT", "labels": {"a": "b"}}})]
    assert [*found("tpu.nodes.list", {})] == ["tpu.nodes.list: no such method"]
    assert [*found("tpu.nodes.get", {"zone": "a"})] == [
        "tpu.nodes.get: no parameter zone",
        "tpu.nodes.get: name is missing",
    ]
    assert [*found("tpu.nodes.create", {"body": {"kind": "SPOTTY", "nam": 1}})] == [
        "tpu.nodes.create.kind: no value SPOTTY",
        "tpu.nodes.create: no field nam",
    ]


# Azure


def azure_nodes(story: Story) -> dict[str, Any]:
    """The template's parameters for each virtual machine, by Ray's node type."""
    given = [
        asked["parameters"]["properties"]["parameters"]
        for asked in story.cloud.asked("resource.deployments.create_or_update")
    ]
    values = [{key: item["value"] for key, item in one.items()} for one in given]
    machines = [one for one in values if "vmName" in one]
    return {one["vmTags"]["ray-user-node-type"]: one for one in machines}


def test_azure_up_starts_the_head_and_gets_as_far_as_ssh(on_azure: Story) -> None:
    assert on_azure.up.exit_code == 1
    assert "Failed to setup head node." in on_azure.up.stderr
    assert " ubuntu@10.1.0.4 " in on_azure.ssh_calls[0]


def test_azure_starts_every_group_within_rays_template(on_azure: Story) -> None:
    assert on_azure.launched.exit_code == 0, on_azure.launched.stderr
    assert azure_nodes(on_azure).keys() == {"head", *WORKERS["azure"]}


def test_azure_gets_the_files_parameters_whole(on_azure: Story) -> None:
    for name, values in azure_nodes(on_azure).items():
        wanted = node_config("azure", name)["azure_arm_parameters"]
        assert wanted.items() <= values.items()


def test_azure_gives_no_node_a_public_address_or_a_zone(on_azure: Story) -> None:
    for values in azure_nodes(on_azure).values():
        assert values["provisionPublicIp"] is False
        assert values["zones"] == []


def test_azure_runs_only_the_spot_group_on_spot(on_azure: Story) -> None:
    found = {name: values.get("priority") for name, values in azure_nodes(on_azure).items()}
    assert {name for name, priority in found.items() if priority == "Spot"} == {"gpu-spot"}


def test_azure_tags_the_group_and_every_machine_for_cost(on_azure: Story) -> None:
    wanted = {"project": "manta", "cost-center": "research"}.items()
    (group,) = on_azure.cloud.asked("resource.resource_groups.create_or_update")
    assert group["parameters"]["tags"].items() >= wanted
    for values in azure_nodes(on_azure).values():
        assert values["vmTags"].items() >= wanted


def test_azure_down_leaves_no_machine_disk_card_network_or_role(on_azure: Story) -> None:
    """Left, and free: the resource group, which may hold other things."""
    cloud = on_azure.cloud
    assert isinstance(cloud, Azure)
    assert on_azure.down.exit_code == 0, on_azure.down.stderr
    assert (cloud.machines, cloud.disks, cloud.cards) == ({}, set(), set())
    assert cloud.resources == {}


def test_azure_without_a_subscription_does_not_start(tmp_path: Path) -> None:
    """Ray then asks an Azure CLI library of before 2021; hence the file names one."""
    text = (ROOT / "cluster/azure.yaml").read_text()
    cloud = Azure()
    with serving(cloud) as url, _machine(url) as here:
        lines = [line for line in text.splitlines() if "subscription_id:" not in line]
        up = here.run("up", "--yes", here.write("azure.yaml", "\n".join(lines)))
    assert up.exit_code == 1
    assert "azure-cli-core<2.21.0" in up.stderr
    assert cloud.calls == []
