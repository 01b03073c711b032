"""Who goes next: bands, shares, gangs, quotas, back-fill, over many random queues."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from manta.jobs import spill
from manta.jobs.books import SLOT, Needs, Room, Running, Share, Shares, Waiting
from manta.jobs.line import Line, key_of
from manta.jobs.schedule import Plan, schedule, why

NEEDS: dict[str, Needs] = {
    "none": ((SLOT, 1.0),),
    **{f"gpu{n}": ((SLOT, 1.0), ("GPU", float(n))) for n in range(1, 17)},
    "cpu4gpu1": ((SLOT, 1.0), ("CPU", 4.0), ("GPU", 1.0)),
}


def room(name: str = "c", *, answers: bool = True, slots: int = 100, **capacity: float) -> Room:
    return Room(name=name, answers=answers, capacity={SLOT: float(slots), **capacity})


def job(seq: int, shape: str = "none", **changes: Any) -> Waiting:
    values: dict[str, Any] = {
        "id": f"j{seq}",
        "seq": seq,
        "version": 1,
        "priority": 0,
        "user": "ann",
        "team": "t",
        "cluster": "c",
        "shape": shape,
        "not_before": 0.0,
        "deadline_at": None,
        "clusters": "",
        "spill_after_s": 0.0,
        "queued_at": 0.0,
    }
    return Waiting(**(values | changes))


def runs(waiting: Waiting) -> Running:
    return Running(
        id=waiting.id,
        seq=waiting.seq,
        priority=waiting.priority,
        user=waiting.user,
        team=waiting.team,
        cluster=waiting.cluster,
        needs=NEEDS[waiting.shape],
    )


def decide(
    waiting: Iterable[Waiting],
    rooms: Sequence[Room],
    running: Iterable[Waiting] = (),
    shares: Shares | None = None,
    **options: Any,
) -> Plan:
    places = {place.name: place for place in rooms}
    now_running = [runs(w) for w in running]
    groups = Line(waiting).groups(0.0)
    return schedule(groups, now_running, places, shares or Shares(), NEEDS, **options)


def test_first_in_is_first_out_whatever_the_order_of_the_input() -> None:
    queue = [job(n) for n in (3, 1, 2)]
    assert decide(queue, [room(slots=2)]).starts == ("j1", "j2")


def test_a_higher_band_goes_before_a_lower_one() -> None:
    queue = [job(1), job(2, priority=10), job(3, priority=-10)]
    assert decide(queue, [room(slots=2)]).starts == ("j2", "j1")


def test_a_gang_starts_with_all_that_it_needs_or_not_at_all() -> None:
    plan = decide([job(1, "gpu8")], [room(GPU=7)])
    assert plan.starts == ()
    assert why(plan, job(1, "gpu8"), 0.0) == "it needs GPU: 8; cluster `c` has 7 in all"
    assert decide([job(1, "gpu8")], [room(GPU=8)]).starts == ("j1",)


def test_what_can_never_fit_holds_up_nobody() -> None:
    queue = [job(1, "gpu16"), job(2, "gpu1")]
    assert decide(queue, [room(GPU=8)]).starts == ("j2",)


def test_small_jobs_fill_the_gap_only_beside_the_place_of_the_large_one() -> None:
    large, small = job(2, "gpu4"), [job(n, "gpu1") for n in range(3, 9)]
    plan = decide([large, *small], [room(GPU=6)], running=[job(1, "gpu3")])
    assert plan.starts == ("j3", "j4"), "three are free, but 4 of 6 are the large one's"
    assert why(plan, large, 0.0).endswith("it is the next in line there")
    assert why(plan, small[2], 0.0) == "it would delay job j2, whose turn is before"
    again = decide([large, *small[2:]], [room(GPU=6)], running=small[:2])
    assert again.starts[0] == "j2", "it starts as soon as what was before it has ended"


def test_a_cluster_that_is_away_holds_up_no_other() -> None:
    queue = [job(1, cluster="away"), job(2)]
    plan = decide(queue, [room(), room("away", answers=False)])
    assert plan.starts == ("j2",)
    assert why(plan, queue[0], 0.0) == "cluster `away` is not up"


def test_teams_share_by_weight_and_users_within_a_team_equally() -> None:
    queue = [job(n, "gpu1", team="a", user="ann") for n in range(100)]
    queue += [job(100 + n, "gpu1", team="b", user="bob") for n in range(100)]
    queue += [job(200 + n, "gpu1", team="b", user="eve") for n in range(100)]
    shares = Shares(teams={"b": Share(weight=3.0)})
    by_id = {w.id: w for w in queue}
    starts = [by_id[i] for i in decide(queue, [room(GPU=40)], shares=shares).starts]
    counts = {u: sum(w.user == u for w in starts) for u in ("ann", "bob", "eve")}
    assert counts == {"ann": 10, "bob": 15, "eve": 15}


def test_the_dominant_resource_decides_the_share() -> None:
    queue = [job(n, "cpu4gpu1", team="a", user="ann") for n in range(20)]
    queue += [job(100 + n, "gpu1", team="b", user="bob") for n in range(20)]
    plan = decide(queue, [room(CPU=32, GPU=16)])
    num_a = sum(int(i[1:]) < 100 for i in plan.starts)
    assert num_a * 4 / 32 == pytest.approx((len(plan.starts) - num_a) / 16, abs=1 / 8)


def test_a_quota_holds_its_owner_and_nobody_else() -> None:
    queue = [job(n, "gpu1", user="ann", team="a") for n in range(5)]
    queue += [job(10 + n, "gpu1", user="bob", team="b") for n in range(2)]
    shares = Shares(users={"ann": Share(limits={"GPU": 2.0})})
    plan = decide(queue, [room(GPU=16)], shares=shares)
    assert sorted(plan.starts) == ["j0", "j1", "j10", "j11"]
    assert why(plan, queue[4], 0.0) == "user ann is at its quota of 2 GPU"


def test_a_quota_counts_what_runs_already_on_all_clusters() -> None:
    shares = Shares(teams={"t": Share(limits={SLOT: 2.0})})
    running = [job(1), job(2, cluster="d")]
    plan = decide([job(3)], [room(), room("d")], running=running, shares=shares)
    assert why(plan, job(3), 0.0) == "team t is at its quota of 2 jobs"


def test_a_job_waits_out_its_pause_and_ends_with_its_deadline() -> None:
    line = Line([job(1, not_before=9.0), job(2, deadline_at=5.0)])
    for now, starts, expired in ((1.0, ("j2",), []), (6.0, ("j2",), ["j2"])):
        plan = schedule(line.groups(now), [], {"c": room()}, Shares(), NEEDS)
        assert (plan.starts, line.expired(now)) == (starts, expired)
    assert why(plan, line["j1"], 6.0) == "its next try is in 3 s"
    line.remove("j2")
    assert line.expired(20.0) == []
    assert list(line.groups(20.0)) == [key_of(line["j1"])]


def test_a_job_that_comes_back_stands_where_it_stood() -> None:
    line = Line([job(1), job(2), job(3)])
    line.remove("j1")
    line.put(job(1, version=2))
    assert list(line.groups(0.0)[key_of(job(1))]) == ["j1", "j2", "j3"]


def test_preemption_takes_the_newest_of_the_lowest_band_and_no_more_than_needed() -> None:
    running = [job(1, "gpu2", priority=-10), job(2, "gpu2", priority=-10), job(3, "gpu4")]
    plan = decide([job(9, "gpu2", priority=10)], [room(GPU=8)], running, preempt=True)
    assert plan.preempts == (("j2", "j9"),)
    assert plan.starts == (), "it starts when they have ended"
    assert decide([job(9, "gpu2", priority=10)], [room(GPU=8)], running).preempts == ()


def test_nobody_is_preempted_while_those_who_were_told_are_leaving() -> None:
    leaving = Running(
        id="j1",
        seq=1,
        priority=-10,
        user="a",
        team="t",
        cluster="c",
        needs=NEEDS["gpu2"],
        leaving=True,
    )
    other = runs(job(2, "gpu2", priority=-10))
    groups = Line([job(9, "gpu2", priority=10)]).groups(0.0)
    rooms = {"c": room(GPU=4)}
    plan = schedule(groups, [leaving, other], rooms, Shares(), NEEDS, preempt=True)
    assert plan.preempts == ()


def test_equals_and_betters_are_never_preempted() -> None:
    running = [job(1, "gpu4", priority=10), job(2, "gpu4")]
    plan = decide([job(9, "gpu8")], [room(GPU=8)], running, preempt=True)
    assert plan.preempts == ()


@pytest.mark.parametrize("seed", range(60))
def test_random_queues_all_end_within_the_room_and_nobody_starves(seed: int) -> None:
    """A small cluster, many users; a steady stream of small jobs beside a few large ones."""
    chance = random.Random(seed)
    rooms = [room("c", slots=6, GPU=8), room("d", slots=3, GPU=4)]
    shares = Shares(
        teams={"t0": Share(weight=2.0), "t1": Share(limits={"GPU": 6.0})},
        users={"u1": Share(limits={SLOT: 3.0})},
    )
    waiting: dict[str, Waiting] = {}
    running: dict[str, tuple[Waiting, int]] = {}
    born: dict[str, int] = {}
    started: list[str] = []
    seq = 0
    for step in range(400):
        for _ in range(chance.choice((0, 0, 1, 1, 2)) if step < 150 else 0):
            seq += 1
            shape = chance.choice(("none", "gpu1", "gpu1", "gpu2", "gpu4", "gpu8"))
            cluster = "c" if shape == "gpu8" else chance.choice("cd")
            user = chance.choice(("u0", "u1", "u2"))
            team = "t0" if shape == "gpu8" else chance.choice(("t0", "t1", "t2"))
            new = job(seq, shape, cluster=cluster, user=user, team=team)
            waiting[new.id], born[new.id] = new, step
        for job_id in [i for i, (_, end) in running.items() if end <= step]:
            del running[job_id]
        plan = decide(waiting.values(), rooms, [w for w, _ in running.values()], shares)
        for job_id in plan.starts:
            running[job_id] = (waiting.pop(job_id), step + chance.randint(1, 6))
            started.append(job_id)
            assert step - born[job_id] < 300
        _check(rooms, [w for w, _ in running.values()], shares)
        _check_fifo(waiting, plan, started)
    assert not waiting, f"never started: {sorted(waiting)}"
    assert len(started) == len(set(started)) == seq


def _check(rooms: Sequence[Room], running: Sequence[Waiting], shares: Shares) -> None:
    for place in rooms:
        for resource, most in place.capacity.items():
            assert _sum(running, resource, cluster=place.name) <= most
    for name, share in shares.teams.items():
        for resource, most in share.limits.items():
            assert _sum(running, resource, team=name) <= most
    for name, share in shares.users.items():
        for resource, most in share.limits.items():
            assert _sum(running, resource, user=name) <= most


def _sum(running: Sequence[Waiting], resource: str, **owner: str) -> float:
    return sum(
        dict(NEEDS[w.shape]).get(resource, 0.0)
        for w in running
        if all(getattr(w, field) == value for field, value in owner.items())
    )


def _check_fifo(waiting: Mapping[str, Waiting], plan: Plan, started: Sequence[str]) -> None:
    """Of jobs that are alike but for their time, none started before an older one."""
    for job_id in plan.starts:
        number = int(job_id[1:])
        for other in waiting.values():
            if other.seq < number and why(plan, other, 0.0).startswith("it is its turn"):
                raise AssertionError(f"{other.id} was passed over by {job_id} without a reason")


def test_a_large_job_is_not_starved_by_an_endless_stream_of_small_ones() -> None:
    chance = random.Random(1)
    large = job(1, "gpu8", user="big", team="big")
    waiting = {large.id: large}
    running: dict[str, tuple[Waiting, int]] = {"j0": (job(0, "gpu1", user="s", team="s"), 3)}
    for step in range(200):
        for n in range(3):
            new = job(10 + step * 3 + n, "gpu1", user=f"s{n}", team="s")
            waiting[new.id] = new
        running = {i: r for i, r in running.items() if r[1] > step}
        plan = decide(waiting.values(), [room(GPU=8)], [w for w, _ in running.values()])
        if large.id in plan.starts:
            assert step < 10
            return
        for job_id in plan.starts:
            running[job_id] = (waiting.pop(job_id), step + chance.randint(2, 9))
    raise AssertionError("the large job never started")


def spilled(
    jobs: Sequence[Waiting], rooms: Sequence[Room], running: Iterable[Waiting] = ()
) -> Any:
    places = {place.name: place for place in rooms}
    return spill.moves(100.0, jobs, [runs(w) for w in running], places, NEEDS)


def test_a_job_leaves_a_cluster_that_is_away_for_the_next_that_can_hold_it() -> None:
    both = job(1, "gpu4", cluster="a", clusters="a b c d", spill_after_s=1e9)
    rooms = [
        room("a", answers=False),
        room("b", answers=False),
        room("c", GPU=2),
        room("d", GPU=4),
    ]
    assert spilled([both], rooms) == [("j1", "d", "it does not answer")]
    assert spilled([both], [room("a", answers=False)]) == []
    assert spilled([both], [room("d", GPU=4)]) == [], "nobody has looked at a yet"


def test_a_job_spills_over_after_its_patience_and_only_to_where_there_is_place_now() -> None:
    rooms = [room("a", GPU=1), room("b", GPU=2)]
    full = [job(1, "gpu1", cluster="a")]
    patient = job(2, "gpu1", cluster="a", clusters="a b", queued_at=50.0, spill_after_s=60.0)
    hasty = job(3, "gpu1", cluster="a", clusters="a b", queued_at=50.0, spill_after_s=40.0)
    assert spilled([patient, hasty], rooms, full) == [("j3", "b", "no place for 40 s")]
    assert spilled([hasty], rooms, [*full, job(4, "gpu2", cluster="b")]) == []
    three = [hasty._replace(id=f"j{n}", seq=n) for n in (3, 4, 5)]
    assert [move[0] for move in spilled(three, rooms, full)] == ["j3", "j4"], "b has place for two"


def test_a_job_with_place_where_it_is_stays() -> None:
    here = job(1, "gpu1", cluster="a", clusters="a b")
    assert spilled([here], [room("a", GPU=1), room("b", GPU=1)]) == []
