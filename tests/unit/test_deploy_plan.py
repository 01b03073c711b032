"""Deploying a Serve config: what is merged, what wins, what is refused."""

import json

import pytest

from manta import storage
from manta.errors import InputError, InvalidSpec
from manta.serving.access import owner
from manta.serving.apps import config, models
from manta.serving.apps.plan import App, ServeState, plan_deploy, plan_undeploy
from manta.workloads import layout

CLUSTER = {"serve_host": "127.0.0.1", "serve_port": 8000}


def app(name, route=None, **more):
    return {"name": name, "route_prefix": route or f"/{name}", "import_path": "m:app", **more}


def running(*entries, **more):
    apps = tuple(
        App(
            name=entry["name"],
            status="RUNNING",
            route_prefix=entry["route_prefix"],
            message="",
            deployments=(),
            config_passthrough=entry,
        )
        for entry in entries
    )
    return ServeState(apps=apps, http_host="127.0.0.1", http_port=8000, **more)


def wanted(*entries, **more):
    options = {"applications_passthrough": entries, "options_passthrough": {}, **more}
    return config.ServeConfig(file="apps.yaml", **options)


def body_names(plan):
    return [entry["name"] for entry in plan.body_passthrough["applications"]]


def test_applications_that_the_file_does_not_name_are_sent_along_unchanged():
    old = app("old", args={"x": 1}, runtime_env={"env_vars": {"KEY": "secret"}})
    plan = plan_deploy(running(old), wanted(app("new")), **CLUSTER)
    assert (plan.added, plan.kept) == (("new",), ("old",))
    assert old in plan.body_passthrough["applications"]
    assert body_names(plan) == ["old", "new"]


def test_a_deploy_tells_added_changed_and_unchanged_applications_apart():
    now = running(app("same"), app("other", args={"x": 1}))
    plan = plan_deploy(
        now, wanted(app("same"), app("other", args={"x": 2}), app("new")), **CLUSTER
    )
    assert (plan.added, plan.changed, plan.unchanged) == (("new",), ("other",), ("same",))
    assert sorted(body_names(plan)) == ["new", "other", "same"]


def test_a_plan_tells_each_value_that_changes_but_no_secret():
    def entry(**args):
        return app("a", args=args, runtime_env={"env_vars": {"DB_PASSWORD": args["x"] * 8}})

    plan = plan_deploy(
        running(entry(x="1", gone=[2])), wanted(entry(x="3", new={"y": None})), **CLUSTER
    )
    assert set(plan.differences["a"]) == {
        "args.x: '1' → '3'",
        "args.gone.0: 2 → (none)",
        "args.new.y: (none) → None",
        "runtime_env.env_vars.DB_PASSWORD: (secret) → (secret)",
    }


def test_an_application_started_from_python_is_kept_but_not_sent():
    imperative = App(
        name="py",
        status="RUNNING",
        route_prefix="/py",
        message="",
        deployments=(),
        config_passthrough=None,
    )
    plan = plan_deploy(ServeState(apps=(imperative,)), wanted(app("new")), **CLUSTER)
    assert plan.kept == ("py",)
    assert body_names(plan) == ["new"]


def test_a_route_that_a_kept_application_has_is_refused_with_its_name():
    with pytest.raises(InputError, match="`new` wants route /old, which `old` has"):
        plan_deploy(running(app("old")), wanted(app("new", route="/old")), **CLUSTER)


def test_the_port_of_the_cluster_wins_over_the_file_and_the_plan_says_so():
    plan = plan_deploy(
        ServeState(), wanted(app("a"), http_port=8000), **CLUSTER | {"serve_port": 9}
    )
    assert plan.url == "http://127.0.0.1:9"
    assert plan.body_passthrough["http_options"]["port"] == 9
    assert any("says port 8000; using 9" in note for note in plan.notes)


