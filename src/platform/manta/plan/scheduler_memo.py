"""What Ray's scheduler already worked out, remembered while it runs: the same answers, sooner.

Ray simulates every node type again for every node that it adds. For a fresh node the outcome
depends only on its resources and labels and on the requests that are left. It stays true while of
each request that went onto the node enough are left: as many as went on or, where the node took
all there were, still that number. `Memo` keeps outcomes, each worked out by Ray's `try_schedule`,
until that no longer holds, and picks among them by Ray's own sort key. A test compares it with the
unaided scheduler on generated cases.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Memo:
    """`ResourceDemandScheduler._sched_best_node`, asking Ray once for each thing that matters."""

    def __init__(self, simulate: Any, is_fresh: Callable[[Any], bool]) -> None:
        """`simulate` is Ray's own function, for nodes that are not fresh."""
        self._simulate, self._is_fresh = simulate, is_fresh
        self._pool = _Pool([], is_fresh)
        self._outcomes: dict[tuple[Hashable, ...], _Outcome] = {}
        self._current: dict[Hashable, _Outcome] = {}
        self._winners: _Winners | None = None

    def best_node(
        self,
        requests: Sequence[Any] | _Runs,
        nodes: list[Any],
        source: Any,
        availabilities: Mapping[str, float],
        recoverable: Mapping[str, float],
        shape_keys: Mapping[int, bytes],
    ) -> tuple[Any, Any, list[Any]]:
        """As Ray's, with the same result."""
        assert not availabilities
        assert not recoverable
        pool = self._follow(nodes)
        if not pool.is_fresh:
            return self._simulate(  # type: ignore[no-any-return]
                list(requests), nodes, source, availabilities, recoverable, shape_keys
            )
        if not isinstance(requests, _Runs):
            requests = _Runs.of(requests, shape_keys)
            self._current, self._winners = {}, None
        winners = self._choose(requests, pool, source)
        if not winners.names:
            return None, requests, nodes
        # On a tie Ray's stable sort keeps the order of `nodes`.
        index = next(i for i, node in enumerate(nodes) if node.node_type in winners.names)
        node = pool.pop(index)
        outcome = self._current[pool.kind(node)[0]]
        filled = _clone(outcome.node)
        filled.node_type, filled.priority = node.node_type, node.priority
        return filled, requests.without(outcome.taken), nodes

    def _follow(self, nodes: list[Any]) -> _Pool:
        if not self._pool.follows(nodes):
            self._pool, self._winners = _Pool(nodes, self._is_fresh), None
        return self._pool

    def _choose(self, runs: _Runs, pool: _Pool, source: Any) -> _Winners:
        """The node types that come first, worked out again only when they could differ."""
        if self._winners is not None and self._winners.hold(runs, pool):
            return self._winners
        ranked: dict[Any, set[_Kind]] = {}
        for kind, node in pool.examples.items():
            outcome = self._current.get(kind[0])
            if outcome is None or not outcome.holds(runs.counts):
                outcome = self._current[kind[0]] = self._try(runs, kind[0], node, source)
            if outcome.needs:
                # The rest of Ray's key, how available a type is, is the same for all here.
                ranked.setdefault((outcome.score, kind[1]), set()).add(kind)
        best = ranked[max(ranked)] if ranked else set()
        used = [self._current[kind[0]] for kind in pool.examples]
        self._winners = _Winners(pool.names(best), pool.version, runs.counts, used)
        return self._winners

    def _try(self, runs: _Runs, shape: Hashable, node: Any, source: Any) -> _Outcome:
        """Let Ray fill a fresh node."""
        state = (source, shape, tuple(runs.keys.values()), runs.counts)
        if state not in self._outcomes:
            trial = _clone(node)
            taken = [0] * len(runs.shapes)
            offers = _offers(runs, trial.sched_requests[source], taken)
            _, score = trial.try_schedule(offers, source, runs.keys)
            self._outcomes[state] = _Outcome.of(trial, score, runs.counts, tuple(taken))
        return self._outcomes[state]


_Kind = tuple[Hashable, int]
"""(resources and labels, priority): what Ray's choice sees of a fresh node besides its place."""


class _Request:
    """A request with plain values in it: Ray reads it often, and protobuf maps are slow."""

    __slots__ = ("label_selectors", "original", "placement_constraints", "resources_bundle")

    def __init__(self, original: Any) -> None:
        self.original = original
        self.resources_bundle = dict(original.resources_bundle)
        self.placement_constraints = list(original.placement_constraints)
        self.label_selectors = list(original.label_selectors)

    def __deepcopy__(self, memo: object) -> _Request:
        return self  # nothing changes a request


@dataclass(frozen=True)
class _Runs:
    """Requests in Ray's order, equal neighbours counted instead of repeated."""

    shapes: tuple[_Request, ...]
    counts: tuple[int, ...]
    keys: Mapping[int, bytes]
    """id of a shape → what tells it from others, in the order of `shapes`."""

    @classmethod
    def of(cls, requests: Sequence[Any], keys: Mapping[int, bytes]) -> _Runs:
        """Ray's list, with Ray's own keys."""
        shapes, counts, own_keys = [], [], {}
        for key, group in itertools.groupby(requests, key=lambda request: keys[id(request)]):
            members = list(group)
            shapes.append(_Request(members[0]))
            counts.append(len(members))
            own_keys[id(shapes[-1])] = key
        return cls(tuple(shapes), tuple(counts), own_keys)

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[Any]:
        for request, count in zip(self.shapes, self.counts, strict=True):
            yield from itertools.repeat(request.original, count)

    def without(self, taken: Sequence[int]) -> _Runs:
        counts = tuple(count - n for count, n in zip(self.counts, taken, strict=True))
        return _Runs(self.shapes, counts, self.keys)


