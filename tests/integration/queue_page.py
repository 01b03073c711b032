"""The queue's web page as people meet it: a real server, a real browser, a plausible queue.

`python tests/integration/queue_page.py docs/images/queue.png` takes the picture of the guide.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from manta import state as states
from manta.jobs import access, budgets, http_api, lease, logs, policy, queries, runs, store
from manta.jobs.access import Role
from manta.jobs.lease import Lease
from manta.jobs.model import Attempt, Cause, Job, JobRequest, JobState
from manta.jobs.policy import Outcome
from manta.jobs.run_request import RunRequest, ServeFile, StepRequest
from manta.state import State, events, jobs, nodes
from manta.state import pipeline_runs as run_table

BROWSER, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
]
CAPACITY = '{"slot": 16, "CPU": 64, "GPU": 8, "memory": 549755813888}'


class Site:
    """The application on a port of its own, which can go and come back."""

    def __init__(self, state: State) -> None:
        self.state = state
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Serve until `stop`."""
        config = uvicorn.Config(
            http_api.app(self.state),
            port=self.port,
            log_level="error",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self) -> None:
        """Be gone."""
        self._server.should_exit = True
        self._thread.join(10)


def until(holds: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@contextmanager
def browser(
    *, width: int = 1240, height: int = 900, dark: bool = False
) -> Iterator[webdriver.Chrome]:
    """A browser of its own, with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="m-web-", dir="/tmp") as profile:
        for option in [*OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(option)
        service = webdriver.ChromeService(executable_path=str(DRIVER))
        with webdriver.Chrome(options=options, service=service) as opened:
            size(opened, width, height)
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            yield opened


def size(page: webdriver.Chrome, width: int, height: int) -> None:
    """Make the page exactly so large, in CSS pixels; a window has a least width."""
    told = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", told)


def enter(page: webdriver.Chrome, url: str, key: str) -> None:
    """Open the page and give it the key."""
    page.get(url)
    WebDriverWait(page, 10).until(lambda p: p.find_element(By.ID, "key").is_displayed())
    page.find_element(By.ID, "key").send_keys(key)
    page.find_element(By.CSS_SELECTOR, "#ask button").click()


# -- State --


class Queue:
    """A state with a cluster, in which jobs are moved on as a controller does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = states.open_state(f"sqlite:///{folder}/state.db")
        held = lease.acquire(self.state)
        assert held is not None
        self.lease: Lease = held
        self.cluster("local", CAPACITY)
        self.key = access.add(self.state, "page", Role.VIEWER, "ann@desk")

    def cluster(self, name: str, resources: str, status: str = "up", ago_s: float = 0) -> None:
        """A controller has seen it."""
        store.see_cluster(
            self.state,
            self.lease,
            name,
            cluster_id=name,
            storage_url=str(self.folder),
            status=status,
            resources=resources,
            seen_at=states.now() - ago_s,
        )

    def submit(self, job_id: str, **changes: object) -> Job:
        """A job that waits."""
        asked = self.request(job_id, **changes)
        return store.submit(self.state, asked, f"{asked.user}@desk")[0]

    def request(self, job_id: str, **changes: object) -> JobRequest:
        """What a job asks for."""
        values = {"name": "job", "entrypoint": f"python {job_id}.py", "user": "ann"}
        values |= {"runtime_env_passthrough": {}, "cluster": "local"}
        values |= {"storage_url": str(self.folder)}
        return JobRequest.model_validate({"id": job_id, **values, **changes})

    def run(self, run_id: str) -> str:
        """A pipeline with a fork and a deploy begins."""
        steps = []
        for name, needs in STEPS.items():
            job = self.request(f"{run_id}-{name}", team="ml", shape=shape(4))
            serve = ServeFile(name="serve_apps/llm.yaml", text="")
            what = {"deploy": serve} if name == "deploy" else {"job": job}
            steps.append(StepRequest.model_validate({"name": name, "needs": needs, **what}))
        where = {"cluster": "local", "storage_url": str(self.folder)}
        asked = RunRequest(id=run_id, pipeline="quickstart", steps=tuple(steps), **where)
        runs.submit(self.state, asked, "ann@desk")
        return run_id

    def begin_step(self, run_id: str, name: str) -> Job:
        """The job of a step is submitted."""
        asked = runs.request_of(self.state, run_id, name).job
        assert asked is not None
        run = runs.get(self.state, run_id)
        runs.begin_step(self.state, self.lease, run, _step(run, name), asked, "mark")
        return queries.get(self.state, asked.id)

    def settle_step(self, run_id: str, name: str) -> None:
        """A step has succeeded."""
        run = runs.get(self.state, run_id)
        runs.settle_step(self.state, self.lease, run, _step(run, name), JobState.SUCCEEDED)

    def begin(self, job: Job, at: float | None = None) -> tuple[Job, Attempt]:
        """Its attempt starts and runs."""
        job, attempt = store.begin_attempt(
            self.state, self.lease, job, cluster=job.cluster, cluster_id=job.cluster
        )
        start = at or states.now()
        job = store.mark_running(self.state, self.lease, job, attempt, at=start, node_id="n1")
        return job, attempt

    def end(self, job: Job, attempt: Attempt, outcome: Outcome, at: float | None = None) -> Job:
        """Its attempt has ended."""
        asked = store.request_of(self.state, job.id)
        verdict = policy.after(asked, outcome, num_failures=0, stop_reason="", now=states.now())
        ended = at or states.now()
        return store.end_attempt(
            self.state,
            self.lease,
            job,
            attempt,
            outcome,
            verdict,
            ended_at=ended,
            log_state="complete",
        )

    def log(self, job_id: str, text: str, attempt: int = 1) -> None:
        """Its log grows."""
        logs.LogWriter(logs.folder(str(self.folder), job_id, attempt)).append(text.encode())


SUCCEEDED = Outcome(state=JobState.SUCCEEDED, cause=Cause.NONE, message="", exit_code=0)
FAILED = Outcome(
    state=JobState.FAILED, cause=Cause.USER_ERROR, message="ValueError: no rows", exit_code=1
)
LOST = Outcome(
    state=JobState.FAILED, cause=Cause.NODE_LOST, message="node 10.0.4.17 was lost", exit_code=None
)

STEPS = {
    "prepare": (),
    "tune": ("prepare",),
    "train": ("tune",),
    "evaluate": ("train",),
    "generate": ("train",),
    "deploy": ("evaluate",),
    "ask": ("deploy",),
}


def _step(run: runs.Run, name: str) -> runs.RunStep:
    return next(step for step in run.steps if step.name == name)


def shape(cpus: float, gpus: float = 0) -> str:
    """What the scheduler counts."""
    return f'[["CPU", {cpus}], ["GPU", {gpus}]]' if gpus else f'[["CPU", {cpus}]]'


def fill(queue: Queue) -> None:
    """A morning of two teams and a pipeline, as it might be seen."""
    at = states.now()
    queue.cluster("onprem", '{"slot": 16, "CPU": 256, "GPU": 16}')
    queue.cluster("aws-spot", "{}", "gone", ago_s=5_160)
    for number, minutes in enumerate((310, 250, 190, 130, 70)):
        job = queue.submit(f"features-{number + 1:02d}", team="data", user="bob", shape=shape(8))
        _finish(queue, job, at - 60 * minutes, 60 * (31 + 3 * number), SUCCEEDED)
    job = queue.submit("eval-llama-0412", team="ml", user="mia", shape=shape(4, 1))
    _finish(queue, job, at - 5_400, 640, FAILED)
    _pipeline(queue, at)
    for name, who, team, size, minutes, cluster in (
        ("pretrain-1b", "mia", "ml", shape(32, 8), 214, "onprem"),
        ("embed-products", "bob", "data", shape(16), 12, "local"),
        ("tune-adapter-7", "ann", "ml", shape(8, 2), 41, "local"),
    ):
        job = queue.submit(name, user=who, team=team, shape=size, cluster=cluster)
        queue.begin(job, at - 60 * minutes)
    job = queue.submit("nightly-0412", user="ann", team="ml", shape=shape(8, 2), priority=10)
    job, attempt = queue.begin(job, at - 3_000)
    queue.begin(queue.end(job, attempt, LOST, at - 1_900), at - 1_880)
    budgets.put(queue.state, "ml", 500.0, "month", "hold", "admin@desk")
    for name, who, team, size, band in (
        ("pretrain-1b-long", "mia", "ml", shape(64, 8), 10),
        ("ablation-lr", "ann", "ml", shape(8, 4), 0),
        ("dedup-web-2026", "bob", "data", shape(40), 0),
        ("dedup-web-2027", "bob", "data", shape(96), 0),
        ("report-weekly", "eve", "ops", shape(2), -10),
    ):
        queue.submit(name, user=who, team=team, shape=size, priority=band)
    _age(queue, at)


def _age(queue: Queue, at: float) -> None:
    """Make it a morning's work: what was written just now happened one after the other."""
    with queue.state.write() as connection:
        connection.exec_driver_sql("DROP TRIGGER events_no_update")
        seqs = connection.execute(sa.select(events.c.seq).order_by(events.c.seq.desc())).scalars()
        for number, seq in enumerate(seqs):
            happened = at - 47 - 61.3 * number - 3.1 * number**2
            connection.execute(events.update().where(events.c.seq == seq).values(at=happened))
        waits = jobs.c.state == JobState.QUEUED
        newest = connection.execute(sa.select(sa.func.max(jobs.c.seq))).scalar_one()
        queued = at - 71 - 173 * (newest - jobs.c.seq)
        changed = jobs.update().where(waits).values(queued_at=queued, submitted_at=queued)
        connection.execute(changed)
        started = jobs.c.started_at.is_not(None)
        sent = {"submitted_at": jobs.c.started_at - 35}
        connection.execute(jobs.update().where(started).values(**sent))
        connection.execute(run_table.update().values(started_at=at - 1_280))
        node = {"cluster_id": "local", "node_id": "n1", "cluster": "local", "address": "127.0.0.1"}
        node |= {"node_type": "head", "instance_type": "p5.48xlarge", "market": "on-demand"}
        node |= {"resources": '{"CPU": 64, "GPU": 8}', "opened_at": at - 20_000, "seen_at": at}
        node |= {"unseen_s": 0, "usd_per_hour": 55.04, "price_source": "list"}
        connection.execute(nodes.insert().values(**node, price_date="2026-11-01"))


def _finish(queue: Queue, job: Job, start: float, length_s: float, outcome: Outcome) -> None:
    job, attempt = queue.begin(job, start)
    queue.end(job, attempt, outcome, start + length_s)


def _pipeline(queue: Queue, at: float) -> None:
    run_id = queue.run("quickstart-20261122-081502-ab12")
    start = at - 1_250
    for name, length_s in (("prepare", 95), ("tune", 210), ("train", 540)):
        job = queue.begin_step(run_id, name)
        _finish(queue, job, start, length_s, SUCCEEDED)
        start += length_s
        queue.settle_step(run_id, name)
    job = queue.begin_step(run_id, "evaluate")
    queue.begin(job, start)
    queue.log(job.id, "loading model …\nvalidation: 412 of 900 blocks, 1.87 bits per byte\n")


def main() -> None:
    """Save pictures of pages: FILE or FILE=PAGE each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="+", metavar="FILE[=PAGE]")
    parser.add_argument("--width", type=int, default=1240)
    parser.add_argument("--height", type=int, default=1046)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m-web-", dir="/tmp") as folder:
        queue = Queue(Path(folder))
        fill(queue)
        site = Site(queue.state)
        site.start()
        with browser(width=args.width, height=args.height, dark=args.dark) as page:
            enter(page, site.url, queue.key)
            for picture in args.pictures:
                file, _, where = picture.partition("=")
                queue.lease.renew(queue.state)
                _picture(page, f"{site.url}#/{where}", Path(file))
        site.stop()


def _picture(page: webdriver.Chrome, url: str, file: Path) -> None:
    page.get(url)
    WebDriverWait(page, 10).until(lambda p: p.find_elements(By.CSS_SELECTOR, "h1"))
    time.sleep(1)  # the log is read after the rest
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save_screenshot(str(file))
    for entry in page.get_log("browser"):
        print(entry["level"], entry["message"], file=sys.stderr)


if __name__ == "__main__":
    main()
