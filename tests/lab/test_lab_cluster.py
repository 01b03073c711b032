"""A cluster on real hosts: closed, whole, growing, hurt and mended, ended. In the file's order."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosts import lab, why_not
from laptop import (
    Laptop,
    ask_everything,
    ray_processes,
    reachable,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(1200),
]

NAME = "lab"

SPAN = """
import ray, socket
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as On
ray.init()
group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
ray.get(group.ready())
where = ray.remote(num_cpus=1)(lambda: socket.gethostname())
hosts = [where.options(scheduling_strategy=On(group, i)).remote() for i in range(2)]
print("hosts", sorted([socket.gethostname(), *ray.get(hosts)]))
"""

SLOW_SUM = """
import ray, time
ray.init()
@ray.remote(num_cpus=1)
def square(n):
    time.sleep(3)
    return n * n
left, total = [square.remote(n) for n in range(16)], 0
while left:
    done, left = ray.wait(left)
    total += ray.get(done[0])
    print("done", 16 - len(left), flush=True)
print("total", total)
"""

LONG_TASK = """
import ray, time
ray.init()
@ray.remote(num_cpus=2, max_retries=0)
def nap(n):
    time.sleep(15)
    return n
print("naps", ray.get([nap.remote(n) for n in range(2)]))
"""

# Room for six at the same time needs a third host: two have room for four.
CROWD = """
import ray, socket
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as On
ray.init()
group = placement_group([{"CPU": 1}] * 6)
ray.get(group.ready())
guest = ray.remote(num_cpus=1)(lambda: socket.gethostname())
guests = [guest.options(scheduling_strategy=On(group, i)).remote() for i in range(6)]
print("crowd", sorted(set(ray.get(guests))))
"""

INTEGRATION = Path(__file__).parents[1] / "integration"

LOAD = """
import json, sys
sys.path.insert(0, "%s")
from load import Load, get
with Load([get("%s", s=s) for s in [0.02] * 6 + [1.0] * 2]) as load:
    sys.stdin.readline()
