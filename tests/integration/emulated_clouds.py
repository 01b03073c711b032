"""Google Cloud and Azure as far as Ray's providers ask of them, in memory, over HTTP.

Written after the providers' API references; not recorded from the real services. They keep what is
made, refuse what does not exist, and for Azure hold a deployment to its template's parameters.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Arguments = dict[str, Any]


class Refused(Exception):
    """The cloud's answer with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Cloud:
    """What exists, and every call so far as (method, arguments)."""

    calls: list[tuple[str, Arguments]] = field(default_factory=list)

    def asked(self, method: str) -> list[Arguments]:
        return [arguments for name, arguments in self.calls if name == method]

    def answer(self, method: str, arguments: Arguments) -> Any:
        self.calls.append((method, arguments))
        handle: Callable[..., Any] | None = getattr(self, method.replace(".", "_"), None)
        if handle is None:
            raise Refused(501, f"{method}: not emulated")
        return handle(**arguments)


@dataclass
class Google(Cloud):
    """Resource manager, IAM, compute and TPU of one project."""

    project: str = "example-project"
    accounts: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=lambda: {"bindings": [], "etag": "1"})
    metadata: dict[str, Any] = field(default_factory=lambda: {"items": [], "fingerprint": "1"})
    instances: dict[str, Any] = field(default_factory=dict)
    tpus: dict[str, Any] = field(default_factory=dict)

    def cloudresourcemanager_projects_get(self, projectId: str) -> Any:
        self._known(projectId == self.project, projectId)
        return {"projectId": projectId, "lifecycleState": "ACTIVE"}

    def cloudresourcemanager_projects_getIamPolicy(self, resource: str, body: Any) -> Any:
        return self.policy

    def cloudresourcemanager_projects_setIamPolicy(self, resource: str, body: Any) -> Any:
        self.policy = body["policy"]
        return self.policy

    def iam_projects_serviceAccounts_get(self, name: str) -> Any:
        self._known(name in self.accounts, name)
        return self.accounts[name]

    def iam_projects_serviceAccounts_create(self, name: str, body: Any) -> Any:
        email = f"{body['accountId']}@{self.project}.iam.gserviceaccount.com"
        account = {"email": email, "projectId": self.project}
        self.accounts[f"{name}/serviceAccounts/{email}"] = account
        return account

    def compute_projects_get(self, project: str) -> Any:
        return {"name": project, "commonInstanceMetadata": self.metadata}

    def compute_projects_setCommonInstanceMetadata(self, project: str, body: Any) -> Any:
        self.metadata = body
        return {"name": "operation"}

    def compute_globalOperations_get(self, project: str, operation: str) -> Any:
        return {"status": "DONE"}

    def compute_zoneOperations_get(self, project: str, operation: str, zone: str) -> Any:
        return {"status": "DONE"}

    def compute_instances_insert(
        self, project: str, zone: str, body: Any, sourceInstanceTemplate: str | None
    ) -> Any:
        self._known(project == self.project, project)
        network = [dict(body["networkInterfaces"][0], networkIP=f"10.1.0.{len(self.instances)}")]
        made = {"status": "RUNNING", "labelFingerprint": "1"}
        rest = body["networkInterfaces"][1:]
        self.instances[body["name"]] = {**body, **made, "networkInterfaces": network + rest}
        return {"name": "operation"}

    def compute_instances_list(self, project: str, zone: str, filter: str) -> Any:
        wanted = dict(re.findall(r"labels\.([\w-]+) = ([\w-]+)", filter))
        return {
            "items": [i for i in self.instances.values() if wanted.items() <= i["labels"].items()]
        }

    def compute_instances_get(self, project: str, zone: str, instance: str) -> Any:
        self._known(instance in self.instances, instance)
        return self.instances[instance]

    def compute_instances_setLabels(
        self, project: str, zone: str, instance: str, body: Any
    ) -> Any:
        self.instances[instance]["labels"] = body["labels"]
        return {"name": "operation"}

    def compute_instances_delete(self, project: str, zone: str, instance: str) -> Any:
        self._known(instance in self.instances, instance)
        del self.instances[instance]
        return {"name": "operation"}

    def tpu_projects_locations_nodes_create(self, parent: str, body: Any, nodeId: str) -> Any:
        name = f"{parent}/nodes/{nodeId}"
        ends = [{"ipAddress": "10.1.1.1"}]
        self.tpus[name] = {**body, "name": name, "state": "READY", "networkEndpoints": ends}
        return {"name": f"{parent}/operations/1"}

    def tpu_projects_locations_nodes_list(self, parent: str) -> Any:
        return {"nodes": list(self.tpus.values())}

    def tpu_projects_locations_nodes_get(self, name: str) -> Any:
        self._known(name in self.tpus, name)
        return self.tpus[name]

    def tpu_projects_locations_nodes_delete(self, name: str) -> Any:
        self._known(name in self.tpus, name)
        del self.tpus[name]
        return {"name": f"{name.partition('/nodes/')[0]}/operations/1"}

    def tpu_projects_locations_operations_get(self, name: str) -> Any:
        return {"response": {}}

    def _known(self, known: bool, name: str) -> None:
        if not known:
            raise Refused(404, f"{name} was not found")


