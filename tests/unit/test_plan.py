"""Plans: demand, prices, energy, what waits and why, cheaper choices, order of clusters."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from manta.cli.main import main
from manta.cluster.price_lists import parse_aws, parse_azure, price_file
from manta.errors import InputError, InvalidSpec
from manta.plan.clusters import Cluster, NodeType, read_cluster
from manta.plan.compare import cheapest_first
from manta.plan.demand import Demand, demand_of_app, demand_of_job, parse_demand
from manta.plan.explain import advise
from manta.plan.nodes import Plan, plan_cluster
from manta.plan.price import quote
from manta.spec.catalog import Catalog, load_catalog

ROOT = Path(__file__).parents[2]
PRICES = sorted((ROOT / "cluster" / "prices").glob("*-20*.yaml"))
TEST_PRICES = """
cloud: aws
updated: 2026-11-01
pue: {value: 1.5, source: test}
regions: {us-test-1: {grid_gco2e_per_kwh: 400, source: test}}
instance_types:
  small: {num_cpus: 4, memory_gib: 16, usd_per_hour: {us-test-1: 0.1}, idle_watts: 10, full_watts: 40, power_source: test}
  one: {num_cpus: 8, memory_gib: 32, num_gpus: 1, accelerator: L4, usd_per_hour: {us-test-1: 1.0}, spot_usd_per_hour: {us-test-1: 0.4}, idle_watts: 50, full_watts: 200, power_source: test}
  eight: {num_cpus: 96, memory_gib: 1152, num_gpus: 8, accelerator: A100, usd_per_hour: {us-test-1: 20}}
"""  # noqa: E501
CLUSTER = """
cluster_name: six
max_workers: 20
provider: {type: aws, region: us-test-1}
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, node_config: {InstanceType: small}}
  gpu-spot:
    max_workers: 4
    priority: 10
    resources: {CPU: 8, GPU: 1}
    node_config: {InstanceType: one, InstanceMarketOptions: {MarketType: spot}}
  gpu: {max_workers: 8, resources: {CPU: 8, GPU: 1}, node_config: {InstanceType: one}}
  gpu8: {max_workers: 2, resources: {CPU: 96, GPU: 8}, node_config: {InstanceType: eight}}
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return load_catalog([write(tmp_path, "prices.yaml", TEST_PRICES)])


@pytest.fixture
def cluster(tmp_path: Path, catalog: Catalog) -> Cluster:
    return read_cluster(write(tmp_path, "six.yaml", CLUSTER), catalog)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def planned(cluster: Cluster, catalog: Catalog, demand: str) -> Plan:
    asked = parse_demand(demand)
    return advise(plan_cluster(cluster, asked, catalog), asked, catalog)


def launched(plan: Plan) -> dict[str, int]:
    return {line.node_type: line.count for line in plan.lines if line.role == "worker"}


def test_six_gpus_start_an_eight_gpu_node_and_the_plan_names_the_cheaper_change(
    cluster: Cluster, catalog: Catalog, tmp_path: Path
) -> None:
    plan = planned(cluster, catalog, '{"GPU": 1}x6')
    assert launched(plan) == {"gpu8": 1}
    advice = plan.advice[0]
    assert dict(advice.launches) == {"gpu-spot": 4, "gpu": 2}
    assert advice.usd_per_hour == pytest.approx(0.1 + 4 * 0.4 + 2 * 1.0)
    assert advice.saves_usd_per_hour == pytest.approx(20.1 - 3.7)
    assert "`max_workers: 0` under available_node_types.gpu8" in advice.change


def test_the_advised_change_written_into_the_file_gives_what_the_advice_says(
    cluster: Cluster, catalog: Catalog, tmp_path: Path
) -> None:
    advice = planned(cluster, catalog, '{"GPU": 1}x6').advice[0]
    text = CLUSTER.replace("gpu8: {max_workers: 2", "gpu8: {max_workers: 0")
    changed = read_cluster(write(tmp_path, "changed.yaml", text), catalog)
    plan = planned(changed, catalog, '{"GPU": 1}x6')
    assert launched(plan) == dict(advice.launches)
    assert plan.usd_per_hour == pytest.approx(advice.usd_per_hour)


def test_a_raised_limit_is_advised_apart_when_it_is_cheaper_still(
    cluster: Cluster, catalog: Catalog
) -> None:
    within, beyond = planned(cluster, catalog, '{"GPU": 1}x6').advice
    assert dict(beyond.launches) == {"gpu-spot": 6}
    assert beyond.usd_per_hour < within.usd_per_hour
    assert "available_node_types.gpu-spot" in beyond.change


