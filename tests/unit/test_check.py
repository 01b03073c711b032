"""`manta check`: what passes, what does not, and that no file makes it fall over."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_yaml import generate

from manta import check
from manta.check.facts import azure, ec2, ray, serving
from manta.errors import Finding

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
PROJECT_FILES = check.project_files(ROOT)


def errors(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "error"]


def rules_of(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.rule for finding in findings}


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def manta(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manta.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


# What passes


def test_the_projects_own_cluster_files_have_no_errors_and_leave_only_what_the_user_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    clusters = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("cluster/*.yaml"))
    assert clusters
    found = check.files(clusters)
    assert not errors(found)
    # The user's own key is not here, and whether to turn gpu8 on is the user's decision.
    assert rules_of(found) <= {"cluster-ssh-key-file", "cluster-type-unreachable"}


def test_all_files_of_the_project_have_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert not errors(check.files(PROJECT_FILES))


def test_ray_itself_accepts_the_projects_cluster_files() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    for path in ROOT.glob("cluster/*.yaml"):
        validate_config(prepare_config(yaml.safe_load(path.read_text())))


MINIMAL_AWS = "cluster_name: a\nprovider: {type: aws, region: us-west-2}\n"
GPU_CONTAINER = """
cluster_name: gpu
max_workers: 2
docker: {image: "rayproject/ray-ml:latest-gpu", container_name: ray}
provider: {type: aws, region: us-west-2, availability_zone: "us-west-2a, us-west-2b"}
auth: {ssh_user: ubuntu}
available_node_types:
  ray.head.gpu:
    resources: {}
    node_config: {InstanceType: p2.xlarge, ImageId: latest_dlami}
  ray.worker:
    min_workers: 1
    docker: {worker_image: "rayproject/ray-ml:latest-cpu"}
    resources: {}
    node_config: {InstanceType: m5.large, InstanceMarketOptions: {MarketType: spot}}
head_node_type: ray.head.gpu
head_start_ray_commands:
  - ray stop
  - ulimit -n 65536; ray start --head --port=6379 --dashboard-host=0.0.0.0
    --autoscaling-config=~/ray_bootstrap_config.yaml
worker_start_ray_commands: [ray stop, "ray start --address=$RAY_HEAD_IP:6379"]
"""
TPU_POD = """
cluster_name: tpu
max_workers: 2
available_node_types:
  head:
    resources: {"CPU": 2}
    node_config:
      machineType: n2-standard-2
      disks: [{boot: true, autoDelete: true, type: PERSISTENT, initializeParams: {diskSizeGb: 50}}]
      scheduling: [{onHostMaintenance: TERMINATE}]
  tpu:
    min_workers: 1
    resources: {"TPU": 1}
    node_config:
      acceleratorConfig: {type: V4, topology: 2x2x1}
      runtimeVersion: tpu-vm-v4-base
      schedulingConfig: {preemptible: true}
head_node_type: head
provider: {type: gcp, region: us-central2, availability_zone: us-central2-b, project_id: null}
"""
SECURITY_GROUP = """
cluster_name: group
provider:
  type: aws
  region: us-west-2
  security_group:
    GroupName: mine
    IpPermissions:
      - {FromPort: 8265, ToPort: 8265, IpProtocol: TCP, IpRanges: [{CidrIp: 0.0.0.0/0}]}
auth: {ssh_user: ubuntu}
"""
AZURE_ZONES = """
cluster_name: zones
provider: {type: azure, location: westus2, resource_group: r, availability_zone: "1,2,3"}
auth: {ssh_user: ubuntu}
available_node_types:
  head:
    resources: {"CPU": 2}
    node_config:
      azure_arm_parameters: {vmSize: Standard_D2s_v3, imageVersion: latest, priority: Spot}
