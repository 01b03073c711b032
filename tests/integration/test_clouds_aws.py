"""`cluster/aws.yaml` against a real EC2 and IAM API (moto's), up to the SSH step.

`ray up` and `ray down` run as a user runs them. Between them a head runs here, with the config
that the launcher made, so that Ray's own autoscaler starts the workers. What EC2 does with a
request (capacity, quotas, boot, placement) is not shown: only what is asked for and what is left.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from aws_account import OFFICE, Account, an_account, tags
from aws_api import Call, Refusal
from ray_launcher import RAY, ROOT, Ended, Launcher, launcher

TYPES = {
    "head": "m7i.xlarge",
    "cpu": "m6id.4xlarge",
    "gpu-spot": "g6.2xlarge",
    "gpu": "g6.2xlarge",
    "gpu8": "p4d.24xlarge",
}
MANTA = (str(Path(sys.executable).with_name("manta")),)
CLUSTER = "manta-aws"
QUOTA = Refusal(
    action="RunInstances",
    where={"TagSpecification.1.Tag.1.Value": "quota"},  # of the cluster of this name
    code="VcpuLimitExceeded",
    message="You have requested more vCPU capacity than your current vCPU limit of 0 allows",
)
NO_SPOT = Refusal(
    action="RunInstances",
    where={"InstanceMarketOptions.MarketType": "spot"},
    status=500,
    code="InsufficientInstanceCapacity",
    message="We currently do not have sufficient g6.2xlarge capacity in the Availability Zone "
    "you requested (us-west-2b).",
)
ASK = """
import json, sys
from ray.autoscaler.v2.sdk import request_cluster_resources
for line in sys.stdin:
    shapes = [{"resources": bundle, "label_selector": {}} for bundle in json.loads(line)]
    request_cluster_resources(sys.argv[1], shapes)
