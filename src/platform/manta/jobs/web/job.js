// One job: its story, and the end of its log, which grows while the job runs.

import * as api from "./api.js";
import { badge, duration, h, runtime, section, table, when } from "./ui.js";
import { eventLine } from "./queue.js";
import { known } from "./usage.js";

const TAIL_BYTES = 64 * 1024;
const MAX_SHOWN = 400_000; // characters; a page with more is slow on a phone
const BANDS = { "-10": "low", 0: "normal", 10: "high" };
const DONE = new Set(["SUCCEEDED", "FAILED", "STOPPED"]);

export const title = ({ id }) => id;

export const concerns = (event, { id }) => event.job_id === id;

export async function load({ id }) {
  const path = `jobs/${encodeURIComponent(id)}`;
  const [job, why, asked, report, cost, events] = await Promise.all([
    api.get(path),
    api.get(`${path}/why`),
    api.get(`${path}/request`),
    api.get(`${path}/report`).catch(() => ({ artifacts: {}, metrics: {} })), // storage may be away
    api.get(`${path}/cost`),
    api.get("events", { job_id: id, limit: 500 }),
  ]);
  return { job, why: why.why.trim(), asked, report, cost, events };
}

export function draw({ job, why, asked, report, cost, events }, world) {
  const now = world.now();
  const attempt = chosen.jobId === job.id && chosen.attempt ? chosen.attempt : job.attempt;
  return [
    h("h1", { class: "id" }, job.id, " ", badge(job.state)),
    why && h("p", { class: "note" }, DONE.has(job.state) ? "" : "It waits: ", why),
    h("dl", { class: "facts" }, facts(job, asked, report, cost, now)),
    section("Command", h("pre", {}, job.entrypoint)),
    section("Attempts", attemptsTable(job, now)),
    section(`Log${job.attempt > 1 ? ` of attempt ${attempt}` : ""}`, logBox(job, attempt)),
    section("What happened", h("ol", { class: "events" }, events.map((e) => eventLine(e, now, true)))),
    section("What was asked for", details(asked)),
  ];
}

function facts(job, asked, report, cost, now) {
  const told = {
    name: job.name,
    whose: `${job.user}, team ${job.team}`,
    cluster: job.clusters && job.clusters !== job.cluster ? `${job.cluster} (of ${job.clusters})` : job.cluster,
    priority: BANDS[job.priority] ?? String(job.priority),
    submitted: when(job.submitted_at, now),
    ran: duration(runtime(job, now)),
    cost: cost.usd == null ? "" : `${known(cost, "usd")} USD`,
    energy: cost.kwh == null ? "" : `${known(cost, "kwh")} kWh`,
    cause: job.cause,
    commit: asked.code_version,
    "sent by": job.origin === "ray" ? "plain ray job submit" : "",
    ...report.metrics,
    ...report.artifacts,
  };
  return Object.entries(told)
    .filter(([, value]) => value !== "")
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "number" ? String(Number(value.toPrecision(4))) : value)));
}

function attemptsTable(job, now) {
  const columns = ["Try", "State", "Cluster", "Ray id", "Began", "Ran", "Exit", "Cause", "Log"];
  const rows = job.attempts.map((one) => [
    one.number,
    [
      String(one.number),
      badge(one.state),
      one.cluster,
      h("code", {}, one.submission_id),
      when(one.started_at, now),
      duration(runtime(one, now)),
      one.exit_code == null ? "–" : String(one.exit_code),
      one.cause || "–",
      h("button", { type: "button", "data-attempt": one.number }, one.log_state),
    ],
  ]);
  return table("Attempts", columns, rows, "Not started yet.");
}

function details(asked) {
  const { environment, runtime_env, resources, retry, packages, timeout_s, deadline_s } = asked;
  const told = { resources, retry, timeout_s, deadline_s, packages, runtime_env };
  return [
    h(
      "p",
      {},
      environment.length ? "Environment variables (values are not shown): " : "No environment variables.",
      environment.map((name, at) => [at ? ", " : "", h("code", {}, name)]),
    ),
    h("details", {}, h("summary", {}, "As JSON"), h("pre", {}, JSON.stringify(told, null, 2))),
  ];
}

// -- The log. It is followed beside the page's data, a piece at a time. --

let chosen = { jobId: null, attempt: null };
let shown = { of: null };

function logBox(job, attempt) {
  const label = `Log of ${job.id}, attempt ${attempt}`;
  return [
    h("p", { id: "log-cut", class: "note", hidden: true, "data-own": true }),
    h("pre", { id: "log", tabindex: "0", role: "log", "aria-live": "off", "aria-label": label, "data-own": true }),
  ];
}

export async function follow(place, content) {
  const { job } = place.data;
  const attempt = chosen.jobId === job.id && chosen.attempt ? chosen.attempt : job.attempt;
  const box = content.querySelector("#log");
  const of = `${job.id} ${attempt}`;
  if (shown.of !== of || shown.box !== box) start(of, box);
  if (!attempt || shown.complete) return;
  const mine = shown;
  const tail = mine.next === null ? TAIL_BYTES : null;
  const { bytes, offset } = await api.getLog(job.id, { attempt, offset: mine.next ?? 0, tail });
  if (mine !== shown) return;
  if (mine.next === null) sayCut(content.querySelector("#log-cut"), offset);
  mine.next = offset + bytes.length;
  write(box, mine.decoder.decode(bytes, { stream: true }));
  const state = job.attempts.find((one) => one.number === attempt)?.log_state;
  mine.complete = state !== "growing" && bytes.length === 0;
}

function start(of, box) {
  shown = { of, box, next: null, complete: false, decoder: new TextDecoder() };
  box.textContent = "";
}

function sayCut(line, offset) {
  line.hidden = offset === 0;
  line.textContent = `The first ${offset.toLocaleString("en")} bytes are left out: manta logs ID prints all.`;
}

function write(box, text) {
  if (!text) return;
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  box.append(text);
  if (box.textContent.length > MAX_SHOWN) box.textContent = box.textContent.slice(-MAX_SHOWN / 2);
  if (isAtEnd) box.scrollTop = box.scrollHeight; // who has scrolled up reads
}

export function on(kind, event, place, poll) {
  const button = event.target.closest("button[data-attempt]");
  if (kind !== "click" || !button) return;
  chosen = { jobId: place.params.id, attempt: Number(button.dataset.attempt) };
  poll();
}
