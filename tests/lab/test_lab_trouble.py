"""What goes wrong on real hosts: workers that cannot join, lost terminals, hosts that are gone."""

import signal
import subprocess

import pytest
from hosts import lab, why_not
from laptop import BIN, WORKER, Laptop, ray_processes, wait_until

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(1200),
]


@pytest.fixture
def laptop():
    with lab(3) as started:
        yield Laptop(started)


def test_workers_that_cannot_join_are_named_with_step_and_log_and_nothing_is_left(laptop):
    _, unset_up, closed = laptop.lab.hosts
    keys = closed.folder / "home/.ssh/authorized_keys"
    allowed = keys.read_text()
    keys.write_text("")
    broken = 'test "$(hostname)" != h1 || { echo no space left on this disk; exit 3; }'
    file = laptop.write("bad", max_workers=2, worker_setup_commands=[broken])
    done = laptop.run("manta", "up", str(file), "--yes", "--timeout-s", "90", timeout_s=600)
    assert done.returncode == 1
    assert "0 of 2 workers have joined" in done.stderr
    assert f"{unset_up.address} is not there; it is at step: set-up commands" in done.stderr
    assert "no space left on this disk" in done.stderr
    assert f"{closed.address} is not there; it is at step: SSH" in done.stderr
    assert "Permission denied" in done.stderr
    # Nothing runs there; but that host lets nobody in, so it cannot be verified: it is said so.
    assert f"{closed.address}: cannot be asked" in done.stderr
    for host in laptop.lab.hosts:
        assert ray_processes(laptop.lab, host) == []
    assert laptop.run("manta", "status", "--name", "bad").returncode == 1
    keys.write_text(allowed)
    down = laptop.run("manta", "down", "--name", "bad", "--yes")
    assert down.returncode == 0, down.stderr
    assert laptop.run("manta", "down", "--name", "bad").stdout == "Cluster `bad` is not up.\n"


def test_a_head_that_cannot_be_reached_is_named_with_its_step(laptop):
    head = laptop.lab.hosts[0]
    laptop.lab.unplug(head)
    file = laptop.write("far")
    done = laptop.run("manta", "up", str(file), "--yes", "--timeout-s", "25", timeout_s=600)
    assert done.returncode == 1
    assert f"the head ({head.address}) failed at step 1 of 7, Waiting for SSH" in done.stderr
    laptop.lab.plug(head)
    assert laptop.run("manta", "down", "--name", "far", "--yes").returncode == 0


def test_up_goes_on_after_its_terminal_was_lost_and_tls_refuses_strangers(laptop):
    file = laptop.write("tls", min_workers=1, max_workers=1, worker_start_ray_commands=[WORKER])
    words = [str(BIN / "manta"), "up", str(file), "--yes", "--tls"]
    log = (laptop.home / "up.log").open("wb")
    first = subprocess.Popen(
        laptop.lab.laptop(*words), env=laptop.environment, stdout=log, stderr=log
    )
    head = laptop.lab.hosts[0]
    wait_until(lambda: ray_processes(laptop.lab, head), 300)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "starting" in laptop.run("manta", "status", "--name", "tls").stdout
    done = laptop.run("manta", "up", str(file), "--yes", "--timeout-s", "500", timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert len(laptop.workers("tls")) == 1
    variables = laptop.variables("tls")
    assert "local.cluster.node" in laptop.run("ray", "status", **variables).stdout
    assert not answers_to_strangers(laptop, head.address)
    authority = laptop.home / ".manta/clusters/tls/tls-here/ca.crt"
    before = authority.read_bytes()
    words = ["manta", "up", str(file), "--yes", "--tls", "--timeout-s", "500"]
    rotated = laptop.run(*words, timeout_s=600)
    assert rotated.returncode == 0, rotated.stderr
    assert authority.read_bytes() != before
    assert len(laptop.workers("tls")) == 1
    assert "local.cluster.node" in laptop.run("ray", "status", **variables).stdout
    down = laptop.run("manta", "down", "--name", "tls", "--yes")
    assert down.returncode == 0, down.stderr
    assert not (head.folder / "home/.manta-tls").exists()


def answers_to_strangers(laptop, address):
    """Whether the control store talks to one with the token and another CA's certificate."""
    code = (
        "import datetime, grpc, pathlib, sys\n"
        "from manta.cluster import tls\n"
        "folder = pathlib.Path(sys.argv[2]); tls.new_keys(folder)\n"
        "own = folder / 'tls-here'\n"
        "read = lambda name: (own / name).read_bytes()\n"
        "token = pathlib.Path(sys.argv[3]).read_text().strip()\n"
        "made = grpc.ssl_channel_credentials(\n"
        "    pathlib.Path(sys.argv[4]).read_bytes(), read('node.key'), read('node.crt'))\n"
        "plain, strange = grpc.insecure_channel, lambda to: grpc.secure_channel(to, made)\n"
        "for channel in (plain(sys.argv[1]), strange(sys.argv[1])):\n"
        "    call = channel.unary_unary('/ray.rpc.NodeInfoGcsService/GetAllNodeInfo')\n"
        "    try:\n"
        "        call(b'', timeout=5, metadata=[('authorization', 'Bearer ' + token)])\n"
        "        print('answered')\n"
        "    except grpc.RpcError as error:\n"
        "        print(error.code().name)\n"
    )
    known = laptop.home / ".manta/clusters/tls"
    words = [f"{address}:6379", str(laptop.home / "strange"), str(known / "auth_token")]
    done = laptop.run("python", "-c", code, *words, str(known / "tls-here/ca.crt"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(), done.stderr
    return "answered" in done.stdout
