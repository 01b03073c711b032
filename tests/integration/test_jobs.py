"""Jobs and pipelines on a real cluster, driven as a user drives them: by the `manta` command."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import MANTA, RAY, Terminal, end_controller, new_terminal


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    shell = new_terminal(tmp_path_factory)
    shell(MANTA, "up", "--ports", "auto")
    yield shell
    shell(MANTA, "down", "--yes")
    end_controller(shell)


def _wait_for_status(terminal: Terminal, job: str, *wanted: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        jobs = {j["submission_id"]: j["status"] for j in _jobs(terminal)}
        if jobs.get(job) in wanted:
            return str(jobs[job])
        assert time.monotonic() < deadline, f"{job} is {jobs.get(job)}, not {wanted}"
        time.sleep(0.5)


def _jobs(terminal: Terminal) -> list[dict[str, object]]:
    jobs: list[dict[str, object]] = json.loads(terminal(MANTA, "jobs", "--json").stdout)
    return jobs


def test_a_command_runs_with_the_working_directory_and_its_log_comes_back(
    terminal: Terminal,
) -> None:
    (terminal.folder / "data.txt").write_text("shipped along\n")
    result = terminal(MANTA, "submit", "--", "cat", "data.txt")
    assert "shipped along" in result.stdout
    assert "succeeded" in result.stderr


def test_a_job_that_fails_makes_the_command_exit_with_1(terminal: Terminal) -> None:
    result = terminal(MANTA, "submit", "--", "sh", "-c", "echo before; exit 7", ok=1)
    assert "before" in result.stdout
    assert "exit code 7" in result.stderr


def test_the_same_id_is_the_same_job_and_runs_once(terminal: Terminal) -> None:
    command = [MANTA, "submit", "--id", "once", "--", "sh", "-c", "echo ran"]
    terminal(*command)
    again = terminal(*command)
    assert "known already" in again.stderr
    assert [job["submission_id"] for job in _jobs(terminal)].count("once") == 1


def test_an_id_that_another_job_holds_is_refused(terminal: Terminal) -> None:
    terminal(MANTA, "submit", "--id", "taken", "--", "true")
    refused = terminal(MANTA, "submit", "--id", "taken", "--", "false", ok=2)
    assert "job id taken belongs to `true`" in refused.stderr


def test_ctrl_c_leaves_the_job_running_and_says_how_to_watch_it(terminal: Terminal) -> None:
    process = terminal.start(MANTA, "submit", "--id", "long", "--", "sleep", "300")
    try:
        _wait_for_status(terminal, "long", "RUNNING")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "manta logs -f long" in output
    assert _wait_for_status(terminal, "long", "RUNNING", "STOPPED") == "RUNNING"
    terminal(MANTA, "stop", "long")
    assert _wait_for_status(terminal, "long", "STOPPED") == "STOPPED"
    terminal(MANTA, "stop", "long")  # again: no error


def test_plain_ray_sees_and_drives_the_same_jobs(terminal: Terminal) -> None:
    exports = terminal(MANTA, "env").stdout
    shell = f"{exports}\n{RAY} job submit --submission-id plain -- echo from-plain-ray"
    assert "from-plain-ray" in terminal("bash", "-c", shell).stdout
    assert "from-plain-ray" in terminal(MANTA, "logs", "plain").stdout
    terminal(MANTA, "submit", "--id", "ours", "--", "echo", "from-manta")
    shell = f"{exports}\n{RAY} job logs ours"
    assert "from-manta" in terminal("bash", "-c", shell).stdout


def test_an_unknown_job_is_one_line_and_exit_2(terminal: Terminal) -> None:
    result = terminal(MANTA, "logs", "nobody", ok=2)
    assert result.stderr == "Error: no job nobody; list them with `manta jobs`\n"


def test_dry_run_prints_a_ray_command_that_works_as_printed(terminal: Terminal) -> None:
    (terminal.folder / "job.yaml").write_text(
        "name: dry\nentrypoint: sh -c 'echo value=$A'\nenvironment: {A: '5'}\n"
    )
    printed = terminal(MANTA, "submit", "job.yaml", "--id", "dry", "--dry-run").stdout
    assert "dry" not in {job["submission_id"] for job in _jobs(terminal)}
    exports = terminal(MANTA, "env").stdout
    path = f"PATH={Path(RAY).parent}:$PATH"
    assert "value=5" in terminal("bash", "-c", f"{exports}\n{path} {printed}").stdout


PIPELINE = """\
name: demo
steps:
  - {name: one, entrypoint: "sh -c 'echo one >> $OUT'"}
  - {name: two, entrypoint: "sh -c 'test -e $GATE && echo two >> $OUT'", needs: [one]}
  - {name: three, entrypoint: "sh -c 'echo three >> $OUT'", needs: [two]}
