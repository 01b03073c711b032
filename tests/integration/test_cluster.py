"""A real cluster on this machine: closed, findable, ended whole, no trouble to a neighbour."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest

from manta.cluster import processes
from manta.cluster.record import ClusterRecord

BIN = Path(sys.executable).parent
JOB = "import os, ray; ray.init(); print('job in', os.environ['MANTA_CLUSTER_ID'])"

pytestmark = pytest.mark.timeout(600)  # seconds; two cores shared with others may take their time


class Machine:
    """A home of its own, from which `manta` and plain `ray` commands are run."""

    def __init__(self):
        self.home = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
        names = ("RAY_", "MANTA_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
        self.environment |= {"HOME": str(self.home), "TMPDIR": str(self.home)}

    def run(self, *words, timeout_s=240, **environment):
        return subprocess.run(
            [str(BIN / words[0]), *words[1:]],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def up(self, *words):
        done = self.run("manta", "up", "--ports", "auto", "--json", *words)
        assert done.returncode == 0, done.stderr
        return ClusterRecord(**json.loads(done.stdout))

    def variables(self, name="local"):
        done = self.run("manta", "env", "--json", "--name", name)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def close(self):
        for folder in (self.home / ".manta" / "clusters").glob("*"):
            self.run("manta", "down", "--yes", "--name", folder.name)
        shutil.rmtree(self.home)


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def shared():
    """One cluster for the tests that only look at it."""
    machine = Machine()
    machine.cluster = machine.up()
    yield machine
    machine.close()


def status_of(url, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "route",
    ["/api/version", "/api/jobs/", "/nodes?view=summary", "/api/serve/applications/", "/logs"],
)
def test_dashboard_and_job_api_refuse_who_has_no_token(shared, route):
    url = shared.cluster.dashboard_url + route
    assert status_of(url) == 401
    assert status_of(url, "0" * 64) in (401, 403)
    if route == "/api/jobs/":
        assert status_of(url, Path(shared.cluster.token_path).read_text()) == 200


def test_a_python_client_without_the_token_is_refused(shared):
    code = "import ray; ray.init(); print(ray.cluster_resources())"
    variables = shared.variables() | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    try:
        done = shared.run("python", "-c", code, timeout_s=15, **variables)
        assert done.returncode != 0
        assert "CPU" not in done.stdout
    except subprocess.TimeoutExpired:
        pass  # Ray retries a refused connection for a minute; it did not get in


def beyond_loopback(cluster):
    """Ports of the cluster that listen on more than loopback."""
    members = {process.pid for process in processes.members(cluster.cluster_id)}
    listening = [
        connection.laddr
        for connection in psutil.net_connections("inet")
        if connection.pid in members and connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    return [at.port for at in listening if at.ip.removeprefix("::ffff:") != "127.0.0.1"]


def test_nothing_of_the_cluster_listens_beyond_loopback(shared):
    assert beyond_loopback(shared.cluster) == []


def calls_a_replica(port, *token):
    """The gRPC status of a call as Serve's routers make them, with a body that means nothing."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10, metadata=[("authorization", f"Bearer {t}") for t in token])
        return refused.value.code()


def test_only_its_owner_can_read_token_and_temporary_files(shared):
    assert Path(shared.cluster.token_path).stat().st_mode & 0o077 == 0
    assert Path(shared.cluster.temp_dir).stat().st_mode & 0o077 == 0


def test_plain_ray_and_serve_commands_work_under_manta_env(shared):
    variables = shared.variables()
    words = ["--submission-id", "plain", "--", "python", "-c", JOB]
    submitted = shared.run("ray", "job", "submit", *words, **variables)
    assert submitted.returncode == 0, submitted.stderr
    logs = shared.run("ray", "job", "logs", "plain", **variables)
    assert f"job in {shared.cluster.cluster_id}" in logs.stdout
    assert "HEALTHY" in shared.run("serve", "status", **variables).stdout
    assert "CPU" in shared.run("ray", "status", **variables).stdout
    client = shared.run("python", "-c", "import ray; ray.init(); print(ray.nodes())", **variables)
    assert "127.0.0.1" in client.stdout, client.stderr


def test_a_plain_serve_config_without_http_options_answers_on_the_serve_port(shared, tmp_path):
    (tmp_path / "hello.py").write_text(
        "from ray import serve\n"
        "@serve.deployment(ray_actor_options={'num_cpus': 0})\n"
        "class Hello:\n"
        "    def __call__(self, request):\n"
        "        return 'hello'\n"
        "app = Hello.bind()\n"
    )
    config = {"name": "hello", "import_path": "hello:app", "route_prefix": "/hello"}
    config["runtime_env"] = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    (tmp_path / "hello.yaml").write_text(json.dumps({"applications": [config]}))
    done = shared.run("serve", "deploy", str(tmp_path / "hello.yaml"), **shared.variables())
    assert done.returncode == 0, done.stderr
    wait_until(lambda: status_of(f"{shared.cluster.serve_url}/hello") == 200, timeout_s=60)
    apps = json.loads(shared.run("manta", "status", "--json").stdout)["apps"]
    assert [(app["name"], app["state"]) for app in apps] == [("hello", "RUNNING")]


