"""What the clouds offer: instance types, regions, prices, power. Read from dated data files.

A file holds one cloud (`cluster/prices/aws-….yaml`); a user's file of the same form is laid over
it and wins entry by entry, so negotiated prices need only the lines that differ.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from pydantic import Field, model_validator

from manta.errors import InputError
from manta.spec.loading import Spec, load

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one hour of a machine costs in one region, USD; None where no source gave it."""

    on_demand_usd_per_hour: float | None = None
    spot_usd_per_hour: float | None = None
    """Spot prices move by the hour: a snapshot, good for comparing, not for billing."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """What a machine draws, in watts, before the data centre's overhead (PUE)."""

    idle_watts: float
    full_watts: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """What a machine that you bought costs, besides its electricity."""

    capital_usd: float
    lifetime_years: float
    upkeep_usd_per_year: float = 0.0
    """Support contract, rack space, people."""
    utilization: float = 1.0
    """Share of the hours of its life in which it works for someone, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class InstanceType:
    """One machine that a cloud rents (or that you own)."""

    cloud: str
    """`aws`, `gcp`, `azure`, `onprem`: see `CLOUD_OF_PROVIDER`."""
    name: str
    num_cpus: float
    """vCPUs, as Ray counts CPU."""
    memory_bytes: int
    num_gpus: int = 0
    accelerator: str | None = None
    """Ray's accelerator name (`L4`, `H100`, `TPU-V5E`): the `accelerator_type:` resource."""
    num_tpus: int = 0
    """TPU chips on one host."""
    prices: Mapping[str, Price] = field(default_factory=dict)
    """Region → price. A region that is missing here may still sell the type."""
    power: Power | None = None
    owned: Ownership | None = None
    source: str = ""
    """Where the prices come from, and of which day."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A GPU that GCP attaches to a machine and bills apart from it; figures are for one."""

    cloud: str
    name: str
    """As `guestAccelerators.acceleratorType` ends: `nvidia-tesla-t4`."""
    accelerator: str
    prices: Mapping[str, Price] = field(default_factory=dict)
    power: Power | None = None


@dataclass(frozen=True, kw_only=True)
class Region:
    """One region of a cloud."""

    cloud: str
    name: str
    grid_gco2e_per_kwh: float | None = None
    """Yearly average of the grid that feeds it, location-based (no certificates)."""
    electricity_usd_per_kwh: float | None = None
    """Only for machines that you own."""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Everything known about the clouds, keyed by cloud and name."""

    instance_types: Mapping[tuple[str, str], InstanceType] = field(default_factory=dict)
    accelerators: Mapping[tuple[str, str], Accelerator] = field(default_factory=dict)
    region_of: Mapping[tuple[str, str], Region] = field(default_factory=dict)
    pue_of: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Cloud → (power usage effectiveness, source)."""
    updated: Mapping[str, str] = field(default_factory=dict)
    """Cloud → day of its prices, ISO 8601."""

    @property
    def clouds(self) -> tuple[str, ...]:
        """The clouds with at least one instance type."""
        return tuple(sorted({cloud for cloud, _ in self.instance_types}))

    def find(self, cloud: str, name: str) -> InstanceType | None:
        """The instance type, or None if no file lists it (which proves nothing: lists end)."""
        return self.instance_types.get((cloud, name))

    def names(self, cloud: str) -> tuple[str, ...]:
        """Instance type names of a cloud."""
        return tuple(sorted(name for c, name in self.instance_types if c == cloud))

    def region(self, cloud: str, name: str) -> Region | None:
        """The region, or None if no file lists it."""
        return self.region_of.get((cloud, name))

    def regions(self, cloud: str) -> tuple[str, ...]:
        """Region names of a cloud."""
        return tuple(sorted(name for c, name in self.region_of if c == cloud))


CLOUD_OF_PROVIDER: Mapping[str, str] = MappingProxyType(
    {"aws": "aws", "gcp": "gcp", "azure": "azure", "local": "onprem"}
)
"""`provider.type` of a Ray cluster YAML → cloud of the catalogue."""


def default_paths() -> tuple[Path, ...]:
    """The dated files of `cluster/prices/` in the working directory, or else in this checkout.

    Undated files there (`onprem-example.yaml`) are for `--prices` and are not read by themselves.
    After them come all files of `~/.manta/prices/`: the user's own, which win entry by entry
    wherever a price is needed, in a service too.
    """
    home = Path(os.environ.get("MANTA_HOME") or Path.home() / ".manta")
    own = sorted((home / "prices").glob("*.yaml"))
    for root in (Path.cwd(), Path(__file__).parents[4]):
        found = sorted((root / "cluster" / "prices").glob("*-20[0-9][0-9]-[0-9]*.yaml"))
        if found:
            return (*found, *own)
    return tuple(own)


def load_catalog(paths: Iterable[str | Path] | None = None) -> Catalog:
    """Read price files in order, a later one winning; None reads `default_paths()`.

    Raises:
        InvalidSpec: a file has faults, each named with its line.
        InputError: there is no file at all.
    """
    files = tuple(default_paths() if paths is None else paths)
    if not files:
        raise InputError(
            "no price files found", "run where cluster/prices/ is, or name one: --prices FILE"
        )
    catalog = Catalog()
    for file in files:
        catalog = _overlay(catalog, load(file, _PriceFile))
    return catalog


