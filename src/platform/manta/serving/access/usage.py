"""Use per key and model, kept in storage: each replica writes its own file, readers add them up.

    usage/2026-11/REPLICA.json

A replica that is killed loses the seconds since its last write, and nothing older.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from manta import storage
from manta.errors import InputError
from manta.serving.access.limits import Spent, month_of
from manta.spec.guard import Price

FOLDER = "usage"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one key had of one model in one month."""

    key_id: str
    model: str
    num_requests: int = 0
    """Requests that were let in, whatever became of them."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    """At the prices of when it was used."""
    num_cached: int = 0
    """Of the requests, those answered from the cache: without tokens."""

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(
            key_id=self.key_id,
            model=self.model,
            num_requests=self.num_requests + other.num_requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_usd=self.cost_usd + other.cost_usd,
            num_cached=self.num_cached + other.num_cached,
        )


class Ledger:
    """What one replica has served since it started."""

    def __init__(self, root: str, prices: dict[str, Price]) -> None:
        self._root = root
        self._prices = prices
        self._writer = uuid.uuid4().hex
        self._months: dict[str, dict[tuple[str, str], Usage]] = {}
        self._unsaved: set[str] = set()

    def cost_usd(self, model: str, prompt_tokens: int, completion_tokens: int) -> float:
        """What they cost now; 0 for a model without a price. An adapter has its base's."""
        price = self._prices.get(model) or self._prices.get(model.partition(":")[0], Price())
        return (
            prompt_tokens * price.prompt_usd_per_million
            + completion_tokens * price.completion_usd_per_million
        ) / 1e6

    def add(
        self,
        key_id: str,
        model: str,
        prompt_tokens: int,
        completion_tokens: int,
        *,
        cached: bool = False,
    ) -> None:
        """Note one request."""
        month = month_of(time.time())
        uses = self._months.setdefault(month, {})
        one = Usage(
            key_id=key_id,
            model=model,
            num_requests=1,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=self.cost_usd(model, prompt_tokens, completion_tokens),
            num_cached=int(cached),
        )
        before = uses.get((key_id, model))
        uses[key_id, model] = before.plus(one) if before else one
        self._unsaved.add(month)

    def flush(self) -> None:
        """Write what is new. Raises MantaError if it cannot; nothing is forgotten then."""
        for month in list(self._unsaved):
            self._unsaved.discard(month)  # first: what is added during the write comes next time
            rows = [asdict(use) for use in list(self._months[month].values())]
            try:
                url = storage.join(self._root, FOLDER, month, f"{self._writer}.json")
                storage.write_json(url, rows)
            except Exception:
                self._unsaved.add(month)
                raise


def read(root: str, month: str) -> list[Usage]:
    """Use of all keys in a month, over all replicas that ever were; by key and model.

    Raises:
        InputError: the storage cannot be read.
    """
    sums: dict[tuple[str, str], Usage] = {}
    for one in _rows(root, month):
        before = sums.get((one.key_id, one.model))
        sums[one.key_id, one.model] = before.plus(one) if before else one
    return [sums[at] for at in sorted(sums)]


def spent_by_key(root: str, month: str) -> dict[str, Spent]:
    """Tokens and cost of each key in a month. Raises InputError as `read` does."""
    spent: dict[str, Spent] = {}
    for one in read(root, month):
        before = spent.get(one.key_id, Spent())
        spent[one.key_id] = Spent(
            num_tokens=before.num_tokens + one.prompt_tokens + one.completion_tokens,
            cost_usd=before.cost_usd + one.cost_usd,
        )
    return spent


def _rows(root: str, month: str) -> Iterable[Usage]:
    for url in storage.glob(storage.join(root, FOLDER, month)):
        if url.endswith(".json"):
            try:
                yield from (Usage(**row) for row in storage.read_json(url))
            except TypeError:
                raise InputError(f"{url}: not a record of use", "move it away") from None
