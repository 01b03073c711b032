// The page's one loop: every two seconds it asks what has happened since the last event it knows,
// and only if something has, or the view wants it so, reads the view's data anew.

import * as api from "./api.js";
import { h, morph } from "./ui.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import * as pipelines from "./pipelines.js";
import * as queue from "./queue.js";
import * as usage from "./usage.js";

const POLL_MS = 2000;
const REFRESH_MS = 10_000; // what changes without an event: clusters, counters, a deploy
const NUM_EVENTS = 200;

const content = document.getElementById("content");
const alertLine = document.getElementById("alert");
const statusLine = document.getElementById("status");
const form = document.getElementById("ask");
const forget = document.getElementById("forget");

const world = { events: [], summary: null, skew_s: 0, now: () => Date.now() / 1000 + world.skew_s };
let place = null; // {view, params, data}
let cursor = null;
let loadedAt = 0;
let lostAt = null;
let timer = null;
let turn = 0; // a newer turn makes the answers of an older one void

function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id] = path.split("/");
  if (name === "jobs" && id) return { view: job, params: { id: decoded(id) } };
  const params = Object.fromEntries(new URLSearchParams(query));
  return { view: { jobs, pipelines, usage }[name] ?? queue, params };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // typed by hand; the server says that there is no such job
  }
}

function go() {
  place = { ...route(), data: null };
  const own = `#/${location.hash.replace(/^#\/?/, "").split(/[/?]/)[0]}`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === own) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  loadedAt = 0;
  content.replaceChildren(h("p", { class: "nothing" }, "Loading …"));
  window.scrollTo(0, 0);
  poll();
}

async function poll() {
  clearTimeout(timer);
  const mine = ++turn;
  if (!api.key.get()) return askForKey();
  try {
    await look(() => mine === turn);
    if (mine === turn) found();
  } catch (error) {
    if (mine === turn) explain(error);
  }
  if (mine === turn && !document.hidden && api.key.get()) timer = setTimeout(poll, POLL_MS);
}

async function look(isCurrent) {
  const fresh = await api.get("events", { after_seq: cursor ?? 0, limit: NUM_EVENTS });
  if (!isCurrent()) return;
  const concerns = place.view.concerns ?? (() => true);
  const news = cursor !== null && fresh.some((event) => concerns(event, place.params));
  world.events = [...world.events, ...fresh].slice(-NUM_EVENTS);
  cursor = world.events.at(-1)?.seq ?? 0;
  if (news || !place.data || Date.now() - loadedAt > REFRESH_MS) {
    const [summary, data] = await Promise.all([api.get("summary"), place.view.load(place.params)]);
    if (!isCurrent()) return;
    world.summary = summary;
    world.skew_s = summary.now - Date.now() / 1000;
    place.data = data;
    loadedAt = Date.now();
  }
  draw();
  await place.view.follow?.(place, content);
}

function draw() {
  const fresh = h("main", { id: "content", tabindex: "-1" });
  fresh.append(...place.view.draw(place.data, world, place.params).flat().filter(Boolean));
  morph(content, fresh);
  document.title = `${place.view.title(place.params)} · Manta queue`;
}

/** The server has answered. */
function found() {
  lostAt = null;
  alertLine.hidden = true;
  form.hidden = true;
  forget.hidden = false;
  content.classList.remove("stale");
  statusLine.textContent = world.summary?.controller ? "● live" : "● no controller";
  statusLine.className = world.summary?.controller ? "live" : "away";
}

function explain(error) {
  if (error instanceof api.Refused) {
    api.key.forget();
    askForKey(`${error.message} Is it whole, and was it not withdrawn?`);
    return;
  }
  if (!(error instanceof api.Unreachable)) {
    found();
    content.replaceChildren(h("p", { class: "nothing" }, error.message));
    return;
  }
  lostAt ??= new Date();
  const since = lostAt.toLocaleTimeString("en-GB");
  alertLine.textContent = `Not reachable since ${since}; trying again. What is shown is from before.`;
  alertLine.hidden = false;
  content.classList.add("stale");
  statusLine.textContent = "";
}

function askForKey(error = "") {
  content.replaceChildren();
  alertLine.hidden = true;
  statusLine.textContent = "";
  forget.hidden = true;
  form.hidden = false;
  document.getElementById("key-error").textContent = error;
  document.getElementById("key").focus();
  Object.assign(world, { events: [], summary: null });
  cursor = null;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const input = document.getElementById("key");
  const given = input.value.trim();
  // A header takes no other characters, and no key of ours has any.
  if (!/^[\x21-\x7e]+$/.test(given)) return askForKey("This cannot be a key.");
  api.key.set(given);
  input.value = "";
  document.getElementById("key-error").textContent = "";
  return go();
});

forget.addEventListener("click", () => {
  api.key.forget();
  poll();
});

for (const kind of ["submit", "change", "click"]) {
  content.addEventListener(kind, (event) => place?.view.on?.(kind, event, place, poll));
}
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else poll();
});
window.addEventListener("hashchange", go);
go();
