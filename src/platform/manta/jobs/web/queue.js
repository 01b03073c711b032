// The first view: how many jobs in which state, clusters, what runs, who waits for what.

import * as api from "./api.js";
import { STATES, badge, duration, gauge, h, jobLink, mark, resource, runtime, section, table, when } from "./ui.js";

const NUM_ROWS = 50;
const NUM_EVENTS = 12;
const BANDS = { "-10": "low", 0: "normal", 10: "high" };

export const title = () => "Queue";

export async function load() {
  const [clusters, starting, running, waiting] = await Promise.all([
    api.get("clusters"),
    api.get("jobs", { states: "STARTING", limit: NUM_ROWS }),
    api.get("jobs", { states: "RUNNING", limit: NUM_ROWS }),
    api.get("waiting", { limit: NUM_ROWS }),
  ]);
  return { clusters, active: [...running, ...starting], waiting };
}

export function draw({ clusters, active, waiting }, world) {
  const { counts, controller } = world.summary;
  const now = world.now();
  return [
    h("h1", {}, "Queue"),
    h("ul", { class: "tiles" }, STATES.map((state) => tile(state, counts[state] ?? 0))),
    !controller &&
      h("p", { class: "note" }, "No controller is at work: nothing starts until one does."),
    section("Clusters", h("ul", { class: "cards" }, clusters.map((one) => card(one, now)))),
    section("Running", runningTable(active, now)),
    section("Waiting", waitingTable(waiting, now), rest(waiting.length, counts.QUEUED ?? 0)),
    section("What happened", recent(world.events, now)),
  ];
}

function tile(state, count) {
  const href = `#/jobs?states=${state}`;
  const label = h("span", { class: "label" }, `${mark(state)} ${state.toLowerCase()}`);
  return h(
    "li",
    { class: `tile ${state.toLowerCase()}`, "data-key": state },
    h("a", { href }, h("strong", {}, count.toLocaleString("en")), label),
  );
}

function card(cluster, now) {
  const isUp = cluster.state === "up";
  const names = Object.keys(cluster.capacity).sort();
  return h(
    "li",
    { class: "card", "data-key": cluster.name },
    h("h3", {}, cluster.name, " ", badge(isUp ? "SUCCEEDED" : "STOPPED", cluster.state)),
    isUp && names.map((name) => held(name, cluster)),
    !isUp && h("p", {}, "Last seen ", when(cluster.seen_at, now)),
    cluster.dashboard_url && dashboard(cluster.dashboard_url),
  );
}

function held(name, { held, capacity }) {
  const amount = held[name] ?? 0;
  return gauge(name, resource(name, amount, capacity[name]), amount / capacity[name]);
}

/** It is on loopback of the machine that serves the page: a link only where that is this one. */
function dashboard(url) {
  const isHere = ["127.0.0.1", "localhost", "[::1]"].includes(location.hostname);
  if (!isHere) return h("p", { class: "note" }, `Ray dashboard, on the controller's machine: ${url}`);
  return h("p", {}, h("a", { href: url, target: "_blank", rel: "noreferrer" }, "Ray dashboard ↗"));
}

function runningTable(active, now) {
  const rows = active.map((job) => [
    job.id,
    [
      jobLink(job.id),
      badge(job.state),
      `${job.user} · ${job.team}`,
      job.cluster,
      duration(runtime(job, now)),
    ],
  ]);
  return table("Running jobs", ["Job", "State", "Whose", "Cluster", "For"], rows, "Nothing runs.");
}

function waitingTable(waiting, now) {
  const rows = waiting.map((job) => [
    job.id,
    [
      jobLink(job.id),
      BANDS[job.priority] ?? String(job.priority),
      `${job.user} · ${job.team}`,
      duration(now - job.queued_at),
      job.why,
    ],
  ]);
  const columns = ["Job", "Priority", "Whose", "For", "What it waits for"];
  return table("Waiting jobs", columns, rows, "Nobody waits.");
}

function rest(shown, all) {
  if (all <= shown) return null;
  return h("p", {}, h("a", { href: "#/jobs?states=QUEUED" }, `All ${all.toLocaleString("en")} that wait`));
}

function recent(events, now) {
  const last = events.slice(-NUM_EVENTS).reverse();
  if (!last.length) return h("p", { class: "nothing" }, "Nothing yet.");
  return h("ol", { class: "events" }, last.map((event) => eventLine(event, now)));
}

export function eventLine(event, now, ofOneJob = false) {
  return h(
    "li",
    { "data-key": event.seq },
    when(event.at, now),
    h("span", { class: "kind" }, event.kind),
    h(
      "span",
      { class: "told" },
      !ofOneJob && event.job_id && [jobLink(event.job_id), " "],
      event.text,
      event.actor !== "controller" && h("span", { class: "who" }, ` by ${event.actor}`),
    ),
  );
}
