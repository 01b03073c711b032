"""The house rules that a reader relies on: imports point one way, nothing heavy at the top."""

import ast
import subprocess
import sys
from pathlib import Path

import manta

PACKAGE = Path(manta.__file__).parent
EVERY_ROOM = {"errors", "storage", "spec", "layout"}

# Files that only Ray's own processes or one function load, so their weight reaches no command.
LOADED_BY_RAY = {
    "serving/llm.py": "the import_path of a Serve config; runs in a replica, as workloads do",
    "serving/embeddings.py": "as serving/llm.py",
    "serving/rag.py": "as serving/llm.py",
    "serving/engine/direct.py": "a part of serving/llm.py",
    "plan/ray_scheduler.py": "the seam to Ray's scheduler, imported when a plan needs it",
}

# Which rooms each room may import: ARCHITECTURE, "which way data walks", with what those import.
MAY_IMPORT = {
    "errors": set(),
    "storage": {"errors"},
    "state": {"errors"},
    "spec": {"errors"},
    "sizing": set(),
    "check": {"spec", "sizing", "errors"},
    "plan": {"spec", "check", "sizing", "errors"},
    "cluster": {"plan"} | EVERY_ROOM,
    "jobs": {"plan", "state", "cluster"} | EVERY_ROOM,
    "client": {"jobs", "plan", "state"} | EVERY_ROOM,
    "serving": {"plan", "check", "state", "cluster"} | EVERY_ROOM,
    "autoscaling": {"plan"} | EVERY_ROOM,
    "workloads": EVERY_ROOM,
    "observe": {"state"} | EVERY_ROOM,
}


# The rooms inside serving/, each with what it may import; files beside them may use all of these.
INSIDE_SERVING = {
    "access": set(),
    "request": set(),
    "telemetry": {"access", "request"},
    "forwarding": {"access", "request", "telemetry"},
    "apps": {"access"},
    "canary": {"access", "request", "telemetry", "forwarding", "apps"},
    "guard": {"access", "request", "telemetry", "canary"},
    "engine": {"access", "request", "guard"},
}


def place(file):
    return file.relative_to(PACKAGE).as_posix()


def rooms_imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "manta":
            names = [f"manta.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "manta.workloads":
            # Where things lie under the storage root: names only, which others need as well.
            names = [
                "manta.layout" if alias.name == "layout" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name.split(".")[1] for name in names if name.startswith("manta."))


def test_imports_point_one_way():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in MAY_IMPORT:  # cli and the package itself sit above all
            assert room in ("cli", "__init__"), f"{file}: a room without a place in the table"
            continue
        allowed = MAY_IMPORT[room] | {room}
        wrong += [
            f"{place(file)} -> {other}" for other in rooms_imported(file) if other not in allowed
        ]
    assert wrong == []


def test_imports_inside_serving_point_one_way():
    wrong = []
    for file in (PACKAGE / "serving").rglob("*.py"):
        room = file.parent.name
        if room == "serving":
            continue
        allowed = INSIDE_SERVING[room] | {room, "openai_errors"}
        wrong += [
            f"{place(file)} -> {node.module}"
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("manta.serving")
            if f"{node.module}.".split(".")[2] not in allowed
        ]
    assert wrong == []


def test_no_package_shadows_pythons_platform():
    assert not (PACKAGE.parent / "__init__.py").exists()
    assert not (PACKAGE.parent.parent / "__init__.py").exists()


def test_only_workloads_import_heavy_libraries_at_the_top():
    heavy = {"ray", "torch", "transformers", "vllm"}
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        if place(file).startswith("workloads/") or place(file) in LOADED_BY_RAY:
            continue
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{place(file)}: {n}" for n in names if n.split(".")[0] in heavy]
    assert wrong == []


def test_importing_manta_starts_and_loads_nothing_heavy():
    code = (
        "import sys, manta, manta.spec, manta.storage, manta.cluster.local\n"
        "import manta.jobs.daemon, manta.jobs.http_api, manta.client\n"
        "print([n for n in ('ray', 'torch', 'transformers', 'vllm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
