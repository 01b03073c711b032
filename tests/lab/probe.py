"""Runs on a host of the lab: asks every port it is given, prints who answers.

    python probe.py '{"10.77.0.10": [6379, …]}' '[["GET", "/api/jobs/"], …]' [TOKEN]

A line of JSON on stdout: [[address, port, "HTTP" or "gRPC", what was asked, the answer], …] of
whatever was not refused. Without TOKEN it is a stranger who asks.
"""

from __future__ import annotations

import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

TIMEOUT_S = 5.0
REFUSED = (401, 403)
# One harmless question of each of Ray's gRPC services; an empty message is a valid request.
METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.NodeManagerService/GetSystemConfig",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ObjectManagerService/FreeObjects",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.RayletDriver/ClusterInfo",
    "ray.rpc.RayletDriver/KVList",
)
# A service that is not there, or a port that does not speak gRPC, tells nothing.
SILENT = ("UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def ask_http(address: str, port: int, method: str, route: str, bearer: dict[str, str]) -> str:
    """The answer's status and beginning; empty if refused, or not HTTP."""
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    try:
        connection.request(method, route, headers=bearer)
        answer = connection.getresponse()
        text = answer.read(200).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
    return "" if answer.status in REFUSED else f"{answer.status} {text}"


def ask_grpc(address: str, port: int, method: str, bearer: dict[str, str]) -> str:
    """The answer's beginning; empty if refused, or not gRPC."""
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            call = channel.unary_unary(f"/{method}")
            answer = call(b"", timeout=TIMEOUT_S, metadata=list(bearer.items()))
        except grpc.RpcError as error:
            name = error.code().name
            return "" if name in SILENT else f"{name} {error.details()}"
    return f"OK {answer[:200]!r}"


def speaks_http(address: str, port: int) -> bool:
    """Whether the port answers HTTP at all, refusals included."""
    connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def main() -> None:
    """Ask everything, a few at a time."""
    ports: dict[str, list[int]] = json.loads(sys.argv[1])
    routes: list[list[str]] = json.loads(sys.argv[2])
    bearer = {"authorization": f"Bearer {sys.argv[3]}"} if len(sys.argv) > 3 else {}
    found: list[list[str | int]] = []
    for address, numbers in ports.items():
        for port in numbers:
            if speaks_http(address, port):
                for method, route in routes:
                    if said := ask_http(address, port, method, route, bearer):
                        found.append([address, port, "HTTP", f"{method} {route}", said])
                continue
            with ThreadPoolExecutor(4) as pool:
                answers = pool.map(lambda m: ask_grpc(address, port, m, bearer), METHODS)  # noqa: B023
                for method, said in zip(METHODS, answers, strict=True):
                    if said:
                        found.append([address, port, "gRPC", method, said])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