def test_nothing_is_advised_where_ray_chose_the_cheapest(
    cluster: Cluster, catalog: Catalog
) -> None:
    assert planned(cluster, catalog, '{"GPU": 1}x4').advice == ()


def test_a_run_costs_its_hours_and_on_demand_is_told_apart(
    cluster: Cluster, catalog: Catalog
) -> None:
    plan = plan_cluster(cluster, parse_demand('{"GPU": 1}x4'), catalog, hours=3)
    assert plan.usd_per_hour == pytest.approx(0.1 + 4 * 0.4)
    assert plan.on_demand_usd_per_hour == pytest.approx(0.1 + 4 * 1.0)


def test_energy_is_watts_times_pue_and_co2_is_energy_times_grid(
    cluster: Cluster, catalog: Catalog
) -> None:
    energy = planned(cluster, catalog, '{"GPU": 1}x4').energy
    assert energy is not None
    assert energy.full_kwh_per_hour == pytest.approx((40 + 4 * 200) / 1000 * 1.5)
    assert energy.idle_kwh_per_hour == pytest.approx((10 + 4 * 50) / 1000 * 1.5)
    assert energy.full_gco2e_per_hour == pytest.approx(energy.full_kwh_per_hour * 400)
    assert "PUE: test" in energy.sources


def test_energy_without_a_known_power_says_whose_is_missing(
    cluster: Cluster, catalog: Catalog
) -> None:
    energy = planned(cluster, catalog, '{"GPU": 8}').energy
    assert energy is not None
    assert energy.without == ("gpu8",)


@pytest.mark.parametrize(
    ("demand", "why"),
    [
        ('{"TPU": 1}', "no TPU"),
        ('{"GPU": 16}', "asks for {GPU: 16}, the largest has {GPU: 8}"),
        ('{"CPU": 96, "GPU": 1}x5', "at their limit (gpu8 max_workers: 2)"),
        ('STRICT_SPREAD[{"GPU": 8}x3]', "needs 3 nodes, one for each bundle; 2 allowed"),
        ('STRICT_PACK[{"GPU": 6}x2]', "asks for {GPU: 12}, the largest has {GPU: 8}"),
    ],
)
def test_what_waits_says_why(cluster: Cluster, catalog: Catalog, demand: str, why: str) -> None:
    (pending,) = planned(cluster, catalog, demand).pending
    assert why in pending.why


def test_the_clusters_own_limit_is_named(tmp_path: Path, catalog: Catalog) -> None:
    text = CLUSTER.replace("max_workers: 20", "max_workers: 1")
    small = read_cluster(write(tmp_path, "small.yaml", text), catalog)
    (pending,) = planned(small, catalog, '{"CPU": 8, "GPU": 1}x30').pending
    assert "the cluster is at its limit (max_workers: 1)" in pending.why


def test_aws_node_types_without_resources_get_what_ray_detects(
    tmp_path: Path, catalog: Catalog
) -> None:
    text = CLUSTER.replace("gpu: {max_workers: 8, resources: {CPU: 8, GPU: 1},", "gpu: {")
    node = read_cluster(write(tmp_path, "auto.yaml", text), catalog).node_type("gpu")
    assert node.resources["CPU"] == 8
    assert node.resources["GPU"] == 1
    assert node.resources["accelerator_type:L4"] == 1
    assert node.resources["memory"] == int(32 * 2**30 * 0.7)
    assert node.max_workers == 20


def test_a_price_of_another_region_is_used_and_named(tmp_path: Path, catalog: Catalog) -> None:
    text = CLUSTER.replace("us-test-1", "us-test-2")
    plan = planned(read_cluster(write(tmp_path, "else.yaml", text), catalog), catalog, '{"CPU":1}')
    assert any("price of us-test-1; none known for us-test-2" in note for note in plan.notes)


def test_an_owned_machine_costs_its_capital_upkeep_and_electricity(tmp_path: Path) -> None:
    prices = load_catalog([ROOT / "cluster/prices/onprem-example.yaml"])
    cluster = read_cluster(ROOT / "cluster/onprem.yaml", prices)
    worker = next(node for node in cluster.node_types if node.name != "head")
    fixed = (90_000 / 4 + 6_000) / (8_760 * 0.6)
    assert quote(worker, cluster, prices).usd_per_hour == pytest.approx(
        fixed + 2_100 / 1000 * 1.4 * 0.16
    )