print(load)
print(json.dumps({"good": sum(load.answers.values()), "failed": load.failures}))
"""


@pytest.fixture(scope="module")
def laptop():
    with lab(4) as started:
        laptop = Laptop(started)
        laptop.up = laptop.run(
            "manta", "up", str(laptop.write(NAME)), "--yes", "--timeout-s", "500", timeout_s=600
        )
        yield laptop
        laptop.run("manta", "down", "--name", NAME, "--yes", "--forget")


def test_up_brings_all_minimum_workers_into_the_cluster(laptop):
    assert laptop.up.returncode == 0, laptop.up.stderr
    status = laptop.status(NAME)
    assert status["state"] == "up"
    assert len(laptop.workers(NAME)) == 2
    assert {node["node_type"] for node in status["nodes"]} == {"head", "local.cluster.node"}


def test_a_job_spans_all_hosts(laptop):
    laptop.submit(NAME, "span", SPAN)
    assert "hosts ['h0', 'h1', 'h2']" in laptop.finished(NAME, "span")


def test_plain_ray_and_serve_commands_work_from_the_laptop(laptop):
    variables = laptop.variables(NAME)
    assert "local.cluster.node" in laptop.run("ray", "status", **variables).stdout
    assert "HEALTHY" in laptop.run("serve", "status", **variables).stdout
    assert laptop.run("manta", "apps", "--name", NAME).returncode == 0


def test_the_tunnel_is_reopened_when_it_died(laptop):
    assert laptop.status(NAME)["state"] == "up"
    known = json.loads((laptop.home / f".manta/clusters/{NAME}/cluster.json").read_text())
    words = ["ssh", "-S", f"{known['temp_dir']}/ssh", "-O", "exit", "head"]
    subprocess.run(laptop.lab.laptop(*words), check=True, capture_output=True)
    assert laptop.status(NAME)["state"] == "up"


def test_no_port_of_any_host_answers_without_the_token(laptop):
    found = laptop.lab
    ports = {host.address: reachable(found, host) for host in found.hosts}
    ports = {address: [p for p in numbers if p != 22] for address, numbers in ports.items()}
    assert len(ports[found.hosts[0].address]) > 5
    routes = registered_routes(found.hosts[0].folder / "tmp")
    assert len(routes) > 50
    origins = [found.inside(host) for host in found.hosts] + [found.laptop()]
    answers = [a for words in origins for a in ask_everything(words, ports, routes)]
    # Ray's agent says "raylet: success" to anybody, on purpose and without any data.
    health = {"GET /api/healthz", "GET /api/local_raylet_healthz"}
    told = [a for a in answers if a[3].replace("HEAD", "GET") not in health]
    assert told == []
    # The same questions with the token are answered: it is the token that they lacked.
    head = found.hosts[0].address
    token = (laptop.home / f".manta/clusters/{NAME}/auth_token").read_text()
    told = ask_everything(found.laptop(), {head: [6379, 52365]}, [["GET", "/api/version"]], token)
    assert [head, 6379, "gRPC", "ray.rpc.NodeInfoGcsService/GetAllNodeInfo"] in [
        a[:4] for a in told
    ]


def test_a_second_up_of_the_same_file_goes_on_with_what_is_there(laptop):
    before = laptop.status(NAME)["gcs_address"]
    dry = laptop.run("manta", "up", str(laptop.write(NAME)), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "ray up" in dry.stdout
    assert laptop.status(NAME)["gcs_address"] == before
    other = laptop.run("manta", "up", str(laptop.write("other")), "--yes")
    assert other.returncode == 2
    assert "belongs to cluster `lab`" in other.stderr


def test_the_autoscaler_adds_a_host_for_demand_and_removes_it_when_idle(laptop):
    laptop.submit(NAME, "crowd", CROWD)
    assert "crowd ['h1', 'h2', 'h3']" in laptop.finished(NAME, "crowd", timeout_s=400)
    wait_until(lambda: len(laptop.workers(NAME)) == 2, 300)
    kept = laptop.workers(NAME)
    removed = next(h for h in laptop.lab.hosts[1:] if h.address not in kept)
    wait_until(
        lambda: not ray_processes(laptop.lab, removed),
        120,
        lambda: ray_processes(laptop.lab, removed),
    )


def test_work_survives_a_partition_of_ten_seconds(laptop):
    before = laptop.workers(NAME)
    laptop.submit(NAME, "naps", LONG_TASK)
    wait_until(lambda: laptop.status(NAME)["used"].get("CPU") == 4, 300)
    away = next(host for host in laptop.lab.hosts[1:] if host.address in before)
    laptop.lab.unplug(away)
    time.sleep(10)  # the partition itself
    laptop.lab.plug(away)
    assert "naps [0, 1]" in laptop.finished(NAME, "naps")
    assert laptop.workers(NAME) == before


def test_a_job_is_right_although_a_host_dies_under_it(laptop):
    victim = next(h for h in laptop.lab.hosts[1:] if h.address in laptop.workers(NAME))
    laptop.submit(NAME, "sum", SLOW_SUM)
    wait_until(lambda: "done 2" in laptop.job(NAME, "sum")[1], 300)
    laptop.lab.power_off(victim)
    assert f"total {sum(n * n for n in range(16))}" in laptop.finished(NAME, "sum", 400)


def test_the_place_of_the_dead_host_is_taken_again(laptop):
    def full():
        return len(laptop.workers(NAME)) == 2

    dead = next(host for host in laptop.lab.hosts if not host.pid)
    deadline = time.monotonic() + 60
    while not full() and time.monotonic() < deadline:
        time.sleep(1)
    # Ray's provider takes the first host of its list that is not running, be it the dead one.
    laptop.lab.power_on(dead)
    wait_until(full, 300, lambda: laptop.status(NAME))


def test_no_request_is_lost_when_the_node_of_a_replica_is_drained(laptop):
    app = {"name": "drained", "route_prefix": "/", "import_path": "drained_app:app"}
    app["runtime_env"] = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    path = laptop.home / "drained.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    done = laptop.run("serve", "deploy", str(path), **laptop.variables(NAME))
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(laptop.replica_nodes(NAME, "drained")) == 2, 200)
    url = laptop.status(NAME)["serve_url"]
    load = laptop.lab.laptop(sys.executable, "-c", LOAD % (INTEGRATION, url))
    asking = subprocess.Popen(load, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    chosen = laptop.replica_nodes(NAME, "drained")[0]
    drained = laptop.run("manta", "drain", chosen, "--name", NAME, "--timeout-s", "200")
    told, _ = asking.communicate("end\n", timeout=60)
    print(f"\n{drained.stdout.strip()}: {told}")
    assert drained.returncode == 0, drained.stderr
    counted = json.loads(told.splitlines()[-1])
    assert counted["failed"] == {}
    assert counted["good"] > 100
    assert chosen not in laptop.replica_nodes(NAME, "drained")
    head = laptop.run("manta", "drain", laptop.lab.hosts[0].address, "--name", NAME)
    assert head.returncode == 2
    assert "the head cannot be drained" in head.stderr


def test_status_tells_events_and_cost(laptop):
    done = laptop.run("manta", "status", "--name", NAME)
    assert "Event: " in done.stdout, done.stderr
    assert "price is not known" in done.stdout


def test_down_names_a_host_that_is_off_and_keeps_the_record_and_the_logs(laptop):
    off = next(h for h in laptop.lab.hosts[1:] if h.address not in laptop.workers(NAME))
    laptop.lab.power_off(off)
    asked = laptop.run("manta", "down", "--name", NAME)
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    done = laptop.run("manta", "down", "--name", NAME, "--yes", "--keep-logs")
    assert done.returncode == 1
    assert f"{off.address}: cannot be asked" in done.stderr
    (kept,) = (laptop.home / f".manta/clusters/{NAME}").glob("ray-logs-*")
    assert str(kept) in done.stderr
    assert (kept / laptop.lab.hosts[0].address / "monitor.log").stat().st_size > 1000
    assert list(kept.glob("*/job-driver-sum.log"))
    laptop.lab.power_on(off)


def test_down_leaves_nothing_on_any_host_and_forgets_the_cluster(laptop):
    done = laptop.run("manta", "down", "--name", NAME, "--yes")
    assert done.returncode == 0, done.stderr
    for host in laptop.lab.hosts:
        assert ray_processes(laptop.lab, host) == []
        assert not (host.folder / "home/ray_bootstrap_key.pem").exists()
        assert not (host.folder / "home/.ray/auth_token").exists()
    assert laptop.run("manta", "status", "--name", NAME).returncode == 1
    again = laptop.run("manta", "down", "--name", NAME)
    assert again.stdout == f"Cluster `{NAME}` is not up.\n"


def registered_routes(tmp):
    """Every HTTP route that Ray's servers on the head say they have: method and path."""
    routes = set()
    for log in tmp.glob("ray/session_2*/logs/*.log"):
        for method, path in re.findall(r"\[(\w+)\] <\w*Resource\s+(\S+?)>", log.read_text()):
            routes.add((method, path.replace("{", "").replace("}", "")))
    return [["GET", "/"], ["GET", "/metrics"], *map(list, sorted(routes))]
