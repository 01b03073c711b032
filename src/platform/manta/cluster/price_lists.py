"""Fresh on-demand prices from the clouds' public price lists, for the machines already known.

AWS: the bulk price list (`pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonEC2/…/index.csv`).
Azure: the retail prices API (`prices.azure.com/api/retail/prices`), spot included.
GCP's catalogue needs an API key and bills CPU, memory and GPU apart: not refreshed.
The only part of planning that reaches a network, and only when asked.
"""

from __future__ import annotations

import csv
import datetime
import json
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import yaml

from manta.errors import InputError, MantaError

AWS_URL = "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonEC2/current/{}/index.csv"
AZURE_URL = "https://prices.azure.com/api/retail/prices"
TIMEOUT_S = 60.0
Found = Mapping[str, Mapping[str, float]]
"""Machine → `on-demand` or `spot` → USD per hour."""


def refreshed_file(cloud: str, region: str, names: Iterable[str], today: datetime.date) -> str:
    """A price file for one cloud and region, to be given to `--prices`.

    Raises:
        InputError: the cloud has no public list that this reads.
        MantaError: the list cannot be fetched, or names none of the machines.
    """
    wanted = frozenset(names)
    if cloud == "aws":
        source = AWS_URL.format(urllib.parse.quote(region))
        with _open(source) as text:
            found = parse_aws(text, wanted)
    elif cloud == "azure":
        source = AZURE_URL
        found = parse_azure(_azure_pages(region), wanted)
    else:
        raise InputError(f"no public price list of {cloud} is read", "choose aws or azure")
    if not found:
        raise MantaError(f"{source} names none of the known machines in {region}")
    return price_file(cloud, region, found, source, today)


def price_file(cloud: str, region: str, found: Found, source: str, today: datetime.date) -> str:
    """Prices as the text of a price file."""
    types = {}
    for name, prices in sorted(found.items()):
        entry: dict[str, Any] = {"price_source": "list"}
        if "on-demand" in prices:
            entry["usd_per_hour"] = {region: prices["on-demand"]}
        if "spot" in prices:
            entry["spot_usd_per_hour"] = {region: prices["spot"]}
        types[name] = entry
    value = {
        "cloud": cloud,
        "updated": today,
        "sources": {"list": f"{source}, read on {today.isoformat()}"},
        "instance_types": types,
    }
    return yaml.safe_dump(value, sort_keys=False, width=99)


def parse_aws(lines: Iterable[str], wanted: frozenset[str]) -> Found:
    """On-demand prices in the CSV of AWS's bulk list: Linux, shared hardware, nothing installed.

    The file opens with some lines of remarks before its header, and is large: read line by line.
    """
    rows = iter(csv.reader(lines))
    header = next((row for row in rows if row[:1] == ["SKU"]), None)
    if header is None:
        raise MantaError("AWS's price list has no header line that begins with SKU")
    column = {name: i for i, name in enumerate(header)}
    is_plain = {
        "TermType": "OnDemand",
        "Operating System": "Linux",
        "Tenancy": "Shared",
        "Pre Installed S/W": "NA",
        "CapacityStatus": "Used",
        "Unit": "Hrs",
    }
    missing = {*is_plain, "Instance Type", "PricePerUnit"} - column.keys()
    if missing:
        raise MantaError(f"AWS's price list lacks the columns {', '.join(sorted(missing))}")
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        name = row[column["Instance Type"]]
        if name in wanted and all(row[column[k]] == v for k, v in is_plain.items()):
            price = float(row[column["PricePerUnit"]])
            if price > 0:
                found[name] = {"on-demand": price}
    return found


def parse_azure(items: Iterable[Mapping[str, Any]], wanted: frozenset[str]) -> Found:
    """Consumption prices in items of Azure's retail API: Linux, on demand and spot."""
    found: dict[str, dict[str, float]] = {}
    for item in items:
        name, meter = str(item.get("armSkuName", "")), str(item.get("meterName", ""))
        if name not in wanted or item.get("type") != "Consumption":
            continue
        if "Windows" in str(item.get("productName")) or "Low Priority" in meter:
            continue
        if item.get("currencyCode") != "USD" or item.get("unitOfMeasure") != "1 Hour":
            continue
        market = "spot" if "Spot" in meter else "on-demand"
        found.setdefault(name, {})[market] = float(item["retailPrice"])
    return found


def _azure_pages(region: str) -> Iterator[Mapping[str, Any]]:
    query = f"serviceName eq 'Virtual Machines' and armRegionName eq '{region}'"
    url: str | None = AZURE_URL + "?" + urllib.parse.urlencode({"$filter": query})
    while url:
        with _open(url) as text:
            page = json.load(text)
        yield from page.get("Items", ())
        url = page.get("NextPageLink")


def _open(url: str) -> TextIO:
    import io

    try:
        response = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    except OSError as error:
        raise MantaError(
            f"{url} cannot be read: {error}", "plan with the built-in prices, or retry online"
        ) from None
    return io.TextIOWrapper(response, encoding="utf-8", newline="")
