"""What jobs say of themselves: a report in storage, found again when the cluster is gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from queue_site import Site
from queue_state import request

from manta.errors import InputError
from manta.jobs import access, http_api, queries, reports
from manta.jobs.access import Role
from manta.jobs.model import JobState


def test_a_job_has_a_place_for_its_report_unless_the_user_has_named_one() -> None:
    told = reports.with_place({"env_vars": {"A": "1"}}, "/s/jobs/a/report.json")
    assert told["env_vars"] == {"MANTA_REPORT": "/s/jobs/a/report.json", "A": "1"}
    own = {"env_vars": {"MANTA_REPORT": "/mine"}}
    assert reports.with_place(own, "/s/jobs/a/report.json") == own


def test_the_same_job_at_another_time_has_a_report_of_its_own() -> None:
    place = reports.place("/nowhere", "nightly")
    job = request("nightly", runtime_env_passthrough=reports.with_place({}, place))
    again = reports.under(job, "nightly-1")
    assert (again.id, reports.url_of(again)) == (
        "nightly-1",
        "/nowhere/jobs/nightly-1/report.json",
    )
    mine = request("n", runtime_env_passthrough={"env_vars": {"MANTA_REPORT": "/mine"}})
    kept = reports.under(mine, "n-1").runtime_env_passthrough["env_vars"]
    assert kept == {"MANTA_REPORT": "/mine"}


def test_variables_that_are_no_map_are_refused() -> None:
    with pytest.raises(InputError, match="env_vars is no map"):
        reports.with_place({"env_vars": ["A=1"]}, "/s/report.json")


@pytest.mark.parametrize(
    "text", ['["a list"]', '{"artifacts": []}', '{"metrics": 3}', '{"artifacts": {"a": 1']
)
def test_a_report_that_is_none_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(InputError) as told:
        reports.read(str(file))
    assert str(file) in told.value.what
    assert "\n" not in told.value.what


def test_a_job_that_sent_no_report_has_an_empty_one(tmp_path: Path) -> None:
    assert reports.read(str(tmp_path / "none.json")) == reports.Report()


def test_what_a_job_measured_is_told_by_the_api_and_who_asked_from_where(site: Site) -> None:
    site.stop()
    client = TestClient(http_api.app(site.state))
    key = {"Authorization": f"Bearer {access.add(site.state, 'ci', Role.SUBMITTER, 'test')}"}
    body = {"id": "a", "entrypoint": "true"}
    accepted = client.post("/api/v1/jobs", json=body, headers=key)
    assert accepted.status_code == 200, accepted.text
    asked = queries.request_of(site.state, "a")
    file = Path(reports.url_of(asked))
    assert file == Path(site.ray.record.storage_url, "jobs", "a", "report.json")
    site.start()
    site.until_state("a", JobState.RUNNING)
    assert file.parent.is_dir()  # before the job runs: a shell may write with `>`
    file.write_text(json.dumps({"artifacts": {"model": "s3://u:hush@b/m"}, "metrics": {"x": 0.5}}))
    told = client.get("/api/v1/jobs/a/report", headers=key).json()
    assert told == {"artifacts": {"model": "s3://…@b/m"}, "metrics": {"x": 0.5}}
    (submitted,) = [e for e in queries.events_of(site.state) if e.kind == "submitted"]
    assert submitted.actor == "key:ci@testclient"


def test_a_report_elsewhere_than_in_the_storage_or_too_large_is_not_read(tmp_path: Path) -> None:
    for url in ("/dev/zero", "/nowhere/../etc/passwd", "http://inside/secret"):
        asked = request("a", runtime_env_passthrough={"env_vars": {"MANTA_REPORT": url}})
        assert reports.url_of(asked) == "", url
    file = tmp_path / "report.json"
    file.write_bytes(b"[" + b" " * reports.MAX_BYTES + b"]")
    with pytest.raises(InputError, match="larger than"):
        reports.read(str(file))
