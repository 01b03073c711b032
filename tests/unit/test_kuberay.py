"""KubeRay manifests: what is carried over, what is listed as missing, whether ours are fresh.

With KUBERAY_CRDS naming a folder that holds KubeRay's `ray.io_*.yaml` CRDs, manifests are also
validated against them, unknown fields refused.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from manta.plan.clusters import read_cluster
from manta.plan.kuberay import Rendered, render_cluster, render_job, render_service
from manta.spec import JobSpec, load
from manta.spec.catalog import load_catalog

ROOT = Path(__file__).parents[2]
CLUSTERS = ("aws", "gcp", "azure", "onprem")
JOB, APP = "configs/jobs/train.yaml", "serve_apps/llm-gpu.yaml"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@functools.cache
def rendered(name: str, kind: str = "RayCluster") -> Rendered:
    catalog = load_catalog()
    cluster = read_cluster(f"cluster/{name}.yaml", catalog)
    if kind == "RayJob":
        return render_job(cluster, catalog, load(JOB, JobSpec))
    if kind == "RayService":
        return render_service(cluster, catalog, APP)
    return render_cluster(cluster, catalog)


def groups(manifest: Any) -> dict[str, Any]:
    return {group["groupName"]: group for group in manifest["spec"]["workerGroupSpecs"]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_ray_cluster_has_what_the_operator_needs(name: str) -> None:
    manifest = yaml.safe_load(rendered(name).to_yaml())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    templates = [spec["headGroupSpec"]["template"]]
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        templates.append(group["template"])
    for template in templates:
        assert template["spec"]["containers"][0]["image"]


def test_groups_keep_limits_priority_labels_market_and_gpus() -> None:
    group = groups(rendered("gcp").manifest_passthrough)["gpu-spot"]
    assert (group["minReplicas"], group["maxReplicas"], group["priority"]) == (0, 8, 10)
    assert group["labels"]["manta/market"] == "spot"
    assert group["rayStartParams"].items() >= {"num-cpus": "8", "num-gpus": "1"}.items()
    pod = group["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(("name", "kind"), [("gcp", "L4"), ("azure", "A100"), ("aws", "L4")])
def test_rays_autoscaler_reads_which_accelerator_a_group_has(name: str, kind: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

    start = groups(rendered(name).manifest_passthrough)["gpu-spot"]["rayStartParams"]
    assert _get_custom_resources({}, start, "gpu-spot") == {f"accelerator_type:{kind}": 1}


def test_the_head_takes_no_work() -> None:
    head = rendered("aws").manifest_passthrough["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_key_of_the_cluster_file_is_carried_over_or_listed(name: str) -> None:
    carried = {
        "cluster_name", "max_workers", "min_workers", "idle_timeout_minutes", "provider",
        "docker", "available_node_types", "head_node_type",
    }  # fmt: skip
    document = yaml.safe_load(Path(f"cluster/{name}.yaml").read_text())
    listed = "\n".join(rendered(name).missing)
    for key in set(document) - carried:
        assert f"{key}:" in listed
    for key in set(document["provider"]) - {"type", "region", "location"}:
        assert f"provider.{key}:" in listed
    for kind, entry in (document.get("available_node_types") or {}).items():
        extra = set(entry["node_config"]) - {
            "InstanceType", "machineType", "InstanceMarketOptions", "scheduling",
        }  # fmt: skip
        for key in extra:
            assert any(line.startswith(f"{kind}.node_config") and key in line
                       for line in rendered(name).missing)  # fmt: skip


def test_the_list_stands_on_top_of_the_manifest() -> None:
    made = rendered("aws")
    lines = made.to_yaml().splitlines()
    assert lines[1 : 1 + len(made.missing)] == [f"# - {item}" for item in made.missing]


def test_a_job_and_a_service_hold_the_same_cluster() -> None:
    cluster = rendered("gcp").manifest_passthrough["spec"]
    job = rendered("gcp", "RayJob").manifest_passthrough["spec"]
    service = rendered("gcp", "RayService").manifest_passthrough["spec"]
    assert job["rayClusterSpec"] == cluster == service["rayClusterConfig"]
    assert job["entrypoint"].startswith("python")
    served = yaml.safe_load(service["serveConfigV2"])
    assert served["applications"] == yaml.safe_load(Path(APP).read_text())["applications"]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("raycluster.yaml", "RayCluster"),
        ("rayjob.yaml", "RayJob"),
        ("rayservice.yaml", "RayService"),
    ],
)
def test_the_committed_manifests_are_rendered_from_todays_files(file: str, kind: str) -> None:
    """Renew one with `manta render kuberay cluster/gcp.yaml … > cluster/kuberay/FILE`."""
    assert (ROOT / "cluster/kuberay" / file).read_text() == rendered("gcp", kind).to_yaml()


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no CRD folder")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_manifests_are_valid_against_the_crds(name: str, kind: str) -> None:
    import jsonschema

    file = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind.lower()}s.yaml"
    crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    versions = {version["name"]: version["schema"] for version in crd["spec"]["versions"]}
    schema = versions["v1"]["openAPIV3Schema"]
    _forbid_unknown(schema)
    schema["properties"]["metadata"] = {}
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(rendered(name, kind).to_yaml()))


def _forbid_unknown(schema: Any) -> None:
    """As the API server prunes them: what a schema does not name is not a field."""
    if isinstance(schema, list):
        for item in schema:
            _forbid_unknown(item)
    if not isinstance(schema, dict):
        return
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema.pop("anyOf", None)
    schema.pop("format", None)
    for value in list(schema.values()):
        _forbid_unknown(value)
