"""`manta plan` and `manta check` of Serve configs: does the model fit, and what would help?"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from manta import check
from manta.plan.clusters import read_cluster
from manta.plan.demand import demand_of_app
from manta.plan.models import plan_models, words
from manta.serving.apps import models
from manta.sizing.accelerators import ACCELERATORS
from manta.sizing.engine import engine_of
from manta.sizing.fit import fit
from manta.sizing.model import NotKnown
from manta.sizing.published import find_model
from manta.spec.catalog import load_catalog

ROOT = Path(__file__).parents[2]
READY = sorted((ROOT / "configs" / "models").glob("*.yaml"))


def manta(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "manta.cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def serve_file(folder, accelerator="L4", source="meta-llama/Llama-3.1-8B", **engine_kwargs):
    config = {
        "model_loading_config": {"model_id": "m", "model_source": source},
        "accelerator_type": accelerator,
        "engine_kwargs": engine_kwargs,
    }
    app = {
        "name": "llm",
        "import_path": "manta.serving.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [app]}))
    return file


def plan(file, **more):
    (only,) = plan_models(file, root=ROOT, **more)
    return only


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_the_ready_settings_fit_and_say_what_the_plan_says(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = str(file.relative_to(ROOT))
    plans = plan_models(file, root=ROOT)
    assert comment(file) == [line for plan in plans for line in words(plan)]
    assert f"manta plan {name}" in file.read_text()
    assert all(plan.fit is not None and plan.fit.holds_all for plan in plans)
    assert all(plan.fit.engine.max_num_seqs for plan in plans)
    assert [f for f in check.files([name]) if f.severity != "info"] == []


def comment(file):
    """The arithmetic in the head of one of the ready settings."""
    return [line[4:] for line in file.read_text().splitlines() if line.startswith("#   ")]


def test_the_command_prints_the_plan():
    done = manta("plan", READY[0])
    assert (done.returncode, done.stdout.splitlines()) == (0, comment(READY[0])), done.stderr


def test_the_ready_settings_are_those_that_people_ask_for():
    asked = {"1b-cpu", "8b-24gib", "70b-8xh100", "deepseek", "prefill-decode", "prefix-aware"}
    assert all(any(word in file.stem for file in READY) for word in asked)


def test_the_guides_first_choices_are_what_the_arithmetic_says():
    lines = (ROOT / "docs" / "sizing.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| 8,192 tokens |"))
    names = [cell.strip() for cell in lines[start].split("|")[2:-1]]
    rows = lines[start + 2 : lines.index("", start)]
    assert len(rows) >= 8
    for row in rows:
        source, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        assert cells == [first_choice(source, name) for name in names], source


def first_choice(source, accelerator):
    model = find_model(source, ROOT)
    for size in (1, 2, 4, 8):
        arguments = {"max_model_len": 8192, "max_num_seqs": 8, "tensor_parallel_size": size}
        config = {
            "model_loading_config": {"model_id": source},
            "accelerator_type": accelerator,
            "engine_kwargs": arguments,
        }
        try:
            found = fit(model, engine_of(config), ACCELERATORS[accelerator])
        except NotKnown:
            continue
        if found.holds_all:
            return f"{size}: {found.num_sequences}, {found.decode_s_per_token * 1e3:.1f} ms"
    return "–"


def test_every_change_that_is_advised_makes_it_fit(tmp_path):
    wanted = {"max_model_len": 32768, "max_num_seqs": 8}
    found = plan(serve_file(tmp_path, **wanted))
    assert not found.fit.starts
    assert [change.partition(":")[0] for change in found.changes] == [
        "max_model_len",
        "tensor_parallel_size",
        "accelerator_type",
    ]
    for change in found.changes:
        changed = yaml.safe_load(change)
        accelerator = changed.pop("accelerator_type", "L4")
        better = plan(serve_file(tmp_path, accelerator, **{**wanted, **changed}))
        assert better.fit.holds_all, change


def test_fewer_sequences_are_advised_where_it_starts(tmp_path):
    found = plan(serve_file(tmp_path, max_model_len=8192, max_num_seqs=64))
    assert found.fit.starts
    fewer = yaml.safe_load(found.changes[0])
    assert plan(serve_file(tmp_path, max_model_len=8192, **fewer)).fit.holds_all


def test_the_line_says_by_how_much_it_does_not_fit(tmp_path):
    found = plan(serve_file(tmp_path, max_model_len=131072))
    (line,) = [line for line in words(found) if "Does not fit" in line]
    short = float(re.search(r"([\d.]+) GiB short of one sequence of 131,072", line)[1])
    assert short == pytest.approx(16 - found.fit.cache_bytes / 2**30, abs=0.01)


@pytest.mark.parametrize(
    ("accelerator", "source", "missing"),
    [
        ("L4", "someone/secret-9b", "no facts about `someone/secret-9b` here"),
        ("TPU-V6E", "meta-llama/Llama-3.1-8B", "the memory of `TPU-V6E` is not known"),
        (None, "meta-llama/Llama-3.1-8B", "does not say on which accelerator"),
    ],
)
def test_what_is_not_known_is_said_and_not_guessed(tmp_path, accelerator, source, missing):
    found = plan(serve_file(tmp_path, accelerator, source))
    assert found.fit is None
    assert any(missing in line for line in words(found))


def test_an_llm_config_in_a_file_of_its_own_is_named(tmp_path):
    file = serve_file(tmp_path)
    document = yaml.safe_load(file.read_text())
    document["applications"][0]["args"]["llm_configs"] = ["llm_configs/a.yaml"]
    file.write_text(yaml.safe_dump(document))
    assert list(words(plan(file))) == [
        "llm: llm_configs/a.yaml",
        "  Not known: a file of its own; write its content in place of its path",
    ]


def test_a_config_json_at_hand_makes_a_model_known(tmp_path):
    facts = json.loads((ROOT / "configs/models/facts/qwen3-8b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    file = serve_file(tmp_path, source="someone/secret-9b", max_model_len=4096)
    given = f"someone/secret-9b={tmp_path / 'config.json'}"
    done = manta("plan", file, "--model-config", given, "--json")
    (told,) = json.loads(done.stdout)["models"]
    assert (told["num_parameters"], told["fits"]) == (8_190_735_360, True)
    wrong = manta("plan", file, "--model-config", "someone/secret-9b=nowhere.json")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


def test_a_model_in_a_folder_is_read_where_it_lies(tmp_path):
    facts = json.loads((ROOT / "configs/models/facts/llama-3.2-1b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts["config"]))
    found = plan(serve_file(tmp_path, source=str(tmp_path), max_model_len=4096))
    assert found.fit.num_parameters == 1_235_814_400


def test_a_name_of_two_sizes_counts_as_the_smaller_and_says_so(tmp_path):
    found = plan(serve_file(tmp_path, "A100", max_model_len=4096))
    assert found.accelerator == "A100-40G"
    assert "reckoned as A100-40G, not A100-80G" in found.notes[0]


def test_arguments_that_are_not_in_the_figures_are_named(tmp_path):
    found = plan(serve_file(tmp_path, max_model_len=4096, enable_lora=True))
    assert "not in the figures: enable_lora" in found.notes


def test_a_cluster_with_one_kind_of_gpu_names_the_accelerator(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = serve_file(tmp_path, None, max_model_len=4096)
    cluster = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    types = cluster["available_node_types"]
    cluster["available_node_types"] = {
        name: kept for name, kept in types.items() if name in ("head", "gpu-spot")
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    read = read_cluster(tmp_path / "cluster.yaml", load_catalog())
    assert plan(file, clusters=[read]).accelerator == "L4"


def test_a_cluster_and_a_serve_config_are_planned_together(tmp_path):
    file = serve_file(tmp_path, max_model_len=4096)
    done = manta("plan", "cluster/aws.yaml", file, "--json")
    told = json.loads(done.stdout)
    assert [node["node_type"] for node in told["plans"][0]["nodes"]] == ["head", "gpu-spot"]
    assert told["models"][0]["accelerator"] == "L4"


def test_an_engine_asks_for_its_accelerator_by_name_and_no_other_node_will_do(tmp_path):
    done = manta(
        "plan", "cluster/aws.yaml", serve_file(tmp_path, "H100", max_model_len=4096), "--json"
    )
    (plan,) = json.loads(done.stdout)["plans"]
    assert [node["node_type"] for node in plan["nodes"]] == ["head"]
    assert "accelerator_type:H100" in plan["pending"][0]["what"]


def test_each_worker_of_an_engine_asks_for_its_bundle(tmp_path):
    demand = demand_of_app(ROOT / "configs" / "models" / "llama-70b-8xh100.yaml")
    (gang,) = demand.gangs
    assert len(gang.bundles) == 8
    assert dict(gang.bundles[0]) == {"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}
    assert gang.strategy == "STRICT_PACK"
    split = demand_of_app(ROOT / "configs" / "models" / "llama-8b-prefill-decode.yaml")
    assert len(split.gangs) == 2


def test_both_engines_of_a_split_application_name_their_model():
    document = yaml.safe_load((ROOT / "configs/models/llama-8b-prefill-decode.yaml").read_text())
    (app,) = document["applications"]
    assert models.sources(app) == ["meta-llama/Llama-3.1-8B-Instruct"] * 2


def test_check_finds_with_its_line_what_certainly_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = serve_file(tmp_path, max_model_len=131072)
    (finding,) = [f for f in check.files([file]) if f.rule == "serve-llm-memory"]
    assert file.read_text().splitlines()[finding.line - 1].strip() == "max_model_len: 131072"
    assert "m does not fit L4: weights 15.0 GiB and 16.0 GiB of KV cache" in finding.what


def test_check_leaves_alone_what_may_fit_and_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments in [
        {"max_model_len": 30000},  # only with allowances too much
        {"accelerator": "A100", "source": "Qwen/Qwen3-30B-A3B"},  # not 40 GiB, but 80
        {"source": "someone/secret-9b"},
        {"max_model_len": "long"},
        {"max_model_len": 131072, "cpu_offload_gb": 8},
        {"max_model_len": 131072, "hf_overrides": {"num_hidden_layers": 2}},
    ]:
        rules = {f.rule for f in check.files([serve_file(tmp_path, **arguments)])}
        assert "serve-llm-memory" not in rules, arguments


def test_prefill_without_decode_is_a_fault(tmp_path):
    file = tmp_path / "split.yaml"
    shutil.copy(ROOT / "configs/models/llama-8b-prefill-decode.yaml", file)
    whole = yaml.safe_load(file.read_text())
    del whole["applications"][0]["args"]["decode_config"]
    file.write_text(yaml.safe_dump(whole))
    faults = [f.what for f in check.files([file]) if f.rule == "serve-llm-incomplete"]
    assert faults == ["`decode_config` is missing beside `prefill_config`"]
