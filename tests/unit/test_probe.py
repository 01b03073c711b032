"""Quality checks: what a file of probes may say, and which answers pass."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_deploy_plan import CLUSTER, app, running, wanted

from manta.errors import InputError, InvalidSpec
from manta.serving.apps.plan import ServeState, plan_candidates, plan_deploy, plan_restore
from manta.serving.canary.probe import Endpoint, failures
from manta.spec.probes import Probe, read_probes


class Model(BaseHTTPRequestHandler):
    """Says what it is asked, as an OpenAI API does; other paths answer as they are named."""

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "m"}]})
        elif self.path == "/slow":
            time.sleep(0.3)
            self.answer(200, {})
        else:
            self.answer(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers.get("authorization") != "Bearer k":
            self.answer(401, {})
        elif self.path == "/v1/completions" and body["model"] == "m":
            self.answer(200, {"choices": [{"text": body["prompt"]}]})
        elif self.path == "/v1/chat/completions":
            message = {"content": body["messages"][0]["content"]}
            self.answer(200, {"choices": [{"message": message}]})
        else:
            self.answer(200, body)

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint(url=f"http://127.0.0.1:{server.server_port}/", key="k")
    server.shutdown()


CHAT = [{"role": "user", "content": '{"n": 1}'}]
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("probe", "fault"),
    [
        ({"prompt": "four", "contains": "our"}, None),
        ({"prompt": "four", "contains": "five"}, "does not contain 'five': 'four'"),
        ({"prompt": "four", "lacks": "our"}, "contains 'our'"),
        ({"prompt": "four", "matches": "^f.*r$"}, None),
        ({"prompt": "four", "matches": "^r"}, "does not match '^r'"),
        ({"messages": CHAT, "json_schema": NUMBER}, None),
        ({"prompt": "{}", "json_schema": NUMBER}, "does not fit the schema"),
        ({"prompt": "no", "json_schema": NUMBER}, "is not JSON: 'no'"),
        ({"prompt": "x", "model": "other"}, None),
        ({"path": "/score", "body": {"x": 3}, "contains": "3"}, None),
        ({"path": "/none"}, "HTTP 404 and not 200"),
        ({"path": "/none", "status": 404}, None),
        ({"path": "/slow", "max_latency_s": 0.1}, "over 0.1 s"),
    ],
)
def test_an_answer_passes_if_it_is_as_the_probe_says(endpoint, probe, fault):
    found = failures(endpoint, [Probe.model_validate(probe)])
    assert len(found) == (fault is not None)
    assert (fault or "") in "".join(found)


def test_an_endpoint_that_does_not_answer_or_refuses_fails_each_probe(endpoint):
    probes = [Probe(prompt="a"), Probe(prompt="b")]
    assert len(failures(Endpoint(url="http://127.0.0.1:9"), probes)) == 2
    assert "HTTP 401" in failures(Endpoint(url=endpoint.url, key="other"), probes)[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "probes.jsonl:2: not JSON"),
        ('{"prompt": "x", "containz": "y"}', "probes.jsonl:2: `containz`"),
        ('{"contains": "y"}', "give one of prompt, messages and path"),
        ('{"prompt": "x", "path": "/y"}', "give one of prompt, messages and path"),
        ('{"prompt": "x", "matches": "("}', "not a regular expression"),
        ('{"prompt": "x", "json_schema": {"type": "numbre"}}', "not a JSON schema"),
    ],
)
def test_a_mistake_in_a_file_of_probes_is_named_with_its_line(tmp_path, line, message):
    file = tmp_path / "probes.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(InvalidSpec) as caught:
        read_probes(str(file))
    assert message in str(caught.value)
    assert len(caught.value.findings) == 1


def test_a_file_of_probes_that_is_missing_or_empty_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_probes(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="asks nothing"):
        read_probes(str(tmp_path / "empty.jsonl"))


def test_a_candidate_runs_beside_what_runs_and_the_next_change_removes_one_left_behind():
    now = running(app("a"), app("b"))
    body = plan_candidates(now, [app("a", args={"x": 2})])
    assert [(e["name"], e["route_prefix"]) for e in body["applications"]] == [
        ("a", "/a"),
        ("b", "/b"),
        ("a--candidate", "/-candidate/a"),
    ]
    left = running(app("a"), app("b"), app("a--candidate"))
    settled = [app("a"), app("b")]
    assert plan_candidates(left, [])["applications"] == settled
    assert (
        plan_deploy(left, wanted(app("b")), **CLUSTER).body_passthrough["applications"] == settled
    )
    assert plan_restore(left, ServeState(), [])["applications"] == settled