"""


def test_a_failed_run_resumes_at_the_failed_step_and_repeats_nothing(
    terminal: Terminal, tmp_path: Path
) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    text = PIPELINE.replace("$OUT", str(out)).replace("$GATE", str(gate))
    (terminal.folder / "p.yaml").write_text(text)
    failed = terminal(MANTA, "run", "p.yaml", "--json", ok=1)
    run = json.loads(failed.stdout)
    assert [(s["name"], s["status"]) for s in run["steps"]] == [
        ("one", "SUCCEEDED"),
        ("two", "FAILED"),
        ("three", ""),
    ]
    assert f"manta retry {run['run_id']}" in failed.stderr
    gate.touch()
    again = terminal(MANTA, "run", "p.yaml", "--resume", run["run_id"])
    assert "one: succeeded earlier" in again.stderr
    assert out.read_text().split() == ["one", "two", "three"]


def test_ctrl_c_in_a_run_leaves_it_going_on_to_its_next_steps(
    terminal: Terminal, tmp_path: Path
) -> None:
    gate, out = tmp_path / "gate", tmp_path / "out"
    wait = f"sh -c 'until test -e {gate}; do sleep 0.2; done'"
    steps = [
        {"name": "wait", "entrypoint": wait},
        {"name": "then", "entrypoint": f"touch {out}", "needs": ["wait"]},
    ]
    (terminal.folder / "c.yaml").write_text(json.dumps({"name": "c", "steps": steps}))
    run = terminal(MANTA, "run", "c.yaml", "--no-wait").stdout.strip()
    process = terminal.start(MANTA, "logs", "-f", run)
    assert process.stdout is not None
    try:
        output = process.stdout.readline()  # it watches
        _wait_for_status(terminal, f"{run}-wait", "RUNNING")
        process.send_signal(signal.SIGINT)
        output += process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"{run} goes on. Watch it: manta logs -f {run}" in output
    gate.touch()
    terminal(MANTA, "logs", "-f", run)
    assert out.exists()
    told = json.loads(terminal(MANTA, "runs", "--json").stdout)
    assert (told[-1]["run_id"], told[-1]["status"]) == (run, "SUCCEEDED")


def test_stopping_a_run_ends_its_job_and_begins_nothing_more(terminal: Terminal) -> None:
    steps = [
        {"name": "long", "entrypoint": "sleep 600"},
        {"name": "never", "entrypoint": "true", "needs": ["long"]},
    ]
    (terminal.folder / "s.yaml").write_text(json.dumps({"name": "s", "steps": steps}))
    run = terminal(MANTA, "run", "s.yaml", "--no-wait").stdout.strip()
    _wait_for_status(terminal, f"{run}-long", "RUNNING")
    assert f"{run} stopped" in terminal(MANTA, "stop", run).stderr
    told = json.loads(terminal(MANTA, "runs", run, "--json").stdout)
    assert (told["status"], told["steps"][0]["status"]) == ("STOPPED", "STOPPED")
    assert f"{run}-never" not in {job["submission_id"] for job in _jobs(terminal)}


STEPS = """\
name: again
steps:
  - {name: first, entrypoint: "sh make.sh first"}
  - {name: second, entrypoint: "sh make.sh second", needs: [first]}
"""
MAKE = """\
echo $1 >> $RAN
mkdir -p $OUT/$1 && echo made > $OUT/$1/file
echo "{\\"artifacts\\": {\\"out\\": \\"$OUT/$1\\"}}" > $MANTA_REPORT
"""


def test_unchanged_steps_are_taken_from_an_earlier_run(terminal: Terminal, tmp_path: Path) -> None:
    ran, out = tmp_path / "ran", tmp_path / "out"
    make = terminal.folder / "make.sh"
    make.write_text(MAKE.replace("$RAN", str(ran)).replace("$OUT", str(out)))
    (terminal.folder / "again.yaml").write_text(STEPS)
    run = (MANTA, "run", "again.yaml")
    terminal(*run)
    terminal(*run, "--skip-unchanged")
    assert ran.read_text().split() == ["first", "second"]
    (out / "second" / "file").write_text("damaged")
    terminal(*run, "--skip-unchanged")
    assert ran.read_text().split() == ["first", "second", "second"]
    make.write_text(make.read_text() + "# changed\n")
    terminal(*run, "--skip-unchanged")
    assert ran.read_text().split()[3:] == ["first", "second"]


def test_a_faulty_spec_is_refused_before_anything_starts(terminal: Terminal) -> None:
    (terminal.folder / "bad.yaml").write_text("name: bad\nentrypont: 'true'\n")
    before = len(_jobs(terminal))
    result = terminal(MANTA, "submit", "bad.yaml", ok=2)
    assert "bad.yaml:2: unknown key `entrypont`; did you mean `entrypoint`?" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(_jobs(terminal)) == before


def test_a_cluster_that_others_started_is_used_and_left_alone(
    terminal: Terminal, tmp_path_factory: pytest.TempPathFactory
) -> None:
    there = json.loads(terminal(MANTA, "status", "--json").stdout)
    token = Path(terminal.home, "clusters", "local", "auth_token")
    other = new_terminal(tmp_path_factory)
    attach = (MANTA, "attach", there["dashboard_url"], "--name", "theirs")
    refused = other(*attach, ok=1).stderr
    assert "give a token, with --token-file" in refused
    assert "Traceback" not in refused
    other(*attach, "--token-file", str(token))
    try:
        done = other(MANTA, "submit", "--cluster", "theirs", "--", "echo", "from-afar")
        assert "from-afar" in done.stdout
        assert json.loads(other(MANTA, "status", "--name", "theirs", "--json").stdout)["nodes"]
        refused = other(MANTA, "down", "--name", "theirs", "--yes", ok=2).stderr
        assert "is not Manta's to end; `manta detach theirs` forgets it" in refused
        other(MANTA, "detach", "theirs")
        # Beside those of the cluster's own users, which its Ray knows and the controller takes in.
        jobs = json.loads(other(MANTA, "jobs", "--json").stdout)
        (job,) = [job["id"] for job in jobs if job["entrypoint"] == "echo from-afar"]
        assert "from-afar" in other(MANTA, "logs", job).stdout  # out of storage
    finally:
        end_controller(other)
    assert json.loads(terminal(MANTA, "status", "--json").stdout)["state"] == "up"
