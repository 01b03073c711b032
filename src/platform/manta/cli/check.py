"""`manta check`: say what is wrong with files before anything starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from manta.cli.output import example, json_option, print_json, print_table, say
from manta.errors import Finding, InputError

USAGE_EXIT_CODE = InputError.exit_code


@click.command(
    name="check",
    epilog=example(
        "manta check",
        "manta check cluster/aws.yaml serve_apps/llm.yaml",
        "manta check --rules",
    ),
)
@click.argument("files", nargs=-1, metavar="[FILE]…")
@click.option("--rules", "list_rules", is_flag=True, help="List all rules with their reasons.")
@json_option
def command(files: tuple[str, ...], list_rules: bool, as_json: bool) -> int:
    """Check Ray cluster YAMLs, Serve configs, job and pipeline specs and their configs.

    Files given together are checked together: a replica that fits on no node of the cluster
    files, for one. Without FILE: cluster/, configs/ and serve_apps/ of the working directory.

    Exit code 0 without errors (warnings do not count), 2 with.
    """
    from manta import check

    if list_rules:
        _print_rules(as_json)
        return 0
    paths = files or check.project_files(Path.cwd())
    if not paths:
        raise InputError(
            "no files to check in cluster/, configs/, serve_apps/", "name one: manta check FILE"
        )
    findings = check.files(paths)
    if as_json:
        print_json({"files": len(paths), "findings": [asdict(each) for each in findings]})
    else:
        _print_findings(findings, len(paths))
    return USAGE_EXIT_CODE if any(each.severity == "error" for each in findings) else 0


def _print_rules(as_json: bool) -> None:
    from manta import check

    rules = sorted(check.RULES.values(), key=lambda rule: rule.id)
    if as_json:
        print_json([{"rule": r.id, "severity": r.severity, "reason": r.reason} for r in rules])
    else:
        print_table(["RULE", "SEVERITY", "REASON"], [[r.id, r.severity, r.reason] for r in rules])


def _print_findings(findings: tuple[Finding, ...], num_files: int) -> None:
    for finding in findings:
        click.echo(f"{_printable(str(finding))}  [{finding.severity}: {finding.rule}]")
    counts = Counter(finding.severity for finding in findings)
    words = [f"{counts[s]} {s}{'s' * (counts[s] != 1)}" for s in ("error", "warning") if counts[s]]
    files = f"{num_files} file{'s' * (num_files != 1)}"
    say(f"{files}: {', '.join(words) or 'no errors'}")


def _printable(text: str) -> str:
    """One line without control characters, which a file could use to repaint the terminal."""
    return "".join(char if char.isprintable() else "�" for char in text)
