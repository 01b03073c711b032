"""The builder of LLM applications with prefill and decode apart: who stands where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "configs" / "models" / "llama-8b-prefill-decode.yaml"
DIRECT = "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"


def args() -> dict[str, Any]:
    (app,) = yaml.safe_load(FILE.read_text())["applications"]
    found: dict[str, Any] = app["args"]
    return found


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if os.environ.get(DIRECT) == "1":
        pytest.skip("this process has direct streaming on")
    monkeypatch.setenv("MANTA_STORAGE", str(tmp_path))
    from manta.serving.llm import build_openai_app

    return build_openai_app


def test_the_guard_stands_at_the_only_way_in_and_decode_asks_prefill(build: Any) -> None:
    from manta.serving.guard.ingress import Guarded

    ingress = build(args())._bound_deployment
    assert Guarded in ingress.func_or_class.__mro__
    (decode,) = ingress.init_kwargs["llm_deployments"].values()
    assert decode._bound_deployment.name == "Decode:llama-8b"
    prefill = decode._bound_deployment.init_kwargs["prefill_server"]
    assert prefill._bound_deployment.name == "Prefill:llama-8b"


def test_half_of_the_two_is_refused_in_one_line(build: Any) -> None:
    from manta.errors import InputError

    half = {key: value for key, value in args().items() if key != "decode_config"}
    with pytest.raises(InputError, match="`decode_config` is missing"):
        build(half)


def test_direct_streaming_which_has_no_ingress_is_refused_and_says_what_to_write(
    tmp_path: Path,
) -> None:
    code = (
        "import yaml; from manta.serving.llm import build_openai_app\n"
        f"app = yaml.safe_load(open({str(FILE)!r}))['applications'][0]\n"
        "try: build_openai_app(app['args'])\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    environment = {**os.environ, DIRECT: "1", "MANTA_STORAGE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "InputError prefill and decode apart need an ingress" in done.stdout, done.stderr
    assert f'{DIRECT}: "0"' in done.stdout


ROUTERS = """
import yaml
from manta.serving.llm import build_openai_app
from ray.llm._internal.serve.core.server import llm_server
from ray.serve._private.build_app import build_app
args = yaml.safe_load(open({file!r}))["applications"][0]["args"]
config = args["llm_configs"][0]
config["model_loading_config"]["model_source"] = "someone/model"
assert "push_telemetry_report_for_all_models(" in open(llm_server.__file__).read()
for more in ({{}}, {{"request_router_config": {{"request_router_class":
             "ray.serve.llm.request_router.PrefixCacheAffinityRouter"}}}}):
    config["deployment_config"] = {{"num_replicas": 1, **more}}
    app = build_app(build_openai_app(args), name="llm", default_runtime_env={{}})
    print("ROUTER", app.ingress_request_router_deployment is not None)
    server = app.deployments[0].func_or_class
    print("STARTS", [c.__name__ for c in server.__mro__ if "_start_engine" in vars(c)][0])
"""


def test_haproxy_chooses_the_engine_itself_unless_the_config_names_a_router(
    tmp_path: Path,
) -> None:
    switches = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", DIRECT)
    environment = os.environ | dict.fromkeys(switches, "1")
    environment |= {"MANTA_STORAGE": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    code = ROUTERS.format(file=str(ROOT / "serve_apps" / "llm.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("ROUTER", "STARTS"))]
    assert said == ["ROUTER False", "STARTS Untold", "ROUTER True", "STARTS Untold"], done.stderr


def test_adapters_need_an_engine_that_loads_them_and_ray_is_not_asked_to(tmp_path: Path) -> None:
    code = (
        "from manta.serving.llm import build_openai_app\n"
        "def build(lora, **engine):\n"
        "    config = {'model_loading_config': {'model_id': 'm', 'model_source': 'o/m'},\n"
        "              'accelerator_type': None, 'engine_kwargs': engine, 'lora_config': lora}\n"
        "    try: app = build_openai_app({'llm_configs': [config]})\n"
        "    except Exception as e: return type(e).__name__, str(e)\n"
        "    made = app._bound_deployment\n"
        "    lora = made.init_kwargs['llm_config'].lora_config\n"
        "    return lora, made.func_or_class.guard_inside.args\n"
        "print(build({}))\n"
        "print(build({'max_num_adapters': 3}, enable_lora=True))\n"
        "print(build({'dynamic_lora_loading_path': 'shelf'}, enable_lora=True))\n"
    )
    environment = {**os.environ, DIRECT: "1", "MANTA_STORAGE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    without, misspelt, built = done.stdout.splitlines()[-3:]
    assert "InputError" in without, done.stderr
    assert "enable_lora: true" in without
    assert "lora_config.max_num_adapters" in misspelt
    assert built.startswith("(None, ")
    assert "dynamic_lora_loading_path='shelf'" in built
