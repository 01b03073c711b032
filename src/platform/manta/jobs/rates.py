"""What a node of a cluster costs and draws, by the price lists that `manta plan` uses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from manta.cluster import outlook
from manta.cluster.record import ClusterRecord
from manta.errors import InputError
from manta.jobs.costs import Rate
from manta.plan.clusters import Cluster, NodeType
from manta.plan.energy import power_of
from manta.plan.price import quote
from manta.spec.catalog import Catalog, default_paths, load_catalog

LOCAL_TYPE = "local"
"""Instance type, in a price file with `cloud: onprem`, of the machine of a local cluster."""


def of_cluster(record: ClusterRecord) -> Mapping[str, Rate]:
    """Node type → rate, for what the cluster may consist of. A type that is missing has none.

    The nodes of a cluster on this machine have no type, which is "" here.
    """
    if record.is_here:
        return _local()
    if record.attached:
        return {}  # whose machines these are is not known
    planned, catalog = outlook.read_planned(record)
    if planned is None:
        return {}  # its file has been moved or changed
    rate = partial(of_node, planned, catalog)
    return {node.name: rate(node) for node in planned.node_types}


def of_node(cluster: Cluster, catalog: Catalog, node: NodeType) -> Rate:
    """The rate of one node of this type."""
    price = quote(node, cluster, catalog).usd_per_hour
    drawn = power_of(node, cluster, catalog)
    cloud = cluster.cloud or ""
    machine = catalog.find(cloud, node.instance_type or "")
    region = catalog.region(cloud, cluster.region or "")
    source = machine.source or f"price file of {cloud}" if machine else ""
    return Rate(
        instance_type=node.instance_type or "",
        market=node.market,
        usd_per_hour=price,
        idle_watts=drawn.idle_watts if drawn else None,
        full_watts=drawn.full_watts if drawn else None,
        pue=catalog.pue_of.get(cloud, (1.0, ""))[0],
        grid_gco2e_per_kwh=region.grid_gco2e_per_kwh if region else None,
        source=source if price is not None else "",
        date=catalog.updated.get(cloud, "") if price is not None else "",
    )


def _local() -> Mapping[str, Rate]:
    """This machine, if one of the price files that are read by themselves says what it costs."""
    try:
        catalog = load_catalog(default_paths())
    except InputError:
        return {}
    if catalog.find("onprem", LOCAL_TYPE) is None:
        return {}
    node = NodeType(name="", resources={}, instance_type=LOCAL_TYPE, market="owned")
    cluster = Cluster(
        file="",
        name="local",
        provider="local",
        cloud="onprem",
        region="site",
        node_types=(node,),
        head="",
        max_workers=0,
    )
    return {"": of_node(cluster, catalog, node)}