head_node_type: head
"""
ONPREM_AUTOMATIC = """
cluster_name: automatic
provider: {type: local, coordinator_address: "host:1234"}
min_workers: 0
max_workers: 2
auth: {ssh_user: YOUR_USERNAME}
available_node_types: {}
head_node_type: {}
head_start_ray_commands: []
"""


@pytest.mark.parametrize(
    "text",
    [MINIMAL_AWS, GPU_CONTAINER, TPU_POD, SECURITY_GROUP, AZURE_ZONES, ONPREM_AUTOMATIC],
    ids=["minimal", "gpu-container", "tpu-pod", "security-group", "azure-zones", "onprem"],
)
def test_what_rays_documentation_shows_has_warnings_but_no_error(
    text: str, tmp_path: Path
) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(text)))  # it works
    assert not errors(check.files([write(tmp_path / "cluster.yaml", text)]))


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_rays_own_defaults_have_no_error(provider: str) -> None:
    assert not errors(check.files([_installed("ray", f"autoscaler/{provider}/defaults.yaml")]))


def test_a_serve_config_as_in_the_documentation_has_no_error(tmp_path: Path) -> None:
    text = """
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options: {port: 9000, grpc_servicer_functions: []}
logging_config: {encoding: JSON, log_level: INFO, logs_dir: null, enable_access_log: true}
applications:
  - name: text
    route_prefix: /
    import_path: text_ml:app
    runtime_env: {working_dir: "https://example.com/archive/main.zip", pip: [torch]}
    deployments:
      - name: Translator
        num_replicas: auto
        autoscaling_config: {min_replicas: 1, initial_replicas: null, max_replicas: 4}
        user_config: {language: french}
        ray_actor_options: {num_cpus: 0.2, num_gpus: 0.0}
  - name: llm
    route_prefix: /llm
    import_path: ray.serve.llm:build_openai_app
    args:
      llm_configs:
        - model_loading_config: {model_id: qwen, model_source: Qwen/Qwen2.5-0.5B-Instruct}
          accelerator_type: A10G
          engine_kwargs: {tensor_parallel_size: 2, max_model_len: 8192}
          runtime_env: {env_vars: {HF_TOKEN: <your token>}}
"""
    assert not errors(check.files([write(tmp_path / "serve.yaml", text)]))


def test_kubernetes_manifests_are_named_as_not_checked_and_no_error(tmp_path: Path) -> None:
    one = write(tmp_path / "a.yaml", "apiVersion: ray.io/v1\nkind: RayCluster\n")
    two = write(
        tmp_path / "b.yaml", "apiVersion: v1\nkind: Secret\n---\napiVersion: v1\nkind: X\n"
    )
    assert [f.severity for f in check.files([one, two])] == ["info", "info"]


# Ray's judgement and ours


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.yaml")), ids=lambda path: path.stem)
def test_whatever_ray_refuses_in_the_corpus_is_an_error_here(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.serve.schema import ServeDeploySchema

    try:
        value = yaml.safe_load(path.read_text())
        if "cluster_name" in value:
            validate_config(prepare_config(value))
        elif "applications" in value:
            ServeDeploySchema.model_validate(value)
    except (Exception, SystemExit):
        assert errors(check.files([path]))


def _installed(package: str, file: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / file


def _fields(path: Path, name: str) -> set[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            return {each for each in names if not each.startswith("_")}
    raise AssertionError(f"{path} has no class {name}")


def test_the_known_serve_keys_are_those_of_the_installed_ray() -> None:
    for name, known in serving.SERVE_KEYS.items():
        in_config = name in _classes(_installed("ray", "serve/config.py"))
        file = "serve/config.py" if in_config else "serve/schema.py"
        assert _fields(_installed("ray", file), name) == known, name


def test_the_known_llm_keys_are_those_of_the_installed_ray() -> None:
    for name, known in serving.LLM_KEYS.items():
        configs = _installed("ray", "llm/_internal/serve/core/configs/llm_config.py")
        builder = _installed("ray", "llm/_internal/serve/core/ingress/builder.py")
        file = configs if name in _classes(configs) else builder
        assert _fields(file, name) == known, name


def _classes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_known_engine_arguments_are_those_of_the_installed_vllm() -> None:
    source = _installed("vllm", "engine/arg_utils.py")
    fields = _fields(source, "EngineArgs") | _fields(source, "AsyncEngineArgs")
    assert fields == serving.VLLM_ENGINE_KEYS


def test_the_known_options_of_ray_start_are_those_of_the_installed_ray() -> None:
    from ray.scripts.scripts import start

    names = [name for option in start.params for name in option.opts]
    assert {name[2:] for name in names if name.startswith("--")} <= ray.START_OPTIONS


def test_the_known_azure_parameters_are_those_of_rays_template() -> None:
    template = _installed("ray", "autoscaler/_private/_azure/azure-vm-template.json")
    parameters = set(json.loads(template.read_text())["parameters"])
    assert parameters | {"availability_zone"} == azure.ARM_PARAMETERS


def test_the_known_ec2_names_are_those_of_the_installed_botocore() -> None:
    loaders = pytest.importorskip("botocore.loaders")
    shapes = loaders.Loader().load_service_model("ec2", "service-2")["shapes"]
    assert set(shapes["InstanceType"]["enum"]) == ec2.INSTANCE_TYPES
    assert set(shapes["RunInstancesRequest"]["members"]) == ec2.RUN_INSTANCES_KEYS[""]


# Beyond one YAML file


def test_a_builder_in_the_working_directory_is_read_for_what_it_takes(tmp_path: Path) -> None:
    source = """
