"""An AWS account in which the reader of `cluster/aws.yaml` has made what its head asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from aws_api import AwsApi, aws_api
from ray_launcher import ROOT

REGION, ZONE = "us-west-2", "us-west-2b"
OFFICE = "203.0.113.0/24"


@dataclass(frozen=True, kw_only=True)
class Account:
    """An AWS account with what the head of aws.yaml tells its reader to make."""

    api: AwsApi
    ec2: Any
    iam: Any
    subnet: str
    group: str

    def file(self, text: str | None = None) -> str:
        """aws.yaml with this account's names in the places that its head tells to replace."""
        text = text or (ROOT / "cluster/aws.yaml").read_text()
        named = text.replace("subnet-00000000000000000", self.subnet)
        return named.replace("sg-00000000000000000", self.group)

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.api.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "*",
        }

    def instances(self, cluster: str) -> dict[str, dict[str, Any]]:
        """The instances of a cluster that are not terminated, by Ray's node type."""
        found = [i for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        alive = [i for i in found if i["State"]["Name"] != "terminated"]
        ours = [i for i in alive if tags(i)["ray-cluster-name"] == cluster]
        return {tags(i)["ray-user-node-type"]: i for i in ours}


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


@contextmanager
def an_account() -> Iterator[Account]:
    with aws_api() as api:
        session = boto3.session.Session("test", "test", region_name=REGION)
        ec2, iam = (session.client(name, endpoint_url=api.url) for name in ("ec2", "iam"))
        vpc = ec2.create_vpc(CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.20.1.0/24", AvailabilityZone=ZONE)
        group = ec2.create_security_group(GroupName="manta", Description="-", VpcId=vpc)["GroupId"]
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": OFFICE}]}
        members = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, members])
        for name in ("manta-head", "manta-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        subnet_id = subnet["Subnet"]["SubnetId"]
        api.calls.clear()
        yield Account(api=api, ec2=ec2, iam=iam, subnet=subnet_id, group=group)
