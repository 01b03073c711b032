"""`manta keys`: who may call the LLM applications of a cluster, and how much they used."""

from __future__ import annotations

import getpass
import math
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manta import storage
from manta.cli import output, watch
from manta.cluster import record
from manta.errors import InputError

if TYPE_CHECKING:
    from manta.serving.access.key_store import Stored
    from manta.serving.access.keys import Key

DAY_S = 24 * 3600


@click.group(
    epilog=output.example(
        "manta keys make team-a --model 'quickstart*' --requests-per-min 60",
        "manta keys list",
        "manta keys rotate team-a --grace-s 3600",
        "manta keys revoke team-a",
        "manta keys usage",
    )
)
def command() -> None:
    """Make, list, rotate and revoke API keys, and see what they used.

    They open the LLM applications (`manta.serving.llm:build_openai_app`) of every cluster that
    shares the storage. Only hashes are stored; a change is in force within 2 s.
    """


_out_option = click.option(
    "--out", metavar="FILE", help="Write the secret there, mode 0600, instead of to stdout."
)


@command.command("make", epilog=output.example("manta keys make team-a --expires-days 90"))
@click.argument("name")
@click.option("--owner", help="Who answers for it; you, if not given.")
@click.option(
    "--role", type=click.Choice(["user", "viewer", "admin"]), default="user", show_default=True
)
@click.option("--model", "models", multiple=True, help="Pattern of models it is for; repeatable.")
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True))
@click.option("--requests-per-min", type=click.IntRange(min=1))
@click.option("--tokens-per-min", type=click.IntRange(min=1))
@click.option("--concurrent-requests", type=click.IntRange(min=1))
@click.option("--tokens-per-month", type=click.IntRange(min=1))
@click.option(
    "--usd-per-month",
    type=click.FloatRange(min=0, min_open=True),
    callback=lambda context, option, value: _finite(value),
    help="At the applications' `prices`.",
)
@_out_option
@output.cluster_option
@output.json_option
def make(
    name: str,
    owner: str | None,
    role: str,
    models: tuple[str, ...],
    expires_days: float | None,
    out: str | None,
    cluster: str,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Make key NAME. Its secret is shown this once and kept nowhere."""
    from manta.serving.access import key_store, keys
    from manta.spec.guard import Limits

    now = time.time()
    key, secret = keys.make(
        name=name,
        owner=owner or getpass.getuser(),
        now=now,
        role=keys.Role(role),
        models=models or ("*",),
        expires_at=now + expires_days * DAY_S if expires_days else None,
        limits=Limits.model_validate(limits),
    )
    key_store.save(_root(cluster), key)
    watch.note("api key made", f"{key.name} ({key.id}), {key.role}, for {key.owner}", cluster)
    _hand_over(key, secret, out, as_json)


@command.command("list", epilog=output.example("manta keys list --json"))
@click.option("--all", "show_all", is_flag=True, help="Also those that are revoked or expired.")
@output.cluster_option
@output.json_option
def list_(show_all: bool, cluster: str, as_json: bool) -> None:
    """List keys, never their secrets."""
    from manta.serving.access import key_store

    now = time.time()
    table = key_store.read(_root(cluster)).values()
    found = sorted(
        (one for one in table if show_all or one.alive(now)), key=lambda one: one.key.created_at
    )
    if as_json:
        output.print_json([_facts(one, now) for one in found])
    elif found:
        columns = ["ID", "NAME", "OWNER", "ROLE", "MODELS", "LIMITS", "ENDS"]
        output.print_table(columns, [_row(one, now) for one in found])
    else:
        output.say("no keys; make one with `manta keys make NAME`")


@command.command("revoke", epilog=output.example("manta keys revoke team-a"))
@click.argument("key", metavar="ID|NAME")
@output.cluster_option
@output.json_option
def revoke(key: str, cluster: str, as_json: bool) -> None:
    """End a key at once. This cannot be undone."""
    from manta.serving.access import key_store

    root = _root(cluster)
    found = key_store.find(root, key).key
    key_store.revoke(root, found.id, 0, getpass.getuser())
    watch.note("api key revoked", f"{found.name} ({found.id})", cluster)
    if as_json:
        output.print_json({"id": found.id, "name": found.name})
        return
    click.echo(f"revoked {found.id} ({found.name}); refused everywhere within 2 s")


@command.command("rotate", epilog=output.example("manta keys rotate team-a --grace-s 3600"))
@click.argument("key", metavar="ID|NAME")
@click.option(
    "--grace-s",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="How long the old secret still opens.",
)
@_out_option
@output.cluster_option
@output.json_option
def rotate(key: str, grace_s: float, out: str | None, cluster: str, as_json: bool) -> None:
    """Replace a key by one with a new secret and the same scopes and limits."""
    from manta.serving.access import key_store, keys

    root, now = _root(cluster), time.time()
    stored = key_store.find(root, key)
    if not stored.alive(now):
        raise InputError(f"key `{key}` has ended", "make a new one with `manta keys make`")
    fresh, secret = keys.make(name=stored.key.name, owner=stored.key.owner, now=now)
    new = replace(stored.key, id=fresh.id, sha256=fresh.sha256, created_at=now)
    key_store.save(root, new)
    key_store.revoke(root, stored.key.id, now + grace_s if grace_s else 0, getpass.getuser())
    text = f"{new.name}: {stored.key.id} replaced by {new.id}"
    watch.note("api key rotated", text, cluster)
    _hand_over(new, secret, out, as_json)


@command.command("usage", epilog=output.example("manta keys usage --month 2026-11"))
@click.option("--month", help="As 2026-11 (UTC); the current one if not given.")
@output.cluster_option
@output.json_option
def usage_(month: str | None, cluster: str, as_json: bool) -> None:
    """Show what each key used of each model in a month."""
    from manta.serving.access import key_store, usage
    from manta.serving.access.limits import month_of

    root = _root(cluster)
    rows = usage.read(root, _month(month) if month else month_of(time.time()))
    names = {key_id: stored.key.name for key_id, stored in key_store.read(root).items()}
    if as_json:
        output.print_json([{"name": names.get(r.key_id, ""), **asdict(r)} for r in rows])
        return
    columns = ["KEY", "NAME", "MODEL", "REQUESTS", "CACHED"]
    columns += ["PROMPT TOKENS", "COMPLETION TOKENS", "USD"]
    output.print_table(
        columns,
        [
            (
                r.key_id,
                names.get(r.key_id, "-"),
                r.model or "-",
                r.num_requests,
                r.num_cached,
                r.prompt_tokens,
                r.completion_tokens,
                f"{r.cost_usd:.4f}",
            )
            for r in rows
        ],
    )


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("that is not an amount; write 20, or leave it out for no limit")
    return value


def _root(cluster: str) -> str:
    """The storage of the cluster, or where a cluster that is started now would have it."""
    try:
        found = record.load(cluster)
    except InputError:
        if cluster != record.DEFAULT_NAME:
            raise
        return storage.root()
    return found.storage_url


def _month(word: str) -> str:
    try:
        return datetime.strptime(word, "%Y-%m").strftime("%Y-%m")
    except ValueError:
        raise InputError(f"--month {word} is not a month", "write it as 2026-11") from None


def _hand_over(key: Key, secret: str, out: str | None, as_json: bool) -> None:
    from manta.serving.access import owner

    if out:
        owner.write_secret(Path(out).expanduser(), secret)
    if as_json:
        shown = {} if out else {"secret": secret}
        output.print_json({"id": key.id, "name": key.name, **shown})
        return
    output.say(f"key {key.id} ({key.name}); " + (f"secret in {out}" if out else "its secret:"))
    if not out:
        click.echo(secret)


def _facts(stored: Stored, now: float) -> dict[str, Any]:
    from manta.serving.access import keys

    facts = {name: value for name, value in keys.to_json(stored.key).items() if name != "sha256"}
    return {**facts, "revoked_at": stored.revoked_at, "alive": stored.alive(now)}


def _row(stored: Stored, now: float) -> tuple[object, ...]:
    key, end = stored.key, stored.ends_at()
    limits = key.limits.model_dump(exclude_none=True)
    ends = "-" if end is None else f"{datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M}"
    return (
        key.id,
        key.name,
        key.owner,
        key.role,
        " ".join(key.models),
        ", ".join(f"{name} {value}" for name, value in limits.items()) or "-",
        ends if stored.alive(now) else "over",
    )
