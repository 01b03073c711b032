"""What `manta up` would start, as a value."""

import dataclasses
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from proxies import end_all
from ray.serve._private import haproxy_templates

from manta.cluster import credentials, haproxy, local
from manta.cluster.ports import WELL_KNOWN, choose, free, is_free, require_free
from manta.errors import InputError

PORTS = choose({"gcs": 7001, "dashboard": 7002, "serve": 7003}, automatic=True)
OPTIONS = local.UpOptions(
    name="local",
    cluster_id="0123456789ab",
    ports=PORTS,
    num_cpus=8,
    object_store_memory_bytes=10**9,
    storage_url="s3://bucket/root",
    token_path=Path("/home/someone/token"),
    temp_dir=Path("/tmp/manta-0123456789ab"),
    log_path=Path("/home/someone/log"),
    haproxy="/usr/sbin/haproxy",
    inherited={"PATH": "/bin"},
)


def test_the_same_options_give_the_same_plan_which_cannot_be_changed():
    plan = local.plan_up(OPTIONS)
    assert plan == local.plan_up(OPTIONS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.argv = ()


def test_the_fast_ingress_is_on_where_there_is_one_and_can_be_switched_off():
    switch = "RAY_SERVE_ENABLE_HA_PROXY"
    assert local.plan_up(OPTIONS).environment[switch] == "1"
    without = dataclasses.replace(OPTIONS, haproxy=None)
    assert switch not in local.plan_up(without).environment
    asked = dataclasses.replace(OPTIONS, inherited={switch: "0"})
    assert local.plan_up(asked).environment[switch] == "0"


def test_haproxy_starts_with_metrics_and_statistics_on_loopback_only(tmp_path):
    config = tmp_path / "haproxy.cfg"
    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    frontends = template[template.index("frontend prometheus") :]
    text = re.sub(r"{{ config.\w*frontend_host }}", "*", frontends)
    text = re.sub(r"{{ config.\w*port }}", "9101", text)
    config.write_text(text)
    haproxy.write_script(tmp_path / "h", shutil.which("true") or "true")
    script = tmp_path / "h" / haproxy.SCRIPT
    subprocess.run([script, "-db", "-f", config, "-sf", "1"], check=True)
    end_all(config)
    lines = config.read_text().splitlines()
    binds = [line.split()[1] for line in lines if line.strip().startswith("bind ")]
    # Its own frontend is bound to what Serve's http_options say.
    assert binds == ["127.0.0.1:9101", "*:9101", "*:9101", "127.0.0.1:9101"]


def test_haproxy_is_not_told_to_hold_more_connections_than_it_may_open_files(tmp_path):
    program = haproxy.binary()
    if program is None:
        pytest.skip("no HAProxy on this platform")
    (port,) = free(1, ())
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "global\n    maxconn 4096\n    nbthread 1\n"
        "defaults\n    mode http\n    timeout client 1s\n"
        f"frontend f\n    bind 127.0.0.1:{port}\n    http-request return status 200\n"
    )
    haproxy.write_script(tmp_path / "h", program)
    start = f"ulimit -n 1024; timeout 1 %s -db -f {config}"
    runs = ["bash", "-c", start % (tmp_path / "h" / haproxy.SCRIPT)]
    refused = ["bash", "-c", start % program]
    assert subprocess.run(refused, capture_output=True).returncode == 1
    assert subprocess.run(runs).returncode == 124  # until it was ended
    end_all(config)
    assert "maxconn 412" in config.read_text()


def test_everything_is_bound_to_loopback_and_authenticated():
    plan = local.plan_up(OPTIONS)
    assert "--node-ip-address=127.0.0.1" in plan.argv
    assert "--dashboard-host=127.0.0.1" in plan.argv
    assert plan.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert plan.environment["RAY_AUTH_MODE"] == "token"
    assert plan.environment["RAY_AUTH_TOKEN_PATH"] == "/home/someone/token"


@pytest.mark.parametrize("mode", ["disabled", "", "none"])
def test_what_ran_before_cannot_open_the_cluster(mode):
    inherited = {"PATH": "/bin", "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "other"}
    plan = local.plan_up(dataclasses.replace(OPTIONS, inherited=inherited))
    assert plan.environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" in plan.unset


def test_a_choice_of_the_users_wins_over_a_default():
    inherited = {"PATH": "/bin", "HF_HUB_OFFLINE": "0", "VLLM_CPU_KVCACHE_SPACE": "4"}
    plan = local.plan_up(dataclasses.replace(OPTIONS, inherited=inherited))
    assert plan.environment["HF_HUB_OFFLINE"] == "0"
    assert plan.environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert local.plan_up(OPTIONS).environment["HF_HUB_OFFLINE"] == "1"


def test_ports_reach_the_command_the_record_and_the_jobs():
    plan = local.plan_up(OPTIONS)
    assert "--port=7001" in plan.argv
    assert "--dashboard-port=7002" in plan.argv
    assert plan.record.gcs_address == "127.0.0.1:7001"
    assert plan.record.dashboard_url == "http://127.0.0.1:7002"
    assert plan.environment["MANTA_SERVE_URL"] == plan.record.serve_url == "http://127.0.0.1:7003"


def test_the_printed_command_is_the_one_that_runs():
    plan = local.plan_up(OPTIONS)
    words = shlex.split(plan.command())
    assert words[-len(plan.argv) :] == list(plan.argv)
    assert "RAY_AUTH_MODE=token" in words


def test_a_temp_dir_too_long_for_unix_sockets_is_refused():
    with pytest.raises(InputError, match="TMPDIR"):
        local.plan_up(dataclasses.replace(OPTIONS, temp_dir=Path("/tmp/" + "long" * 12)))


def test_logical_cpus_are_at_least_eight():
    assert local.options_here("local", PORTS).num_cpus >= 8
    assert local.options_here("local", PORTS, num_cpus=3).num_cpus == 3


def test_two_clusters_have_ids_of_their_own():
    first, second = (local.options_here("local", PORTS) for _ in range(2))
    assert first.cluster_id != second.cluster_id
    assert first.temp_dir != second.temp_dir


def test_ports_are_well_known_unless_asked_otherwise():
    ports = choose({"gcs": None, "dashboard": None, "serve": 7003}, automatic=False)
    assert (ports.gcs, ports.dashboard, ports.serve) == (6379, 8265, 7003)
    assert set(WELL_KNOWN) == {"gcs", "dashboard", "serve"}


def test_automatic_ports_are_free_and_differ():
    ports = dataclasses.astuple(choose({}, automatic=True))
    assert len(set(ports)) == len(ports)
    assert all(map(is_free, ports))


def test_a_busy_port_is_named_with_its_holder_and_the_option_to_use():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InputError) as refused:
            require_free(choose({"serve": port}, automatic=True))
    message = str(refused.value)
    assert str(port) in message
    assert f"process {os.getpid()}" in message
    assert "--serve-port" in message


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    path = credentials.ensure_token("local")
    token = credentials.read_token(path)
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert credentials.read_token(credentials.ensure_token("local")) == token
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_one_up_or_down_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    with local.lock("local"), pytest.raises(InputError, match="at work"), local.lock("local"):
        pass