class _RegionEntry(Spec):
    grid_gco2e_per_kwh: float | None = Field(None, ge=0)
    electricity_usd_per_kwh: float | None = Field(None, ge=0)
    source: str = ""


class _Pue(Spec):
    value: float = Field(ge=1)
    source: str


class _OwnershipEntry(Spec):
    capital_usd: float = Field(ge=0)
    lifetime_years: float = Field(gt=0)
    upkeep_usd_per_year: float = Field(0, ge=0)
    utilization: float = Field(1, gt=0, le=1)


class _Priced(Spec):
    idle_watts: float | None = Field(None, ge=0)
    full_watts: float | None = Field(None, ge=0)
    power_source: str = ""
    usd_per_hour: dict[str, float] = Field(default_factory=dict)
    """Region → on-demand."""
    spot_usd_per_hour: dict[str, float] = Field(default_factory=dict)
    price_source: str = ""

    @model_validator(mode="after")
    def _power_is_whole(self) -> _Priced:
        if (self.idle_watts is None) != (self.full_watts is None):
            raise ValueError("idle_watts and full_watts go together; give both or neither")
        return self

    def power(self, previous: Power | None, sources: Mapping[str, str]) -> Power | None:
        if self.idle_watts is None or self.full_watts is None:
            return previous
        source = sources.get(self.power_source, self.power_source)
        return Power(idle_watts=self.idle_watts, full_watts=self.full_watts, source=source)

    def prices(self, previous: Mapping[str, Price]) -> Mapping[str, Price]:
        merged = dict(previous)
        for region in {**self.usd_per_hour, **self.spot_usd_per_hour}:
            before = merged.get(region, Price())
            merged[region] = Price(
                on_demand_usd_per_hour=self.usd_per_hour.get(
                    region, before.on_demand_usd_per_hour
                ),
                spot_usd_per_hour=self.spot_usd_per_hour.get(region, before.spot_usd_per_hour),
            )
        return MappingProxyType(merged)


class _InstanceEntry(_Priced):
    num_cpus: float | None = Field(None, gt=0)
    memory_gib: float | None = Field(None, gt=0)
    num_gpus: int = Field(0, ge=0)
    num_tpus: int = Field(0, ge=0)
    accelerator: str | None = None
    owned: _OwnershipEntry | None = None


class _AcceleratorEntry(_Priced):
    accelerator: str


class _PriceFile(Spec):
    """One cloud's part of the catalogue."""

    cloud: str
    updated: datetime.date
    pue: _Pue | None = None
    regions: dict[str, _RegionEntry] = Field(default_factory=dict)
    instance_types: dict[str, _InstanceEntry] = Field(default_factory=dict)
    accelerators: dict[str, _AcceleratorEntry] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)
    """Short name → what it is, of which day; entries refer to the short name."""


def _overlay(catalog: Catalog, file: _PriceFile) -> Catalog:
    """`catalog` with everything that `file` says put over it."""
    types, accelerators = dict(catalog.instance_types), dict(catalog.accelerators)
    regions, pue = dict(catalog.region_of), dict(catalog.pue_of)
    for name, entry in file.instance_types.items():
        types[file.cloud, name] = _instance_type(file, name, entry, types.get((file.cloud, name)))
    for name, gpu in file.accelerators.items():
        before = accelerators.get((file.cloud, name))
        accelerators[file.cloud, name] = Accelerator(
            cloud=file.cloud,
            name=name,
            accelerator=gpu.accelerator,
            prices=gpu.prices(before.prices if before else {}),
            power=gpu.power(before.power if before else None, file.sources),
        )
    for name, region in file.regions.items():
        known = {**region.model_dump(), "source": file.sources.get(region.source, region.source)}
        regions[file.cloud, name] = Region(cloud=file.cloud, name=name, **known)
    if file.pue:
        pue[file.cloud] = (file.pue.value, file.pue.source)
    return Catalog(
        instance_types=MappingProxyType(types),
        accelerators=MappingProxyType(accelerators),
        region_of=MappingProxyType(regions),
        pue_of=MappingProxyType(pue),
        updated=MappingProxyType({**catalog.updated, file.cloud: file.updated.isoformat()}),
    )


def _instance_type(
    file: _PriceFile, name: str, entry: _InstanceEntry, before: InstanceType | None
) -> InstanceType:
    if before is None:
        if entry.num_cpus is None or entry.memory_gib is None:
            raise InputError(
                f"{file.cloud} instance type {name} is new and has no size",
                "give it num_cpus and memory_gib",
            )
        before = InstanceType(cloud=file.cloud, name=name, num_cpus=0, memory_bytes=0)
    return replace(
        before,
        num_cpus=entry.num_cpus or before.num_cpus,
        memory_bytes=int(entry.memory_gib * GIB) if entry.memory_gib else before.memory_bytes,
        num_gpus=entry.num_gpus or before.num_gpus,
        num_tpus=entry.num_tpus or before.num_tpus,
        accelerator=entry.accelerator or before.accelerator,
        prices=entry.prices(before.prices),
        power=entry.power(before.power, file.sources),
        owned=Ownership(**entry.owned.model_dump()) if entry.owned else before.owned,
        source=file.sources.get(entry.price_source, entry.price_source) or before.source,
    )