def test_what_an_application_opens_beyond_loopback_asks_for_the_token(shared):
    assert "hello" in shared.run("manta", "apps").stdout
    (port,) = beyond_loopback(shared.cluster)  # of the one replica, for Serve's routers
    assert calls_a_replica(port) == grpc.StatusCode.UNAUTHENTICATED
    assert calls_a_replica(port, "f" * 64) == grpc.StatusCode.UNAUTHENTICATED
    token = Path(shared.cluster.token_path).read_text().strip()
    assert calls_a_replica(port, token) != grpc.StatusCode.UNAUTHENTICATED


def test_status_shows_resources_and_doctor_finds_the_cluster_well(shared):
    status = json.loads(shared.run("manta", "status", "--json").stdout)
    assert status["state"] == "up"
    assert status["nodes"][0]["total"]["CPU"] >= 8
    report = json.loads(shared.run("manta", "doctor", "--json").stdout)
    verdicts = {check["what"]: check["verdict"] for check in report}
    assert verdicts["cluster `local`"] == verdicts["token"] == "ok"


def test_a_second_up_is_refused_and_leaves_the_first_alone(shared):
    second = shared.run("manta", "up", "--ports", "auto")
    assert second.returncode == 2
    assert "already up" in second.stderr
    assert shared.cluster.dashboard_url in second.stderr
    assert shared.run("manta", "status").returncode == 0


def test_down_asks_before_it_stops_running_jobs(shared):
    words = ["--no-wait", "--submission-id", "long", "--", "sleep", "600"]
    assert shared.run("ray", "job", "submit", *words, **shared.variables()).returncode == 0
    done = shared.run("manta", "down")
    assert done.returncode == 2
    assert "long" in done.stderr
    assert "--yes" in done.stderr
    assert shared.run("manta", "status").returncode == 0


def test_two_clusters_side_by_side_do_not_disturb_each_other(shared):
    other = shared.up("--name", "other")
    ids = [shared.cluster.cluster_id, other.cluster_id]
    for name, cluster_id in zip(("local", "other"), ids, strict=True):
        words = ["ray", "job", "submit", "--", "python", "-c", JOB]
        assert f"job in {cluster_id}" in shared.run(*words, **shared.variables(name)).stdout
    assert shared.run("manta", "down", "--name", "other", "--yes").returncode == 0
    assert processes.members(other.cluster_id) == []
    assert shared.run("manta", "status").returncode == 0


def test_a_busy_port_is_named_and_nothing_is_left(machine):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = machine.run("manta", "up", "--ports", "auto", "--serve-port", str(port))
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert f"process {os.getpid()}" in done.stderr
    assert list(machine.home.rglob("cluster.json")) == []
    assert list(machine.home.glob("manta-*")) == []


def test_a_start_that_takes_too_long_shows_rays_log_and_leaves_nothing(machine):
    done = machine.run("manta", "up", "--ports", "auto", "--timeout-s", "2")
    assert done.returncode == 1
    assert "Ray's logs" in done.stderr
    assert left_of(machine) == []
    assert list(machine.home.rglob("cluster.json")) == []


def test_ctrl_c_during_up_leaves_nothing(machine):
    up = subprocess.Popen(
        [str(BIN / "manta"), "up", "--ports", "auto"],
        env=machine.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: list(machine.home.rglob("cluster.json")))
    up.send_signal(signal.SIGINT)
    _, said = up.communicate(timeout=60)
    assert up.returncode == 130
    assert "Interrupted." in said
    assert left_of(machine) == []
    assert list(machine.home.rglob("cluster.json")) == []


def test_a_killed_cluster_is_told_and_started_again_and_down_leaves_no_process(machine):
    first = machine.up()
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(first.pid) or is_zombie(first.pid))
    status = machine.run("manta", "status", "--json")
    assert status.returncode == 1
    assert json.loads(status.stdout)["state"] == "dead"
    second = machine.up()
    assert processes.members(first.cluster_id) == []
    assert not Path(first.temp_dir).exists()
    # A driver that leaves its session and ignores SIGTERM, as a stuck engine would.
    stubborn = "import os, signal, time; os.setsid() if os.getpid() != os.getsid(0) else None; "
    stubborn += "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
    stubborn += "time.sleep(600)"
    words = ["--no-wait", "--submission-id", "stubborn", "--", "python", "-c", stubborn]
    variables = machine.variables()
    assert machine.run("ray", "job", "submit", *words, **variables).returncode == 0
    wait_until(lambda: "deaf" in machine.run("ray", "job", "logs", "stubborn", **variables).stdout)
    assert machine.run("manta", "down", "--yes").returncode == 0
    assert processes.members(second.cluster_id) == []
    assert not Path(second.temp_dir).exists()
    assert machine.run("manta", "down").stdout == "Cluster `local` is not up.\n"


def is_zombie(pid):
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def left_of(machine):
    """Processes that carry this machine's home in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(machine.home) and not is_zombie(process.pid):
                found.append(process)
        except psutil.Error:
            continue
    return found
