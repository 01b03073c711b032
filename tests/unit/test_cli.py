"""The command line as a whole: quick to answer, the same exit codes everywhere."""

import importlib.util
import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from manta.cli import main as cli_main
from manta.cli.main import COMMANDS, cli

HEAVY = ("ray", "torch", "transformers", "vllm", "pydantic", "yaml", "fsspec", "rich", "psutil")
PRESENT = [name for name in COMMANDS if importlib.util.find_spec(f"manta.cli.{name}")]


def manta(*arguments, home, **environment):
    return subprocess.run(
        [sys.executable, "-m", "manta.cli.main", *arguments],
        env=os.environ | {"HOME": str(home), "MANTA_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from manta.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def _leaves():
    """Word lists of all commands that do something; groups are only ways to them."""
    for name in PRESENT:
        command = cli.get_command(None, name)
        if isinstance(command, click.Group):
            yield from ([name, sub] for sub in command.commands)
        else:
            yield [name]


LEAVES = list(_leaves())
FILES = (["render", "kuberay"], ["prices", "refresh"])  # what they print or write is for programs


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_help_with_an_example(words):
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"manta {' '.join(words)}" in result.output


@pytest.mark.parametrize("words", [w for w in LEAVES if w not in FILES], ids=" ".join)
def test_every_command_prints_json_for_programs(words):
    command = cli.get_command(None, words[0])
    commands = [command, *(command.commands[sub] for sub in words[1:])]
    params = [param for one in commands for param in one.params]
    assert "--json" in {option for param in params for option in param.opts}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["up", "--nonsense"],
        ["up", "--gcs-port", "many"],
        ["up", "--gcs-port", "70000"],
        ["up", "--ports", "some"],
        ["up", "--name", "Not/A/Name"],
        ["up", "--dry-run", "--gcs-port", "7000", "--serve-port", "7000"],
        ["down", "--name", "../elsewhere"],
        ["env"],
    ],
)
def test_bad_usage_exits_2_with_a_message_and_no_traceback(arguments, tmp_path):
    done = manta(*arguments, home=tmp_path)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "rror: " in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    done = manta("submit", "--dry-run", "--", "echo", b"a\xff", home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: `a?` is not UTF-8; put odd bytes into a file\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "main", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli_main.main(["--help"])


def test_ctrl_c_exits_130_with_a_line(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli_main.main(["status"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_down_of_nothing_says_so_and_is_no_error(tmp_path):
    done = manta("down", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Cluster `local` is not up.\n")


def test_status_of_nothing_exits_1_and_says_how_to_start(tmp_path):
    done = manta("status", home=tmp_path)
    assert done.returncode == 1
    assert "manta up" in done.stdout
    assert json.loads(manta("status", "--json", home=tmp_path).stdout)["state"] == "down"


def test_dry_run_prints_the_ray_command_and_leaves_nothing(tmp_path):
    done = manta("up", "--dry-run", "--ports", "auto", home=tmp_path)
    assert done.returncode == 0
    assert "ray start --head" in done.stdout
    assert "RAY_AUTH_MODE=token" in done.stdout
    assert list(tmp_path.rglob("*")) == []


def test_doctor_names_a_misleading_address_and_an_open_token(tmp_path):
    token = tmp_path / "clusters" / "local" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("secret-token")
    token.chmod(0o644)
    done = manta(
        "doctor", "--json", home=tmp_path, RAY_ADDRESS="10.0.0.1:1", MANTA_STORAGE=str(tmp_path)
    )
    checks = {check["what"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 1
    assert checks["RAY_ADDRESS"]["verdict"] == "warn"
    assert checks["token"]["verdict"] == "fail"
    assert checks["storage"]["verdict"] == "ok"
    assert "secret-token" not in done.stdout + done.stderr


def test_doctor_fails_when_storage_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = manta("doctor", "--json", home=tmp_path, MANTA_STORAGE=str(tmp_path / "file" / "sub"))
    checks = {check["what"]: check for check in json.loads(done.stdout)}
    assert (done.returncode, checks["storage"]["verdict"]) == (1, "fail")