"""


@dataclass(frozen=True, kw_only=True)
class Story:
    """One cluster from `ray up` to `ray down`, told once for all tests of this file."""

    account: Account
    up: Ended
    alive_after_up: dict[str, dict[str, Any]]
    ssh_calls: list[str]
    running: dict[str, dict[str, Any]]
    rules: list[dict[str, Any]]
    """What the security group lets in while the cluster runs."""
    down: Ended

    def launch(self, node_type: str) -> Call:
        """The RunInstances call of a node type."""
        wanted = {node_type, CLUSTER}
        calls = self.account.api.named("RunInstances")
        return next(c for c in calls if wanted <= {*c.values("TagSpecification.1.Tag.")})


@pytest.fixture(scope="module")
def told() -> Iterator[Mapping[str, Any]]:
    """All clusters of this file at once: most of their time is Ray waiting."""
    with an_account() as account, account.api.refusing(QUOTA), ThreadPoolExecutor() as pool:
        story = pool.submit(_tell, account)
        names = ("quota", "silent")
        ups = pool.map(lambda name: _manta_up(account, name), names)
        yield {"story": story.result(), **dict(zip(names, ups, strict=True))}


@pytest.fixture
def story(told: Mapping[str, Any]) -> Story:
    story: Story = told["story"]
    return story


def _tell(account: Account) -> Story:
    alive = partial(account.instances, CLUSTER)
    with launcher(account.environment()) as here, ThreadPoolExecutor() as pool:
        file = here.write("aws.yaml", account.file())
        own_ray = pool.submit(_own_ray, here)
        up = here.run("up", "--yes", file)
        after_up = alive()
        with (
            _head(here, after_up["head"]["InstanceId"], own_ray.result()) as gcs,
            _asking(here, gcs) as ask,
        ):
            ask([{"CPU": 16}, {"GPU": 1}])
            _until(lambda: {"cpu", "gpu-spot"} <= alive().keys(), "cpu, gpu-spot")
            with account.api.refusing(NO_SPOT):
                ask([{"CPU": 16}, {"GPU": 1}, {"GPU": 1}])
                _until(lambda: "gpu" in alive(), "gpu on demand")
            _turn_on(here, "gpu8")
            ask([{"CPU": 16}, {"GPU": 1}, {"GPU": 1}, {"GPU": 8}])
            _until(lambda: "gpu8" in alive(), "gpu8")
        group = account.ec2.describe_security_groups(GroupIds=[account.group])
        return Story(
            account=account,
            up=up,
            alive_after_up=after_up,
            ssh_calls=here.ssh_calls(),
            running={"head": after_up["head"]} | alive(),  # a slow head is given up by Ray
            rules=group["SecurityGroups"][0]["IpPermissions"],
            down=here.run("down", "--yes", file),
        )


def _manta_up(account: Account, name: str) -> Ended:
    with launcher(account.environment(), MANTA) as here:
        file = here.write("aws.yaml", account.file())
        return here.run("up", file, "--name", name, "--yes")


@contextmanager
def _head(here: Launcher, instance_id: str, own_ray: str) -> Iterator[str]:
    """Ray's head as it would run on the instance, its autoscaler included; yields its address."""
    here.write("bootstrap.json", json.dumps(here.resolved()))
    port = _free_port()
    told = {
        "PYTHONPATH": own_ray,
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": instance_id,
        "RAY_NODE_TYPE_NAME": "head",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_NODE_START_WAIT_S": "300",
        "RAY_raylet_start_wait_time_s": "120",  # the machine may be busy
    }
    argv = ["start", "--head", "--block", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
    argv += [f"--port={port}", f"--ray-client-server-port={_free_port()}"]
    argv += [f"--dashboard-port={_free_port()}", f"--dashboard-agent-listen-port={_free_port()}"]
    argv += [f"--autoscaling-config={here.folder / 'bootstrap.json'}", "--temp-dir"]
    with (here.folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*RAY, *argv, str(here.folder / "r")],
            env={**here.environment, **told},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _until(lambda: _listens(port) or head.poll() is not None, "the head")
        assert head.poll() is None, (here.folder / "head.log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(timeout=120)


def _own_ray(here: Launcher) -> str:
    """A copy of Ray's autoscaler on which the file's last set-up command for the head has run."""
    file = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    setup_command = file["head_setup_commands"][-1]
    installed, own = Path(ray.__file__).parent, here.folder / "own" / "ray"
    (own / "autoscaler").mkdir(parents=True)
    for path in installed.iterdir():
        if path.name != "autoscaler":
            (own / path.name).symlink_to(path)
    shutil.copytree(installed / "autoscaler", own / "autoscaler", dirs_exist_ok=True)
    environment = {**here.environment, "PYTHONPATH": str(own.parent)}
    for _ in range(2):  # `ray up` runs it again each time
        subprocess.run(["bash", "-c", setup_command], env=environment, check=True, timeout=120)
    return str(own.parent)


@contextmanager
def _asking(here: Launcher, gcs: str) -> Iterator[Callable[[Sequence[Mapping[str, int]]], None]]:
    """Send what `ray.autoscaler.sdk.request_resources` sends, without a driver."""
    argv = [sys.executable, "-c", ASK, gcs]
    with subprocess.Popen(
        argv, env=dict(here.environment), stdin=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        yield lambda bundles: print(json.dumps(bundles), file=process.stdin, flush=True)
        process.stdin.close()


def _turn_on(here: Launcher, node_type: str) -> None:
    """As a user edits the file and runs `ray up` again: the autoscaler reads it each second."""
    config = here.resolved()
    config["available_node_types"][node_type]["max_workers"] = 1
    here.write("bootstrap.new", json.dumps(config))
    (here.folder / "bootstrap.new").rename(here.folder / "bootstrap.json")


def _until(ready: Callable[[], object], what: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_up_starts_the_head_and_fails_at_ssh_with_the_head_still_running(story: Story) -> None:
    assert story.up.exit_code == 1
    assert "Failed to setup head node." in story.up.stderr
    assert list(story.alive_after_up) == ["head"]


def test_ssh_goes_to_the_private_address_as_the_files_user(story: Story) -> None:
    address = story.alive_after_up["head"]["PrivateIpAddress"]
    assert f" ubuntu@{address} " in story.ssh_calls[0]


@pytest.mark.parametrize("node_type", TYPES)
def test_each_group_starts_its_machine_on_the_files_image(story: Story, node_type: str) -> None:
    instance = story.running[node_type]
    assert instance["InstanceType"] == TYPES[node_type]
    assert "/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/" in instance["ImageId"]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    profile = "manta-head" if node_type == "head" else "manta-worker"
    assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")


@pytest.mark.parametrize("node_type", TYPES)
def test_every_node_is_private_in_the_named_subnet_and_group(story: Story, node_type: str) -> None:
    instance = story.running[node_type]
    assert instance["SubnetId"] == story.account.subnet
    assert "PublicIpAddress" not in instance
    asked = story.launch(node_type).parameters
    assert not [key for key in asked if key.endswith("AssociatePublicIpAddress")]
    groups = {v for k, v in asked.items() if "SecurityGroupId" in k}
    assert groups == {story.account.group}


def test_ssh_is_open_to_the_named_network_only_and_all_else_to_members(story: Story) -> None:
    sources = {
        (rule["IpProtocol"], rule.get("FromPort"), source.get("CidrIp"), source.get("GroupId"))
        for rule in story.rules
        for source in [*rule["IpRanges"], *rule["UserIdGroupPairs"]]
    }
    group = story.account.group
    assert {source[:3] for source in sources if source[2]} == {("tcp", 22, OFFICE)}
    assert {source[3] for source in sources if not source[2]} == {group}
    api = story.account.api
    assert not api.named("AuthorizeSecurityGroupIngress") + api.named("CreateSecurityGroup")


def test_only_the_spot_group_asks_for_spot(story: Story) -> None:
    assert story.running["gpu-spot"]["InstanceLifecycle"] == "spot"
    for call in story.account.api.named("RunInstances"):
        market = call.parameters.get("InstanceMarketOptions.MarketType")
        is_spot = "gpu-spot" in call.values("TagSpecification.1.Tag.")
        assert market == ("spot" if is_spot else None)


@pytest.mark.parametrize("node_type", TYPES)
def test_instances_and_volumes_carry_the_tags_for_cost(story: Story, node_type: str) -> None:
    wanted = {"project": "manta", "cost-center": "research"}
    instance = story.running[node_type]
    assert wanted.items() <= tags(instance).items()
    assert tags(instance)["ray-cluster-name"] == CLUSTER
    asked = story.launch(node_type).values("TagSpecification.2.")
    assert asked == ("volume", "project", "manta", "cost-center", "research")


@pytest.mark.parametrize("node_type", TYPES)
def test_volumes_are_encrypted_and_end_with_their_node(story: Story, node_type: str) -> None:
    asked = story.launch(node_type).parameters
    disk = {k.rpartition(".")[2]: v for k, v in asked.items() if ".Ebs." in k}
    wanted = {"VolumeSize": "200", "VolumeType": "gp3"}
    assert disk == wanted | {"Encrypted": "true", "DeleteOnTermination": "true"}


def test_spot_without_capacity_falls_back_to_the_group_on_demand(story: Story) -> None:
    """Only with the file's last set-up command for the head: Ray alone asks for spot for ever."""
    assert "InstanceLifecycle" not in story.running["gpu"]
    refused = [c for c in story.account.api.named("RunInstances") if NO_SPOT.applies_to(c)]
    assert len(refused) <= 1 + 2 * 5  # the one before, and at most two tries of five calls


def test_the_eight_gpu_group_has_an_efa_on_each_card_in_a_placement_group(story: Story) -> None:
    asked = story.launch("gpu8").parameters
    cards = [asked[f"NetworkInterface.{i}.NetworkCardIndex"] for i in range(1, 5)]
    kinds = [asked[f"NetworkInterface.{i}.InterfaceType"] for i in range(1, 5)]
    assert cards == ["0", "1", "2", "3"]
    assert kinds == ["efa"] * 4
    assert asked["Placement.GroupName"] == "manta-gpu"


def test_down_leaves_no_instance_volume_or_spot_request(story: Story) -> None:
    assert story.down.exit_code == 0, story.down.stderr
    ec2 = story.account.ec2
    for cluster in (CLUSTER, "quota", "silent"):
        assert story.account.instances(cluster) == {}
    assert ec2.describe_volumes()["Volumes"] == []
    states = {
        request["State"]
        for request in ec2.describe_spot_instance_requests()["SpotInstanceRequests"]
    }
    assert states <= {"cancelled", "closed"}


def test_down_leaves_only_a_key_pair_that_up_uses_again(story: Story) -> None:
    """Made by Ray, free of charge; no security group, role or profile is made or changed."""
    writes = {c.action for c in story.account.api.calls if not c.action.startswith("Describe")}
    known = {"CreateKeyPair", "RunInstances", "CreateTags", "TerminateInstances"}
    assert writes <= known
    keys = [key["KeyName"] for key in story.account.ec2.describe_key_pairs()["KeyPairs"]]
    assert len(keys) == 3  # one for each machine that `up` ran on
    assert all(key.startswith("ray-autoscaler_") for key in keys)


def test_manta_up_gives_a_refusal_in_the_clouds_words_and_what_to_do(
    told: Mapping[str, Any],
) -> None:
    ended: Ended = told["quota"]
    assert ended.exit_code == 1
    assert QUOTA.message in ended.stderr
    assert "quota" in ended.stderr.replace(QUOTA.message, "")
    assert "Traceback" not in ended.stdout + ended.stderr


def test_manta_up_ends_a_head_that_never_answers_ssh_and_says_so(
    told: Mapping[str, Any], story: Story
) -> None:
    ended: Ended = told["silent"]
    assert ended.exit_code == 1
    assert "Nothing of it is left running." in ended.stderr
    started = [c.values("TagSpecification.1.") for c in story.account.api.named("RunInstances")]
    assert [tags for tags in started if "silent" in tags]
    assert story.account.instances("silent") == {}