def test_a_users_price_wins_over_the_built_in_one(tmp_path: Path) -> None:
    mine = "cloud: aws\nupdated: 2026-11-02\ninstance_types: {g6.2xlarge: {usd_per_hour: {us-west-2: 0.5}}}\n"  # noqa: E501
    catalog = load_catalog([*PRICES, write(tmp_path, "mine.yaml", mine)])
    machine = catalog.find("aws", "g6.2xlarge")
    assert machine is not None
    assert machine.prices["us-west-2"].on_demand_usd_per_hour == 0.5
    assert machine.prices["us-west-2"].spot_usd_per_hour is not None
    assert machine.num_gpus == 1


def test_the_price_files_hold_sixty_machines_of_three_clouds_with_sources() -> None:
    catalog = load_catalog(PRICES)
    assert catalog.clouds == ("aws", "azure", "gcp")
    assert len(catalog.instance_types) >= 60
    assert all(machine.source for machine in catalog.instance_types.values())
    assert any(machine.num_tpus for machine in catalog.instance_types.values())
    for machine in catalog.instance_types.values():
        assert machine.power is None or machine.power.idle_watts < machine.power.full_watts
        for price in machine.prices.values():
            listed, spot = price.on_demand_usd_per_hour, price.spot_usd_per_hour
            assert listed is None or 0 < listed < 500
            assert spot is None or listed is None or 0 < spot <= listed


def test_a_broken_price_file_is_named_with_its_line(tmp_path: Path) -> None:
    broken = write(tmp_path, "p.yaml", "cloud: aws\nupdated: 2026-11-01\npue: {value: 0.5}\n")
    with pytest.raises(InvalidSpec, match=r"p\.yaml:3: "):
        load_catalog([broken])


def test_clusters_come_cheapest_first_and_those_that_leave_work_waiting_last(
    tmp_path: Path, cluster: Cluster, catalog: Catalog
) -> None:
    dear = CLUSTER.replace("{MarketType: spot}", "{}")
    none = CLUSTER.replace("GPU: 1", "GPU: 0").replace("GPU: 8", "GPU: 0")
    others = [
        read_cluster(write(tmp_path, f"{name}.yaml", text), catalog)
        for name, text in (("none", none), ("dear", dear))
    ]
    plans = [planned(c, catalog, '{"GPU": 1}x2') for c in (*others, cluster)]
    assert [Path(p.cluster.file).stem for p in cheapest_first(plans)] == ["six", "dear", "none"]


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "onprem"])
def test_the_projects_own_clusters_can_be_planned(name: str) -> None:
    prices = [*PRICES, ROOT / "cluster/prices/onprem-example.yaml"]
    catalog = load_catalog(prices)
    cluster = read_cluster(ROOT / f"cluster/{name}.yaml", catalog)
    plan = planned(cluster, catalog, '{"CPU": 4}x4')
    assert not plan.pending
    assert not plan.unpriced
    assert plan.energy is not None


@pytest.mark.parametrize(("name", "kind"), [("aws", "L4"), ("gcp", "L4"), ("azure", "A100")])
def test_who_names_an_accelerator_gets_a_node_on_every_cloud_that_has_it(
    name: str, kind: str
) -> None:
    cluster = read_cluster(ROOT / f"cluster/{name}.yaml", load_catalog(PRICES))
    plan = planned(
        cluster, load_catalog(PRICES), f'{{"GPU": 1, "accelerator_type:{kind}": 0.001}}'
    )
    assert not plan.pending


@pytest.mark.parametrize("text", ["", "GPU", '{"GPU":1}x0', '{"GPU":-1}', "{", '["GPU"]', "{}"])
def test_a_demand_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="--demand"):
        parse_demand(text)


def test_a_training_job_asks_for_a_group_of_its_workers(tmp_path: Path) -> None:
    write(tmp_path, "train.yaml", TRAIN)
    job = (
        "name: t\nentrypoint: python jobs/train.py\nconfig: train.yaml\nresources: {num_cpus: 1}\n"
    )
    demand = demand_of_job(write(tmp_path, "job.yaml", job))
    assert [str(r) for r in demand.requests] == ["{CPU: 1}"]
    assert [str(g) for g in demand.gangs] == ["PACK [{CPU: 2, GPU: 1} × 4]"]


TRAIN = """
name: t
dataset: d
num_steps: 10
global_batch_size: 32
micro_batch_size: 8
scaling: {num_workers: 4, cpus_per_worker: 2, gpus_per_worker: 1}
"""


