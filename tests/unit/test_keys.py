"""API keys: who they let in, how they are kept, and how they end."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from manta.cli.main import cli
from manta.errors import InputError
from manta.serving.access import key_store, keys, owner, usage
from manta.serving.access.keys import Role
from manta.spec.guard import Limits, Price


def made(root: Path, name: str = "a", **changes: object) -> tuple[keys.Key, str]:
    key, secret = keys.make(name=name, owner="me", now=time.time(), **changes)  # type: ignore[arg-type]
    key_store.save(str(root), key)
    return key, secret


def test_a_key_comes_back_from_the_store_as_it_was_made_and_without_its_secret(
    tmp_path: Path,
) -> None:
    key, secret = made(
        tmp_path,
        role=Role.VIEWER,
        models=("llama*",),
        expires_at=5e9,
        limits=Limits(requests_per_min=3),
    )
    assert key_store.read(str(tmp_path))[key.id].key == key
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert secret.encode() not in written
    assert secret.split("_", 2)[2].encode() not in written
    assert keys.SECRET.fullmatch(secret.encode())


def test_a_user_key_reaches_only_routes_that_are_known_to_ask_models() -> None:
    key, _ = keys.make(name="a", owner="me", now=0)
    assert key.may_call("POST", "/v1/chat/completions")
    assert key.may_call("GET", "/v1/models/some/model")
    for method, path in [
        ("POST", "/v1/new-in-the-next-vllm"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("POST", "//v1/completions"),
        ("DELETE", "/v1/completions"),
        ("POST", "/v1/models/a"),
    ]:
        assert not key.may_call(method, path), path


def test_a_viewer_reads_and_never_asks() -> None:
    key, _ = keys.make(name="a", owner="me", now=0, role=Role.VIEWER)
    assert key.may_call("GET", "/metrics")
    assert key.may_call("GET", "/v1/models")
    assert not key.may_call("POST", "/v1/completions")
    assert not key.may_call("POST", "/metrics")


def test_a_revocation_reaches_a_table_and_cannot_be_lost_to_another_writer(tmp_path: Path) -> None:
    key, secret = made(tmp_path)
    table = key_store.KeyTable(str(tmp_path))
    assert table.find(secret.encode()) is None  # closed until it was read
    table.refresh()
    found = table.find(secret.encode())
    assert found is not None
    assert found.alive(time.time())
    key_store.revoke(str(tmp_path), key.id, 0, "me")
    key_store.save(str(tmp_path), key)  # as by one who still holds the old value
    table.refresh()
    ended = table.find(secret.encode())
    assert ended is not None
    assert not ended.alive(time.time())
    assert not ended.alive(0)  # whatever the host's clock says


def test_a_table_keeps_what_it_knows_while_the_store_cannot_be_read(tmp_path: Path) -> None:
    _, secret = made(tmp_path)
    table = key_store.KeyTable(str(tmp_path))
    table.refresh()
    table.root = "nosuchstore://bucket"
    assert not table.refresh()
    assert table.loaded
    assert table.find(secret.encode())


def test_a_table_that_never_read_its_store_says_so() -> None:
    table = key_store.KeyTable("nosuchstore://bucket")
    assert not table.refresh()
    assert not table.loaded


def test_a_damaged_key_opens_nothing_and_hides_no_other(tmp_path: Path) -> None:
    _, secret = made(tmp_path)
    (tmp_path / "keys" / "bad.json").write_text('{"id": "bad"')
    (tmp_path / "keys" / "worse.json").write_text("[]")
    table = key_store.KeyTable(str(tmp_path))
    assert table.refresh()
    assert table.find(secret.encode())
    assert len(key_store.read(str(tmp_path))) == 1


def test_a_key_ends_when_it_expires(tmp_path: Path) -> None:
    key, _ = made(tmp_path, expires_at=100.0)
    stored = key_store.read(str(tmp_path))[key.id]
    assert stored.alive(99.9)
    assert not stored.alive(100)
    key_store.revoke(str(tmp_path), key.id, 50, "me")
    assert key_store.read(str(tmp_path))[key.id].ends_at() == 50


def test_a_name_that_two_living_keys_have_is_asked_back(tmp_path: Path) -> None:
    first, _ = made(tmp_path)
    second, _ = made(tmp_path)
    with pytest.raises(InputError, match="2 keys are named `a`"):
        key_store.find(str(tmp_path), "a")
    key_store.revoke(str(tmp_path), first.id, 0, "me")
    assert key_store.find(str(tmp_path), "a").key == second


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MANTA_STORAGE", str(tmp_path / "storage"))
    return tmp_path


def run(*words: str) -> str:
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_secret_is_all_that_make_prints_on_stdout_and_list_never_shows_it(home: Path) -> None:
    secret = run("keys", "make", "team-a", "--requests-per-min", "60", "--model", "llama*").strip()
    assert keys.SECRET.fullmatch(secret.encode())
    listed = run("keys", "list", "--json") + run("keys", "list")
    assert "team-a" in listed
    assert "requests_per_min 60" in listed
    assert secret not in listed
    assert keys.digest(secret.encode()) not in listed


def test_a_rotated_key_keeps_its_scopes_and_the_old_one_ends(home: Path) -> None:
    run("keys", "make", "team-a", "--model", "llama*", "--tokens-per-min", "9")
    (before,) = json.loads(run("keys", "list", "--json"))
    run("keys", "rotate", "team-a")
    (after,) = json.loads(run("keys", "list", "--json"))
    assert after["id"] != before["id"]
    same = ("name", "models", "limits", "role", "owner")
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    assert len(json.loads(run("keys", "list", "--all", "--json"))) == 2


def test_during_its_grace_a_rotated_key_still_opens(home: Path) -> None:
    run("keys", "make", "team-a")
    run("keys", "rotate", "team-a", "--grace-s", "60")
    assert len(json.loads(run("keys", "list", "--json"))) == 2


def test_a_secret_that_goes_to_a_file_is_readable_by_its_owner_only(home: Path) -> None:
    file = home / "secret"
    assert run("keys", "make", "team-a", "--out", str(file)) == ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.SECRET.fullmatch(file.read_bytes().strip())


def test_revoking_what_is_not_there_says_so(home: Path) -> None:
    with pytest.raises(InputError, match="no key `nobody` that is still good"):
        cli.main(["keys", "revoke", "nobody"], standalone_mode=False)


# --- use -------------------------------------------------------------------------------------


def test_use_of_several_replicas_adds_up_with_its_cost(home: Path) -> None:
    root, month = str(home / "storage"), usage.month_of(time.time())
    prices = {"m": Price(prompt_usd_per_million=1, completion_usd_per_million=3)}
    for _ in range(2):
        ledger = usage.Ledger(root, prices)
        ledger.add("k", "m", 100, 50)
        ledger.flush()
        ledger.add("k", "m", 100, 50)
        ledger.flush()
    (row,) = usage.read(root, month)
    assert (row.num_requests, row.prompt_tokens, row.completion_tokens) == (4, 400, 200)
    assert row.cost_usd == pytest.approx(0.001)
    spent = usage.spent_by_key(root, month)["k"]
    assert spent.num_tokens == 600
    assert spent.cost_usd == pytest.approx(0.001)
    assert "400" in run("keys", "usage")


def test_use_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    (tmp_path / "usage").write_text("in the way")
    ledger = usage.Ledger(str(tmp_path), {})
    ledger.add("k", "m", 1, 1)
    with pytest.raises(Exception, match="usage"):
        ledger.flush()
    (tmp_path / "usage").unlink()
    ledger.flush()
    spent = usage.spent_by_key(str(tmp_path), usage.month_of(time.time()))
    assert spent["k"].num_tokens == 2


def test_a_limit_on_money_comes_back_as_it_was_given(home: Path) -> None:
    run("keys", "make", "team-a", "--usd-per-month", "12.5")
    (made,) = json.loads(run("keys", "list", "--json"))
    assert made["limits"] == {"usd_per_month": 12.5}
    done = CliRunner().invoke(cli, ["keys", "make", "b", "--usd-per-month", "nan"])
    assert (done.exit_code, "not an amount" in done.output) == (2, True)


def test_only_apps_that_ask_for_keys_count_as_guarded() -> None:
    app = {"import_path": owner.BUILDER}
    assert owner.is_guarded(app)
    assert owner.is_guarded({**app, "args": {"guard": {"keys": "required"}}})
    assert not owner.is_guarded({**app, "args": {"guard": {"keys": "none"}}})
    assert not owner.is_guarded({"import_path": "hello:app"})
    assert owner.is_guarded({"import_path": "own:app", "args": {"guard": {}}})
    assert not owner.is_guarded({"import_path": "own:app", "args": {"guard": {"keys": "none"}}})
