"""Changing applications: one at a time, each noted, and what goes back to what."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_deploy_plan import CLUSTER, app, llm, running, train, wanted

from manta import storage
from manta.cli.main import cli
from manta.cluster.record import ClusterRecord
from manta.errors import InputError, MantaError
from manta.serving.apps import history, lock, models, places, surge
from manta.serving.apps.plan import App, Deployment, ServeState, plan_deploy, plan_restore
from manta.serving.telemetry import vitals


def cluster(root):
    return ClusterRecord(
        name="local",
        cluster_id="c1",
        pid=1,
        gcs_address="",
        dashboard_url="",
        serve_url="http://127.0.0.1:8000",
        token_path="",
        temp_dir="",
        storage_url=str(root),
        started_at="",
    )


# --- lock ------------------------------------------------------------------------------------


def test_of_several_who_want_the_lock_one_gets_it_and_the_others_hear_who(tmp_path):
    gate, results = threading.Barrier(8), []

    def want(number):
        gate.wait()
        try:
            with lock.held(cluster(tmp_path), f"deploy {number}", print):
                results.append("held")
                done.wait(10)
        except MantaError as error:
            results.append(str(error))

    done = threading.Event()
    threads = [threading.Thread(target=want, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(results) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert results.count("held") == 1
    refused = [text for text in results if text != "held"]
    assert len(refused) == 7
    assert all("has been changing this cluster since" in text for text in refused)


def test_the_lock_is_free_again_after_its_block_whatever_happened_in_it(tmp_path):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), lock.held(cluster(tmp_path), "x", print):
            _ = 1 / 0
    with lock.held(cluster(tmp_path), "x", print) as held:
        assert held.number == 4


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_rollout import cluster
from manta.serving.apps import lock
with lock.held(cluster(sys.argv[1]), "deploy of the dead", print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_holder_that_was_killed_on_this_machine_keeps_nobody_out(tmp_path):
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", HOLD, str(tmp_path), here]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(MantaError, match="deploy of the dead"),
            lock.held(cluster(tmp_path), "x", print),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock.held(cluster(tmp_path), "x", print) as held:
            assert held.number == 2


def held_elsewhere(root, age_s):
    folder = places.lock(cluster(root))
    holder = {"process": ["elsewhere/1", 1, 1.0], "by": "ann@far", "doing": "deploy a.yaml"}
    storage.write_json(storage.join(folder, "000001.json"), holder | {"at": time.time() - age_s})
    return folder


@pytest.mark.parametrize("age_s", [60, -3600], ids=["old", "by a clock that is ahead"])
def test_a_holder_elsewhere_that_stands_still_is_taken_over_after_a_time(tmp_path, age_s):
    held_elsewhere(tmp_path, age_s)
    said = []
    with lock.held(cluster(tmp_path), "x", said.append, ttl_s=0.6) as held:
        assert held.number == 2
    assert len(said) == 1
    assert "ann@far" in said[0]
    assert "seems dead" in said[0]


def test_a_holder_elsewhere_whose_clock_is_behind_but_who_beats_is_left_alone(tmp_path):
    folder = held_elsewhere(tmp_path, 3600)
    stop = threading.Event()

    def beat():
        at = time.time() - 3600
        while not stop.wait(0.1):
            at += 0.1
            storage.write_json(storage.join(folder, "000001.beat.json"), {"at": at})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(MantaError, match="ann@far has been changing this cluster since"),
            lock.held(cluster(tmp_path), "x", print, ttl_s=2),
        ):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_holder_that_was_taken_over_may_not_change_anything_any_more(tmp_path):
    with lock.held(cluster(tmp_path), "x", print) as held:
        held.check()
        taken = {"process": ["elsewhere/1", 1, 1.0], "by": "b", "doing": "y", "at": time.time()}
        storage.write_json(storage.join(held.folder, "000002.json"), taken)
        with pytest.raises(lock.LockLost, match="has taken over"):
            held.check()


# --- history ---------------------------------------------------------------------------------


def note(root, name, state="healthy", action="deploy", **entry):
    config = None if action == "undeploy" else app(name, **entry)
    version = history.begin(cluster(root), name, action, config, file="a.yaml")
    if state:
        history.end(cluster(root), version, state, "why not" if state == "failed" else "")
    return version


def test_history_tells_who_changed_what_over_what_and_what_came_of_it(tmp_path):
    note(tmp_path, "a", args={"x": 1})
    note(tmp_path, "a", "failed", args={"x": 2})
    note(tmp_path, "a", None, args={"x": 3})
    found = history.read(places.home(cluster(tmp_path)), "a")
    assert [v.number for v in found] == [1, 2, 3]
    assert [v.outcome and v.outcome.state for v in found] == ["healthy", "failed", None]
    assert found[1].outcome.why == "why not"
    assert found[0].config_passthrough == app("a", args={"x": 1})
    assert "@" in found[0].by
    assert found[0].cluster_id == "c1"


def test_a_name_with_a_slash_has_a_history_of_its_own(tmp_path):
    note(tmp_path, "team/a")
    note(tmp_path, "team")
    assert history.apps(places.home(cluster(tmp_path))) == ("team", "team/a")
    assert [v.app for v in history.read(places.home(cluster(tmp_path)), "team/a")] == ["team/a"]


def test_the_history_of_a_cluster_that_is_gone_is_still_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MANTA_STORAGE", str(tmp_path))
    note(tmp_path, "a", "failed")
    told = CliRunner().invoke(cli, ["apps", "history"])
    assert told.exit_code == 0
    assert "deploy a.yaml" in told.output
    assert "failed: why not" in told.output


def test_a_secret_is_not_in_the_storage_and_comes_from_what_runs(tmp_path):
    secret = {"env_vars": {"HF_TOKEN": "hf_" + "a" * 30, "DB_PASSWORD": "s3cretvalue"}}
    version = note(tmp_path, "a", runtime_env=secret)
    texts = [file.read_text() for file in tmp_path.rglob("*.json")]
    assert not any("hf_a" in text or "s3cretvalue" in text for text in texts)
    assert history.unmask(version, app("a", runtime_env=secret)) == app("a", runtime_env=secret)
    with pytest.raises(InputError, match=r"had a secret at `runtime_env\.env_vars\.HF_TOKEN`"):
        history.unmask(version, app("a"))


def test_the_running_version_is_found_though_its_secrets_and_surge_are_not_kept(tmp_path):
    secret = {"env_vars": {"DB_PASSWORD": "s3cretvalue"}}
    note(tmp_path, "a", args={"x": 1})
    note(tmp_path, "a", runtime_env=secret)
    runs = surge.with_surge(app("a", runtime_env=secret), ["D"])
    assert history.find(runs, history.read(places.home(cluster(tmp_path)), "a")).number == 2


def test_going_back_skips_failed_unfinished_and_equal_versions(tmp_path):
    note(tmp_path, "a", args={"x": 1})
    note(tmp_path, "a", args={"x": 2})
    note(tmp_path, "a", "failed", args={"x": 3})
    note(tmp_path, "a", None, args={"x": 4})
    note(tmp_path, "a", args={"x": 2})
    versions = history.read(places.home(cluster(tmp_path)), "a")
    assert history.before(versions, versions[-1]).number == 1
    assert history.before(versions, versions[2]).number == 2
    with pytest.raises(InputError, match="no healthy version before"):
        history.before(versions, versions[0])


def test_an_undeployed_application_goes_back_to_its_last_healthy_version(tmp_path):
    note(tmp_path, "a")
    note(tmp_path, "a", "removed", "undeploy")
    assert history.before(history.read(places.home(cluster(tmp_path)), "a"), None).number == 1


def test_a_version_that_cannot_run_is_refused_with_those_that_can(tmp_path):
    note(tmp_path, "a")
    note(tmp_path, "a", "removed", "undeploy")
    versions = history.read(places.home(cluster(tmp_path)), "a")
    with pytest.raises(InputError, match="no version 2; known: 1"):
        history.numbered(versions, 2)


# --- vitals ----------------------------------------------------------------------------------


def fare(root, replica, requests, errors=0, seconds=0.1):
    writer = vitals.VitalsWriter(str(root), replica)
    for number in range(requests):
        writer.add(number < errors, seconds)
    writer.flush()


def test_counts_of_replicas_add_up_and_one_without_any_counts_nothing(tmp_path):
    fare(tmp_path, "r1", 100, errors=4, seconds=0.1)
    fare(tmp_path, "r2", 100, seconds=0.4)
    both = vitals.read(str(tmp_path), ["r1", "r2", "r3"])
    assert (both.num_requests, both.error_rate) == (200, 0.02)
    assert 0.4 <= both.p95_s < 0.48
    assert 0.1 <= vitals.read(str(tmp_path), ["r1"]).p95_s < 0.12


@pytest.mark.parametrize(
    ("requests", "errors", "seconds", "fault"),
    [
        (100, 0, 0.1, None),
        (100, 2, 0.1, None),  # two of a hundred more is what may be
        (100, 5, 0.1, "5 of 100 requests fail (5.0%); before, 1.0% did"),
        (10, 10, 0.1, None),  # too few to tell
        (100, 0, 0.3, "(p95); before, after 0.1"),
        (40, 0, 9, None),
    ],
)
def test_a_version_is_worse_if_more_fails_or_it_is_slower_than_the_one_before(
    tmp_path, requests, errors, seconds, fault
):
    fare(tmp_path, "old", 100, errors=1, seconds=0.1)
    fare(tmp_path, "new", requests, errors, seconds)
    old, new = (vitals.read(str(tmp_path), [name]) for name in ("old", "new"))
    found = vitals.worse(old, new, max_error_rate=0.02, max_latency_ratio=1.5)
    assert (found is None) == (fault is None)
    assert (fault or "") in (found or "")


def test_a_first_version_is_held_to_the_error_rate_alone(tmp_path):
    fare(tmp_path, "new", 100, errors=5, seconds=9)
    new = vitals.read(str(tmp_path), ["new"])
    assert "before, 0.0% did" in vitals.worse(vitals.Vitals(), new, 0.02, 1.5)
    assert vitals.worse(vitals.Vitals(), new, 0.1, 1.5) is None


# --- surge and restore -----------------------------------------------------------------------


def runs(name, *deployments, replicas=(), **entry):
    return App(
        name=name,
        status="RUNNING",
        route_prefix=f"/{name}",
        message="",
        deployments=tuple(
            Deployment(
                name=d,
                status="HEALTHY",
                num_replicas=1,
                target_num_replicas=1,
                message="",
                replicas=frozenset(replicas),
            )
            for d in deployments
        ),
        config_passthrough=app(name, **entry),
    )


def test_replacements_start_first_unless_the_file_says_otherwise():
    now = ServeState(apps=(runs("a", "One", "Two"),))
    new = app("a", args={"x": 1}, deployments=[{"name": "Two", "max_surge_percent": 0}])
    sent = plan_deploy(now, wanted(new), **CLUSTER).body_passthrough["applications"][0]
    assert {d["name"]: d["max_surge_percent"] for d in sent["deployments"]} == {
        "One": 100,
        "Two": 0,
    }
    plain = plan_deploy(now, wanted(new), **CLUSTER, surge=False).body_passthrough
    assert plain["applications"] == [new]


def test_what_a_deploy_added_does_not_make_the_same_file_a_change():
    sent = surge.with_surge(app("a"), ["One"])
    assert plan_deploy(running(sent), wanted(app("a")), **CLUSTER).unchanged == ("a",)
    other = app("a", deployments=[{"name": "One", "max_surge_percent": 0}])
    assert plan_deploy(running(sent), wanted(other), **CLUSTER).changed == ("a",)


def test_a_file_that_leaves_name_and_route_to_serve_is_found_again_in_history(tmp_path):
    entry = {"import_path": "m:app", "args": {"x": 1}}
    plan = plan_deploy(ServeState(), wanted(entry), **CLUSTER)
    config = plan.apps_passthrough["default"]
    history.begin(cluster(tmp_path), "default", "deploy", config)
    (sent,) = plan.body_passthrough["applications"]
    assert history.find(sent, history.read(places.home(cluster(tmp_path)), "default")).number == 1


def test_an_unchanged_application_is_sent_as_it_runs_and_a_rescaled_one_names_no_other():
    entry = app("a", deployments=[{"name": "One", "num_replicas": 1}])
    now = ServeState(apps=(runs("a", "One", "Two", deployments=entry["deployments"]),))

    def sent(new):
        plan = plan_deploy(now, wanted(new), **CLUSTER)
        return plan.body_passthrough["applications"][0]["deployments"]

    assert sent(entry) == [{"name": "One", "num_replicas": 1}]
    more = app("a", deployments=[{"name": "One", "num_replicas": 2}])
    assert sent(more) == [{"name": "One", "num_replicas": 2, "max_surge_percent": 100}]
    other = app("a", args={"x": 1}, deployments=entry["deployments"])
    assert [one["name"] for one in sent(other)] == ["One", "Two"]


def test_restoring_puts_back_the_old_removes_the_new_and_keeps_the_others():
    before = ServeState(apps=(runs("a", "D", replicas="r", args={"x": 1}), runs("other")))
    now = ServeState(
        apps=(
            runs("a", "D", replicas="s", args={"x": 2}),
            runs("new"),
            runs("other", args={"y": 1}),
        )
    )
    apps = {e["name"]: e for e in plan_restore(now, before, ["a", "new"])["applications"]}
    assert sorted(apps) == ["a", "other"]
    assert apps["a"] == surge.with_surge(app("a", args={"x": 1}), ["D"])
    assert apps["other"] == app("other", args={"y": 1})


def test_restoring_leaves_replicas_alone_that_still_run_as_before():
    before = ServeState(apps=(runs("a", "D", replicas="pq", args={"x": 1}),))
    now = ServeState(apps=(runs("a", "D", replicas="qr", args={"x": 2}),))
    assert plan_restore(now, before, ["a"])["applications"] == [app("a", args={"x": 1})]


# --- models ----------------------------------------------------------------------------------


def test_a_model_whose_bytes_were_changed_is_refused_before_anything_is_sent(tmp_path):
    train(tmp_path, "m", "one")
    models.verify(llm("m"), str(tmp_path))
    (tmp_path / "models" / "m" / "model.safetensors").write_text("eno")  # of the same size
    with pytest.raises(InputError, match="model `m` is damaged"):
        models.verify(llm("m"), str(tmp_path))


def test_weights_that_were_replaced_are_known_to_be_gone(tmp_path):
    train(tmp_path, "m", "one")
    pinned = models.pin_models(wanted(llm("m")), str(tmp_path)).applications_passthrough[0]
    assert models.gone(pinned, str(tmp_path)) == ()
    train(tmp_path, "m", "two")
    assert models.gone(pinned, str(tmp_path)) == ("m",)