def test_a_serve_that_runs_keeps_its_port_and_the_plan_says_so():
    plan = plan_deploy(running(), wanted(app("a"), http_host="0.0.0.0", http_port=9), **CLUSTER)
    assert plan.body_passthrough["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert len(plan.notes) == 2


def test_the_same_port_needs_no_note():
    same = wanted(app("a"), http_host="127.0.0.1", http_port=8000)
    assert plan_deploy(running(), same, **CLUSTER).notes == ()


def test_a_deploy_without_target_capacity_keeps_the_one_that_holds():
    now = running(options_passthrough={"target_capacity": 50.0})
    assert plan_deploy(now, wanted(app("a")), **CLUSTER).body_passthrough["target_capacity"] == 50


def test_the_printed_command_warns_of_what_plain_serve_deploy_would_delete():
    plan = plan_deploy(running(app("old")), wanted(app("new")), **CLUSTER)
    assert plan.serve_command() == "serve deploy apps.yaml   # alone it would delete: old"


def test_undeploy_sends_all_but_the_removed_application():
    body = plan_undeploy(running(app("a"), app("b")), "a")
    assert body["applications"] == [app("b")]


def test_undeploy_of_an_unknown_application_names_the_known_ones():
    with pytest.raises(InputError, match="no application `x`; known: a, b"):
        plan_undeploy(running(app("a"), app("b")), "x")


def write(tmp_path, text):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("http_option:\n  port: 1\napplications: []\n", 1, "did you mean `http_options`?"),
        ("http_options:\n  prot: 1\napplications: []\n", 2, "did you mean `port`?"),
        ("applications:\n- name: a\n  import_paht: m:a\n", 3, "did you mean `import_path`?"),
        (
            "applications:\n- import_path: m:a\n  deployments:\n  - name: d\n    num_replica: 2\n",
            5,
            "did you mean `num_replicas`?",
        ),
        ("applications:\n- name: a\n", 2, "`applications.0.import_path` is missing"),
        ("applications: 3\n", 1, "`applications` is 3"),
        ("http_options: {port: x}\napplications: []\n", 1, "`http_options.port` is 'x'"),
    ],
)
def test_a_mistake_in_a_serve_config_is_named_with_its_line(tmp_path, text, line, what):
    with pytest.raises(InvalidSpec) as caught:
        config.read(write(tmp_path, text))
    assert [finding.line for finding in caught.value.findings] == [line]
    assert what in str(caught.value)


def test_the_projects_own_serve_config_is_valid():
    read = config.read("serve_apps/llm.yaml")
    assert read.http_host == "127.0.0.1"
    assert [entry["name"] for entry in read.applications_passthrough] == ["llm"]


def llm(name):
    loading = {"model_loading_config": {"model_id": "m", "model_source": name}}
    return app("llm", **{"import_path": owner.BUILDER, "args": {"llm_configs": [loading]}})


def train(root, name, weights):
    folder = root / "new"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    storage.upload(folder, layout.model(name, str(root)), {"kind": "model"})


def test_a_model_trained_again_changes_the_application_but_its_scores_do_not(tmp_path):
    def pinned():
        return models.pin_models(wanted(llm("m")), str(tmp_path)).applications_passthrough

    train(tmp_path, "m", "one")
    first = pinned()
    url = layout.model("m", str(tmp_path))
    storage.amend(url, {"README.md": b"card"}, storage.read_seal(url, "m"), metrics={"x": 1})
    assert pinned() == first
    train(tmp_path, "m", "two")
    assert pinned() != first


def test_deploying_a_model_that_was_never_trained_is_refused(tmp_path):
    with pytest.raises(InputError, match="model `m` does not exist"):
        models.pin_models(wanted(llm("m")), str(tmp_path))


def test_scores_join_a_sealed_model_without_breaking_it(tmp_path):
    train(tmp_path, "m", "one")
    url = layout.model("m", str(tmp_path))
    for card in (b"short", b"a longer card"):
        storage.amend(url, {"README.md": card}, storage.read_seal(url, "m"), metrics={"b": 2})
        seal = storage.verify(url, "m")
        assert (seal["kind"], seal["metrics"]) == ("model", {"b": 2})
        assert sorted(seal["files"]) == ["README.md", "model.safetensors"]


def test_scores_of_a_model_that_was_replaced_meanwhile_are_refused(tmp_path):
    train(tmp_path, "m", "one")
    url = layout.model("m", str(tmp_path))
    before = storage.read_seal(url, "m")
    train(tmp_path, "m", "two")
    with pytest.raises(storage.MantaError, match="replaced meanwhile"):
        storage.amend(url, {"README.md": b"of one"}, before)
    assert "README.md" not in json.dumps(storage.verify(url, "m"))