from pydantic import BaseModel

class Settings(BaseModel):
    model: str
    temperature: float = 0.0

def build(settings: Settings):
    ...
"""
    write(tmp_path / "apps" / "echo.py", source)
    serve = """
applications:
  - name: echo
    import_path: apps.echo:build
    args: {model: x, temprature: 1.0}
  - name: other
    route_prefix: /other
    import_path: apps.echo:biuld
"""
    found = errors(check.files([write(tmp_path / "serve.yaml", serve)], root=tmp_path))
    assert [(f.rule, f.line, f.fix) for f in found] == [
        ("serve-builder", 5, "did you mean `temperature`?"),
        ("serve-builder", 8, "did you mean `build`?"),
    ]


def test_a_working_directory_over_rays_limit_is_an_error_unless_it_is_excluded(
    tmp_path: Path,
) -> None:
    with (tmp_path / "weights.bin").open("wb") as stream:
        stream.truncate(600 * 2**20)  # sparse: takes no disk
    job = "name: j\nentrypoint: 'true'\n"
    found = check.files([write(tmp_path / "a.yaml", job)], root=tmp_path)
    assert rules_of(found) == {"working-dir-too-large"}
    job += "runtime_env: {excludes: ['*.bin']}\n"
    assert not check.files([write(tmp_path / "b.yaml", job)], root=tmp_path)


def test_a_working_directory_that_cannot_be_is_no_crash(tmp_path: Path) -> None:
    for i, given in enumerate(("~nobody-here/x", "x" * 5000, "/", "")):
        text = f"name: j\nentrypoint: 'true'\nruntime_env: {{working_dir: '{given}', "
        path = write(tmp_path / f"{i}.yaml", text + "excludes: ['.', '/', '[', '']}\n")
        check.files([path], root=tmp_path)


def test_a_replica_fits_if_any_cluster_among_the_files_has_room(tmp_path: Path) -> None:
    serve = "applications:\n  - import_path: a:b\n    deployments:\n      - name: D\n"
    serve += "        ray_actor_options: {num_gpus: 1, accelerator_type: L4}\n"
    path = write(tmp_path / "serve.yaml", serve)
    small, large = CORPUS / "companions/cluster.yaml", CORPUS / "companions/cluster-l4.yaml"
    assert "serve-unplaceable" in rules_of(check.files([small, path]))
    assert "serve-unplaceable" not in rules_of(check.files([small, large, path]))
    assert "serve-unplaceable" not in rules_of(check.files([path]))


def test_a_config_that_a_pipeline_names_is_checked_as_that_scripts_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "jobs/train.py", "")
    write(tmp_path / "configs/a.yaml", "name: x\ndataset: d\nnum_steps: -1\n")
    text = "name: p\nsteps:\n  - name: t\n    entrypoint: python jobs/train.py\n"
    pipeline = write(tmp_path / "p.yaml", text + "    config: configs/a.yaml\n")
    found = check.files([pipeline])
    assert [(f.file, f.line, f.rule) for f in found] == [("configs/a.yaml", 3, "wrong-value")]


# Broken files

SEEDS = [yaml.safe_load((ROOT / name).read_text()) for name in PROJECT_FILES] + [
    yaml.safe_load(text) for text in (GPU_CONTAINER, TPU_POD, SECURITY_GROUP)
]


def test_a_thousand_broken_files_give_findings_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for how, content, is_broken in generate(SEEDS, count=1000, seed=2026):
        path.write_bytes(content)
        start = time.process_time()
        found = check.files([path])
        assert time.process_time() - start < 2, how
        assert errors(found) or not is_broken, (how, content[:200])


def test_the_command_stays_small_and_exits_2_on_hostile_files(tmp_path: Path) -> None:
    deep = write(tmp_path / "deep.yaml", "a: " + "[" * 100_000)
    width = "[" + ", ".join(["*{}"] * 10) + "]"
    levels = [
        f"{name}: &{name} {width.format(*[last] * 10)}"
        for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    bomb = write(tmp_path / "bomb.yaml", "a: &a [x, x]\n" + "\n".join(levels))
    files = [deep, bomb, str(tmp_path / "none.yaml"), str(tmp_path)]
    # A small process between: a child's peak counts from its fork, and this one may be large.
    measure = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, "-m", "manta.cli.main", "check", *files]
    done = subprocess.run(
        [sys.executable, "-c", measure, *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.count("error: ") == 4
    peak_kib = int(done.stdout.split("peak ")[1])
    assert peak_kib * 1024 < 500 * 2**20


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    fd = os.open(tmp_path / "pipe.yaml", os.O_RDWR)  # so that opening it does not block
    try:
        assert rules_of(check.files([tmp_path / "pipe.yaml"])) == {"unreadable"}
    finally:
        os.close(fd)


# The command


def test_the_command_prints_one_line_for_each_finding_and_counts_them() -> None:
    path = str(CORPUS / "region-aws.yaml")
    done = manta("check", path)
    assert done.returncode == 2
    assert f"{path}:6: aws has no region `us-weast-2`; did you mean `us-west-2`?" in done.stdout
    assert "[error: cluster-region]" in done.stdout
    assert done.stderr.strip() == "1 file: 1 error"


def test_warnings_alone_exit_0() -> None:
    assert manta("check", str(CORPUS / "dashboard-open.yaml")).returncode == 0


def test_json_holds_every_field_of_a_finding() -> None:
    done = manta("check", "--json", str(CORPUS / "region-aws.yaml"))
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["files"] == 1
    assert {"file", "line", "rule", "severity", "what", "fix"} == set(report["findings"][0])


def test_rules_are_listed_with_severity_and_reason() -> None:
    lines = manta("check", "--rules").stdout.splitlines()
    assert len(lines) == len(check.RULES) + 1
    for rule in check.RULES.values():
        assert rule.reason.endswith((".", ")")), rule.id


def test_without_files_and_outside_a_project_the_command_says_what_to_do(tmp_path: Path) -> None:
    done = manta("check", cwd=tmp_path)
    assert done.returncode == 2
    assert "manta check FILE" in done.stderr