@dataclass
class Azure(Cloud):
    """One subscription: deployments and what they make, by resource id."""

    group: str = ""
    resources: dict[str, Any] = field(default_factory=dict)
    machines: dict[str, Any] = field(default_factory=dict)
    disks: set[str] = field(default_factory=set)
    cards: set[str] = field(default_factory=set)

    def resource_resource_groups_create_or_update(
        self, resource_group_name: str, parameters: Any
    ) -> Any:
        self.group = resource_group_name
        return {"tags": parameters.get("tags")}

    def resource_resources_list_by_resource_group(self, positional: list[str]) -> Any:
        (kind,) = re.findall(r"resourceType eq '([^']+)'", positional[1])
        return [r for r in self.resources.values() if r["type"] == kind]

    def resource_resources_get_by_id(self, positional: list[str]) -> Any:
        return self.resources[self._known(positional[0], self.resources)]

    def resource_resources_delete_by_id(self, resource_id: str, api_version: str) -> Any:
        return self.resources.pop(self._known(resource_id, self.resources))

    def resource_deployments_create_or_update(
        self, resource_group_name: str, deployment_name: str, parameters: Any
    ) -> Any:
        template, given = (parameters["properties"][key] for key in ("template", "parameters"))
        values = {name: item["value"] for name, item in given.items()}
        _hold_to_template(template["parameters"], values)
        if "vmName" in values:
            self._make_machines(values)
            return {}
        return {"properties": {"outputs": self._make_network(values)}}

    def compute_virtual_machines_list(self, resource_group_name: str) -> Any:
        return list(self.machines.values())

    def compute_virtual_machines_get(self, resource_group_name: str, vm_name: str) -> Any:
        return self.machines[self._known(vm_name, self.machines)]

    def compute_virtual_machines_instance_view(
        self, resource_group_name: str, vm_name: str
    ) -> Any:
        self._known(vm_name, self.machines)
        return {
            "statuses": [{"code": "ProvisioningState/succeeded"}, {"code": "PowerState/running"}]
        }

    def compute_virtual_machines_update(
        self, resource_group_name: str, vm_name: str, parameters: Any
    ) -> Any:
        self.machines[self._known(vm_name, self.machines)]["tags"] = parameters["tags"]

    def compute_virtual_machines_delete(self, resource_group_name: str, vm_name: str) -> Any:
        del self.machines[self._known(vm_name, self.machines)]

    def compute_disks_delete(self, resource_group_name: str, disk_name: str) -> Any:
        self.disks.remove(self._known(disk_name, self.disks))

    def network_network_interfaces_get(
        self, resource_group_name: str, network_interface_name: str
    ) -> Any:
        self._known(network_interface_name, self.cards)
        return {"ip_configurations": [{"private_ip_address": "10.1.0.4"}]}

    def network_network_interfaces_delete(
        self, resource_group_name: str, network_interface_name: str
    ) -> Any:
        self.cards.remove(self._known(network_interface_name, self.cards))

    def network_subnets_delete(
        self, resource_group_name: str, virtual_network_name: str, subnet_name: str
    ) -> Any:
        """Goes with its network."""

    def network_network_security_groups_delete(
        self, resource_group_name: str, network_security_group_name: str
    ) -> Any:
        self._drop("networkSecurityGroups", network_security_group_name)

    def network_virtual_networks_delete(
        self, resource_group_name: str, virtual_network_name: str
    ) -> Any:
        self._drop("virtualNetworks", virtual_network_name)

    def _make_network(self, values: Arguments) -> Any:
        cluster = values["clusterId"]
        ids = {
            "msi": self._id("ManagedIdentity/userAssignedIdentities", values["msiName"]),
            "nsg": self._id("Network/networkSecurityGroups", f"ray-{cluster}-nsg"),
            "vnet": self._id("Network/virtualNetworks", f"ray-{cluster}-vnet"),
            "role": self._id("Authorization/roleAssignments", values["roleAssignmentGuid"]),
        }
        for made in ids.values():
            kind = made.split("/providers/")[1].rpartition("/")[0]
            properties = {"principalId": "principal"}
            self.resources[made] = {"id": made, "type": kind, "properties": properties}
        subnet = f"{ids['vnet']}/subnets/ray-{cluster}-subnet"
        outputs = {"msi": ids["msi"], "nsg": ids["nsg"], "subnet": subnet}
        return {name: {"value": value} for name, value in outputs.items()}

    def _make_machines(self, values: Arguments) -> None:
        for index in range(values["vmCount"]):
            name = f"{values['vmName']}{index}"
            card, disk = f"{values['vmName']}-nic{index}", f"{name}-{uuid.uuid4().hex}"
            self.cards.add(card)
            self.disks.add(disk)
            self.machines[name] = {
                "name": name,
                "tags": values["vmTags"],
                "asked": values,
                "network_profile": {
                    "network_interfaces": [{"id": self._id("Network/networkInterfaces", card)}]
                },
                "storage_profile": {"os_disk": {"name": disk}, "data_disks": []},
            }

    def _id(self, kind: str, name: str) -> str:
        return f"/subscriptions/s/resourceGroups/{self.group}/providers/Microsoft.{kind}/{name}"

    def _drop(self, kind: str, name: str) -> None:
        self.resources.pop(self._known(self._id(f"Network/{kind}", name), self.resources))

    def _known(self, name: str, where: Any) -> str:
        if name not in where:
            raise Refused(404, f"(ResourceNotFound) {name} was not found.")
        return name


def _hold_to_template(declared: dict[str, Any], values: Arguments) -> None:
    """Refuse parameters as Azure Resource Manager does: undeclared, missing or of another type."""
    types = {"string": str, "securestring": str, "int": int, "bool": bool, "object": dict}
    for name, value in values.items():
        if name not in declared:
            raise Refused(400, f"(InvalidTemplate) parameter {name} is not declared")
        if not isinstance(value, types.get(declared[name]["type"], list)):
            raise Refused(400, f"(InvalidTemplate) parameter {name}: not {declared[name]['type']}")
    for name, item in declared.items():
        if name not in values and "defaultValue" not in item:
            raise Refused(400, f"(InvalidTemplate) parameter {name} is missing")


@contextmanager
def serving(cloud: Cloud) -> Iterator[str]:
    """The cloud on loopback; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(cloud))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                with lock:
                    status, answer = 200, cloud.answer(sent["method"], sent["arguments"])
            except Refused as refused:
                status, answer = refused.status, str(refused)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: `calls` is the log."""

    return Handler