def test_a_serve_config_asks_for_its_first_replicas(tmp_path: Path) -> None:
    app = """
applications:
  - name: a
    import_path: x:app
    deployments:
      - {name: fixed, num_replicas: 3, ray_actor_options: {num_cpus: 2}}
      - name: scaled
        num_replicas: auto
        autoscaling_config: {min_replicas: 2, max_replicas: 9}
        placement_group_bundles: [{CPU: 1, GPU: 1}, {GPU: 1}]
"""
    demand = demand_of_app(write(tmp_path, "app.yaml", app))
    assert [str(r) for r in demand.requests] == ["{CPU: 2} × 3"]
    assert [str(g) for g in demand.gangs] == ["PACK [{CPU: 1, GPU: 1} × 1 + {GPU: 1} × 1]"] * 2


def test_awss_price_list_is_read_for_plain_linux_only() -> None:
    columns = '"SKU","TermType","Operating System","Tenancy","Pre Installed S/W","CapacityStatus","Unit","Instance Type","PricePerUnit"'  # noqa: E501
    lines = [
        '"FormatVersion","v1.0"',
        '"Publication Date","2026-11-01T00:00:00Z"',
        columns,
        '"1","OnDemand","Linux","Shared","NA","Used","Hrs","m7i.xlarge","0.2016000000"',
        '"2","OnDemand","Windows","Shared","NA","Used","Hrs","m7i.xlarge","0.3856000000"',
        '"3","Reserved","Linux","Shared","NA","Used","Hrs","m7i.xlarge","0.1000000000"',
        '"4","OnDemand","Linux","Shared","NA","Used","Hrs","m7i.large","0.1008000000"',
    ]
    assert parse_aws(lines, frozenset({"m7i.xlarge"})) == {"m7i.xlarge": {"on-demand": 0.2016}}


def test_azures_retail_prices_are_read_with_spot_and_make_a_price_file(tmp_path: Path) -> None:
    common = {"armSkuName": "Standard_D4ds_v5", "type": "Consumption", "currencyCode": "USD"}
    common |= {"unitOfMeasure": "1 Hour", "productName": "Virtual Machines Ddsv5 Series"}
    items = [
        {**common, "meterName": "D4ds v5", "retailPrice": 0.226},
        {**common, "meterName": "D4ds v5 Spot", "retailPrice": 0.05},
        {**common, "meterName": "D4ds v5 Low Priority", "retailPrice": 0.04},
        {**common, "productName": "… Windows", "meterName": "D4ds v5", "retailPrice": 0.41},
        {**common, "type": "Reservation", "meterName": "D4ds v5", "retailPrice": 900.0},
    ]
    found = parse_azure(items, frozenset({"Standard_D4ds_v5"}))
    assert found == {"Standard_D4ds_v5": {"on-demand": 0.226, "spot": 0.05}}
    text = price_file("azure", "eastus", found, "https://example", datetime.date(2026, 11, 2))
    catalog = load_catalog([*PRICES, write(tmp_path, "fresh.yaml", text)])
    machine = catalog.find("azure", "Standard_D4ds_v5")
    assert machine is not None
    assert machine.prices["eastus"].spot_usd_per_hour == 0.05


def test_the_command_prints_json_cheapest_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    files = ["cluster/aws.yaml", "cluster/gcp.yaml"]
    with pytest.raises(SystemExit, match="0"):
        main(["plan", *files, "--demand", '{"CPU": 4}x4', "--hours", "2", "--json"])
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [p["usd_per_hour"] for p in plans] == sorted(p["usd_per_hour"] for p in plans)
    assert plans[0]["usd"] == pytest.approx(2 * plans[0]["usd_per_hour"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_workers: 4", "max_workers: -4"),
        ("resources: {CPU: 0}", "resources: [1]"),
        ("head_node_type: head", "head_node_type: hed"),
        ("GPU: 8}", "GPU: many}"),
        ("provider: {type: aws, region: us-test-1}", "provider: 3"),
    ],
)
def test_a_broken_cluster_is_a_finding_with_its_line(
    tmp_path: Path, catalog: Catalog, old: str, new: str
) -> None:
    with pytest.raises(InvalidSpec, match=r"broken\.yaml:\d+: "):
        read_cluster(write(tmp_path, "broken.yaml", CLUSTER.replace(old, new)), catalog)


def test_an_empty_demand_plans_the_minimum_cluster(cluster: Cluster, catalog: Catalog) -> None:
    plan = plan_cluster(cluster, Demand(), catalog)
    assert [line.role for line in plan.lines] == ["head"]


def test_a_spot_node_without_a_spot_price_counts_at_its_on_demand_price(
    cluster: Cluster, catalog: Catalog
) -> None:
    node = NodeType(name="x", resources={"CPU": 4}, instance_type="small", market="spot")
    made = quote(node, cluster, catalog)
    assert made.usd_per_hour == 0.1
    assert "upper bound" in made.notes[0]
