"""Run Ray's launcher with stand-ins for Google's and Azure's Python SDKs.

    python cloud_sdk.py up --yes FILE           what `ray up --yes FILE` does
    python cloud_sdk.py launch CONFIG TYPE…     what the head's autoscaler does to start nodes

The SDKs are not in the project's lock. A stand-in sends every call, by name and with its
arguments, to the emulated cloud at EMULATED_CLOUD_URL, and turns its answers into what the SDK
would return. So Ray's provider code runs as it is; the SDKs' URLs, credentials and transport do
not.
"""

from __future__ import annotations

import json
import os
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

LONG_RUNNING = frozenset({"deallocate", "delete", "delete_by_id", "start", "update"})
"""Azure: today's SDKs name these `begin_…`; of `create_or_update` only that of deployments."""


class HttpError(Exception):
    """googleapiclient.errors.HttpError."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f'<HttpError {status} when requesting URL returned "{message}">')
        self.resp = types.SimpleNamespace(status=status)


class HttpResponseError(Exception):
    """azure.core.exceptions.HttpResponseError."""


class ResourceNotFoundError(HttpResponseError):
    """azure.core.exceptions.ResourceNotFoundError."""


class Answer(dict[str, Any]):
    """JSON whose keys are attributes too, as on the models of Azure's SDK."""

    def __getattr__(self, key: str) -> Any:
        return self.get(key)

    def as_dict(self) -> Answer:
        return self


def send(method: str, arguments: dict[str, Any]) -> Any:
    """Ask the emulated cloud. Raises urllib's HTTPError for what the cloud refuses."""
    body = json.dumps({"method": method, "arguments": arguments}, default=str).encode()
    request = urllib.request.Request(os.environ["EMULATED_CLOUD_URL"], body)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=30) as reply:
        return json.loads(reply.read(), object_hook=Answer)


class GoogleMethod:
    """`compute.instances().insert(…).execute()`: names pile up until `execute`."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        self._name = name
        self._arguments = arguments or {}
        self._http = types.SimpleNamespace(credentials=None)

    def __getattr__(self, part: str) -> GoogleMethod:
        return GoogleMethod(f"{self._name}.{part}")

    def __call__(self, **arguments: Any) -> GoogleMethod:
        return GoogleMethod(self._name, arguments)

    def execute(self, http: object = None) -> Any:
        try:
            return send(self._name, self._arguments)
        except urllib.error.HTTPError as refused:
            raise HttpError(refused.code, refused.read().decode()) from None


class AzureMethod:
    """`client.virtual_machines.begin_delete(…)`: sent when called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, part: str) -> AzureMethod:
        is_deployment = self._name.endswith("deployments") and part == "create_or_update"
        if part.startswith("__") or part in LONG_RUNNING or is_deployment:
            raise AttributeError(part)
        return AzureMethod(f"{self._name}.{part}")

    def __call__(self, *positional: Any, **arguments: Any) -> Any:
        if positional:
            arguments["positional"] = positional
        name = self._name.replace(".begin_", ".")
        try:
            answer = send(name, arguments)
        except urllib.error.HTTPError as refused:
            kind = ResourceNotFoundError if refused.code == 404 else HttpResponseError
            raise kind(refused.read().decode()) from None
        return answer if name == self._name else _done(answer)


def _done(answer: Any) -> Any:
    """The poller of an operation that has ended."""
    return types.SimpleNamespace(
        result=lambda: answer, wait=lambda timeout=None: None, done=lambda: True
    )


def _client(name: str) -> Callable[..., AzureMethod]:
    return lambda credential, subscription_id: AzureMethod(name)


def _no_profile() -> None:
    """As azure-common 1.1.28 without an Azure CLI library of before 2021."""
    raise ImportError("You need to install 'azure-cli-core<2.21.0' to load CLI credentials")


def _build(service: str, version: str, **options: Any) -> GoogleMethod:
    return GoogleMethod(service)


def _nothing(*arguments: Any, **options: Any) -> None:
    """A credential or a connection: the stand-ins have neither."""


MODULES: dict[str, dict[str, Any]] = {
    "googleapiclient": {},
    "googleapiclient.discovery": {"build": _build, "Resource": GoogleMethod},
    "googleapiclient.errors": {"HttpError": HttpError},
    "googleapiclient.http": {},
    "google_auth_httplib2": {"AuthorizedHttp": _nothing},
    "httplib2": {"Http": _nothing},
    "azure": {},
    "azure.common": {},
    "azure.common.credentials": {"get_cli_profile": _no_profile},
    "azure.core": {},
    "azure.core.exceptions": {
        "HttpResponseError": HttpResponseError,
        "ResourceNotFoundError": ResourceNotFoundError,
    },
    "azure.identity": {"AzureCliCredential": _nothing, "DefaultAzureCredential": _nothing},
    "azure.mgmt": {},
    "azure.mgmt.compute": {"ComputeManagementClient": _client("compute")},
    "azure.mgmt.network": {"NetworkManagementClient": _client("network")},
    "azure.mgmt.resource": {"ResourceManagementClient": _client("resource")},
    "azure.mgmt.resource.resources": {},
    "azure.mgmt.resource.resources.models": {
        "DeploymentMode": types.SimpleNamespace(incremental="Incremental")
    },
}


def install() -> None:
    """Put the stand-ins where `import` looks first."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def launch(config_file: str, node_types: list[str]) -> None:
    """Start one node of each type through the adapter that autoscaler v2 uses."""
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

    reader = FileConfigReader(config_file)
    config = reader.get_cached_autoscaling_config()
    name = config.get_config("cluster_name")
    adapter = NodeProviderAdapter(_get_node_provider(config.get_provider_config(), name), reader)
    adapter.launch(dict.fromkeys(node_types, 1), "request")
    adapter._main_executor.shutdown(wait=True)
    adapter._node_launcher_executors.shutdown(wait=True)
    for error in adapter.poll_errors():
        raise SystemExit(f"{error.node_type}: {error.__cause__!r}")


if __name__ == "__main__":
    install()
    if sys.argv[1] == "launch":
        launch(sys.argv[2], sys.argv[3:])
    else:
        from ray.scripts.scripts import main

        sys.exit(main())