@dataclass(frozen=True)
class _Outcome:
    """What Ray's `try_schedule` did with a fresh node, and for how long that is true."""

    node: Any
    score: Any
    taken: tuple[int, ...]
    needs: tuple[tuple[int, int], ...]
    """(run, least count that must be left); empty if the node took nothing."""
    exact: tuple[tuple[int, int], ...]
    """(run, count that must be left): the node took all of it, and may have room for more."""

    @classmethod
    def of(cls, node: Any, score: Any, counts: Sequence[int], taken: tuple[int, ...]) -> _Outcome:
        needs = tuple((i, n) for i, n in enumerate(taken) if n)
        exact = tuple((i, n) for i, n in needs if n == counts[i])
        return cls(node, score, taken, needs, exact)

    def holds(self, counts: Sequence[int]) -> bool:
        return all(counts[i] >= n for i, n in self.needs) and all(
            counts[i] == n for i, n in self.exact
        )


class _Winners:
    """The node types that come first, until the pool changes or an outcome behind them fails."""

    def __init__(
        self,
        names: frozenset[str],
        version: int,
        counts: Sequence[int],
        outcomes: Sequence[_Outcome],
    ) -> None:
        self.names, self._version = names, version
        self._floor = [0] * len(counts)
        self._exact: dict[int, int] = {}
        for outcome in outcomes:
            for i, n in outcome.needs:
                self._floor[i] = max(self._floor[i], n)
            self._exact.update(outcome.exact)

    def hold(self, runs: _Runs, pool: _Pool) -> bool:
        return (
            pool.version == self._version
            and all(n >= floor for n, floor in zip(runs.counts, self._floor, strict=True))
            and all(runs.counts[i] == n for i, n in self._exact.items())
        )


class _Pool:
    """Ray's list of candidate nodes and the kinds in it; follows Ray's appends."""

    def __init__(self, nodes: list[Any], is_fresh: Callable[[Any], bool]) -> None:
        self.nodes = nodes
        self.examples: dict[_Kind, Any] = {}
        self.is_fresh = True
        self.version = 0
        """Changes when a kind comes or goes."""
        self._is_fresh = is_fresh
        self._kinds: dict[str, _Kind] = {}
        self._counts: Counter[_Kind] = Counter()
        self._gone: set[_Kind] = set()
        self._seen = 0
        self._catch_up()

    def follows(self, nodes: list[Any]) -> bool:
        """Whether this is still Ray's list, its newest nodes taken in."""
        if nodes is not self.nodes or len(nodes) < self._seen:
            return False
        self._catch_up()
        return True

    def kind(self, node: Any) -> _Kind:
        """The kind of a fresh node; one for each node type."""
        known = self._kinds.get(node.node_type)
        if known is None:
            resources = frozenset(node.total_resources.items())
            # Zeros count too: a type that lists `GPU: 0` scores like one that does not, but
            # their dictionaries are in the order given, over which Ray averages.
            shape = (tuple(node.total_resources), resources, frozenset(node.labels.items()))
            known = self._kinds[node.node_type] = (shape, node.priority)
        return known

    def names(self, kinds: Container[_Kind]) -> frozenset[str]:
        """The node types of these kinds."""
        return frozenset(name for name, kind in self._kinds.items() if kind in kinds)

    def pop(self, index: int) -> Any:
        """Take a node out."""
        node = self.nodes.pop(index)
        kind = self.kind(node)
        self._seen -= 1
        self._counts[kind] -= 1
        if not self._counts[kind]:
            self._gone.add(kind)
        return node

    def _catch_up(self) -> None:
        for node in self.nodes[self._seen :]:
            kind = self.kind(node)
            self.is_fresh = self.is_fresh and self._is_fresh(node)
            self._counts[kind] += 1
            self._gone.discard(kind)
            if kind not in self.examples:
                self.examples[kind] = node
                self.version += 1
        self._seen = len(self.nodes)
        for kind in self._gone:
            del self.examples[kind]
            self.version += 1
        self._gone.clear()


def _offers(runs: _Runs, placed: Sequence[Any], taken: list[int]) -> Iterator[_Request]:
    """Offer each run until the node refuses it, and count into `taken` what it took.

    A node that refused a request refuses its equals that follow: Ray itself skips them.
    """
    for i, (request, count) in enumerate(zip(runs.shapes, runs.counts, strict=True)):
        for _ in range(count):
            before = len(placed)
            yield request
            if len(placed) == before:
                break
            taken[i] += 1


def _clone(node: Any) -> Any:
    """A copy that shares the requests, which nothing changes, and nothing else."""
    clone = copy.copy(node)
    clone.sched_requests = {k: list(v) for k, v in node.sched_requests.items()}
    clone.available_resources_for_sched = {
        k: dict(v) for k, v in node.available_resources_for_sched.items()
    }
    clone.total_resources = dict(node.total_resources)
    clone.labels = dict(node.labels)
    return clone
