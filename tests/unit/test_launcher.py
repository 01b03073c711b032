"""What is given to Ray's launcher: the user's file and what closes it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from manta.cli import main
from manta.cluster import cloud_errors, joining, launcher, outlook
from manta.cluster.launcher import LaunchOptions, plan_launch
from manta.errors import InputError, InvalidSpec
from manta.plan.clusters import Cluster, NodeType
from manta.spec.catalog import Catalog

CLOUD = {
    "cluster_name": "theirs",
    "provider": {"type": "aws", "region": "us-west-2"},
    "auth": {"ssh_user": "ubuntu"},
    "available_node_types": {
        "head": {"resources": {}, "node_config": {"InstanceType": "m7i.xlarge"}},
        "cpu": {"resources": {}, "node_config": {"InstanceType": "m7i.xlarge"}, "min_workers": 2},
    },
    "head_node_type": "head",
    "file_mounts": {"~/code": "code"},
    "head_start_ray_commands": [
        "ray stop",
        "ulimit -n 65536; ray start --head --port=6380 --dashboard-host 0.0.0.0",
    ],
    "worker_start_ray_commands": ["ray start --address=$RAY_HEAD_IP:6380"],
}
ON_PREMISE = {
    "cluster_name": "theirs",
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]},
    "auth": {"ssh_user": "ray", "ssh_private_key": "~/.ssh/key"},
    "setup_commands": ["echo set up"],
    "min_workers": 2,
}


def options(config, **changes):
    made = LaunchOptions(
        name="mine",
        source=Path("/somewhere/c.yaml"),
        config_passthrough=config,
        folder=Path("/home/me/.manta/clusters/mine"),
        cluster_id="abc",
        dashboard_port=20001,
        serve_port=20002,
        gcs_port=20003,
        storage_url="s3://bucket/team",
        token_path=Path("/home/me/.manta/clusters/mine/auth_token"),
        temp_dir=Path("/tmp/manta-abc"),
    )
    return replace(made, **changes)


def derived(config, **changes):
    return yaml.safe_load(plan_launch(options(config, **changes)).config_text)


def exported(command):
    words = shlex.split(command.split("export ", 1)[1].split("; ", 1)[0])
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("config", [CLOUD, ON_PREMISE], ids=["cloud", "on-premise"])
def test_every_ray_start_has_the_token_the_mode_and_the_clusters_id(config):
    made = derived(config)
    commands = [*made["head_start_ray_commands"], *made["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        variables = exported(command)
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_AUTH_TOKEN_PATH"] == launcher.TOKEN_MOUNT
        assert variables["MANTA_CLUSTER_ID"] == "abc"
        assert variables["MANTA_STORAGE"] == "s3://bucket/team"
        assert command.index("export RAY_AUTH_MODE") < command.index("ray start")
    assert made["file_mounts"][launcher.TOKEN_MOUNT].endswith("clusters/mine/auth_token")


@pytest.mark.parametrize(
    "start",
    [
        "ray start --head",
        "ray start --head --dashboard-host=0.0.0.0 --port=1",
        "ray start --dashboard-host 10.0.0.1 --head",
        "sudo ray start --head --dashboard-host '0.0.0.0'",
    ],
)
def test_the_dashboard_listens_on_loopback_whatever_the_file_says(start):
    head = derived(CLOUD | {"head_start_ray_commands": [start]})["head_start_ray_commands"][0]
    assert head.count("--dashboard-host") == 1
    assert "--dashboard-host=127.0.0.1" in head


def test_the_plain_file_is_not_changed_and_its_name_gives_way():
    before = yaml.safe_dump(CLOUD)
    assert derived(CLOUD)["cluster_name"] == "mine"
    assert yaml.safe_dump(CLOUD) == before


def test_relative_paths_are_made_absolute_so_that_later_commands_may_run_elsewhere():
    assert derived(CLOUD)["file_mounts"]["~/code"] == str(Path("code").absolute())


def test_stopped_machines_are_not_kept_unless_the_file_asks_for_it():
    assert derived(CLOUD)["provider"]["cache_stopped_nodes"] is False
    kept = CLOUD | {"provider": CLOUD["provider"] | {"cache_stopped_nodes": True}}
    assert derived(kept)["provider"]["cache_stopped_nodes"] is True


def test_an_on_premise_head_does_not_count_among_the_workers():
    made = derived(ON_PREMISE, worker_resources={"CPU": 4.0})
    types = made["available_node_types"]
    assert made["head_node_type"] == "head"
    assert types["head"]["max_workers"] == 0
    assert types["local.cluster.node"]["min_workers"] == 2
    assert types["local.cluster.node"]["resources"] == {"CPU": 4.0}
    assert made["worker_setup_commands"] == ["echo set up"]


def test_an_on_premise_head_is_written_into_the_state_that_its_autoscaler_reads(tmp_path):
    head = derived(ON_PREMISE)["head_start_ray_commands"][-1]
    writing = head.split("; ")[0]
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "-c", writing], env=environment, check=True)
    state = json.loads((tmp_path / "ray/cluster-mine.state").read_text())
    assert state["10.0.0.1"]["state"] == "running"
    assert state["10.0.0.1"]["tags"]["ray-node-type"] == "head"


def test_ray_takes_the_derived_on_premise_file_as_it_is():
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = derived(ON_PREMISE)
    assert prepare_config(made) == made
    validate_config(made)


def test_the_record_knows_ports_hosts_and_minimum_workers():
    launched = plan_launch(options(CLOUD)).record.launched
    assert (launched.gcs_port, launched.dashboard_port) == (6380, 8265)
    assert launched.num_min_workers == 2
    assert plan_launch(options(ON_PREMISE)).record.launched.hosts == ("10.0.0.2", "10.0.0.3")


def test_a_file_that_starts_no_head_is_refused():
    with pytest.raises(InputError, match="no `ray start`"):
        plan_launch(options(CLOUD | {"head_start_ray_commands": ["true"]}))


def test_tls_makes_a_certificate_on_the_host_before_ray_starts():
    head = derived(CLOUD, tls=True)["head_start_ray_commands"][1]
    assert head.index("openssl x509") < head.index("ray start")
    assert exported(head)["RAY_USE_TLS"] == "1"


@pytest.mark.parametrize(
    ("said", "what", "fix"),
    [
        (
            "An error occurred (InsufficientInstanceCapacity) when calling RunInstances",
            "free",
            "zone",
        ),
        (
            "botocore.exceptions.ClientError: (VcpuLimitExceeded) You have requested",
            "quota",
            "quota",
        ),
        (
            "botocore.exceptions.NoCredentialsError: Unable to locate credentials",
            "no cred",
            "log in",
        ),
        ("google.auth.exceptions.DefaultCredentialsError: not found", "no cred", "gcloud"),
        ("Code: ZONE_RESOURCE_POOL_EXHAUSTED", "free", "zone"),
        ("Quota 'NVIDIA_L4_GPUS' exceeded.  Limit: 1.0", "quota", "quota"),
        ("(QuotaExceeded) Operation could not be completed", "quota", "quota"),
        ("(SkuNotAvailable) The requested size is not available", "free", "zone"),
        (
            "UnauthorizedOperation: You are not authorized to perform: ec2:RunInstances",
            "lack",
            "grant",
        ),
    ],
)
def test_a_clouds_error_is_shown_with_its_meaning_and_what_to_do(said, what, fix):
    error = cloud_errors.explained("the head was not started", f"INFO hello\n{said}\nINFO bye")
    assert said in error.what
    assert what in error.what
    assert fix in error.fix


def test_an_unknown_error_is_quoted_whole():
    assert "something new" in cloud_errors.explained("it failed", "a\nsomething new\n").what


def test_waiting_demand_is_told_with_the_schedulers_reason():
    planned = Cluster(
        file="c",
        name="c",
        provider="aws",
        cloud="aws",
        region="us-west-2",
        head="head",
        max_workers=2,
        node_types=(
            NodeType(name="head", resources={"CPU": 0.0}),
            NodeType(name="cpu", resources={"CPU": 4.0}, max_workers=2),
        ),
    )
    lines = [" {'GPU': 1.0}: 3+ pending tasks/actors", " (no more)"]
    (waiting,) = outlook.waiting(lines, planned, Catalog())
    assert "GPU" in waiting.what
    assert "GPU" in waiting.why


def run(*words, home):
    environment = {"MANTA_HOME": str(home)}
    done = CliRunner().invoke(main.cli, ["up", *words], env=environment)
    return done.exception, done.output


@pytest.mark.parametrize("words", [["--yes"], ["--tls"], ["--keep"]])
def test_options_for_a_file_are_refused_without_one(words, tmp_path):
    error, _ = run(*words, home=tmp_path)
    assert isinstance(error, InputError)
    assert "manta up FILE" in error.fix


def test_a_file_with_an_error_is_not_launched_and_nothing_is_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CLOUD | {"max_worker": 3}))
    error, _ = run(str(file), "--yes", home=tmp_path / "home")
    assert isinstance(error, InvalidSpec)
    assert "max_worker" in str(error)
    assert not (tmp_path / "home").exists()


def test_a_dry_run_prints_the_plain_command_and_what_is_added(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CLOUD))
    error, output = run(str(file), "--dry-run", "--name", "mine", home=tmp_path / "home")
    assert error is None, error
    assert f"ray up {tmp_path}/home/clusters/mine/cluster.yaml" in output
    assert "RAY_AUTH_MODE=token" in output
    assert "m7i.xlarge" in output
    assert not (tmp_path / "home/clusters/mine/cluster.yaml").exists()


def test_without_somebody_to_ask_nothing_is_launched(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CLOUD))
    error, _ = run(str(file), home=tmp_path / "home")
    assert isinstance(error, InputError)
    assert "--yes" in error.fix


MONITOR = """
NodeUpdater: 10.0.0.3: Got remote shell
2026-11-22 01:00:00,001 INFO command_runner.py:234 -- Fetched IP: 10.0.0.2
ssh: connect to host 10.0.0.2 port 22: No route to host
2026-11-22 01:00:01,001\tVVINFO command_runner.py:1 -- Full command is `ssh a@10.0.0.3 bash -c x`
no space left
2026-11-22 01:00:01,001\tVVINFO command_runner.py:1 -- Full command is `ssh a@10.0.0.2 bash -c x`
a@10.0.0.2: Permission denied
"""


def test_lines_of_the_autoscalers_log_count_for_the_host_that_was_named_last():
    lines = joining.lines_of(MONITOR, "10.0.0.2")
    assert lines[0] == "Fetched IP: 10.0.0.2"
    assert "No route to host" in lines[1]
    assert lines[2] == "a@10.0.0.2: Permission denied"
    assert joining.lines_of(MONITOR, "10.0.0.3")[-1] == "no space left"
    assert joining.lines_of(MONITOR, "10.0.0.9") == []


def test_a_launch_without_credentials_starts_nothing_and_leaves_no_record(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CLOUD))
    nowhere = {
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
        "MANTA_HOME": str(tmp_path / "home"),
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-m", "manta.cli.main", "up", str(file), "--yes", "--name", "mine"],
        env=kept | nowhere,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "this machine has no credentials for the cloud" in done.stderr
    assert "Nothing was started." in done.stderr
    assert not (tmp_path / "home/clusters/mine/cluster.json").exists()
