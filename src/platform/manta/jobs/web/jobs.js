// All jobs, newest first, filtered and by pages. Filters are in the address: a link keeps them.

import * as api from "./api.js";
import { STATES, badge, duration, h, jobLink, runtime, table, when } from "./ui.js";

const PAGE = 50;
const FILTERS = ["states", "user", "team", "cluster"];

export const title = () => "Jobs";

export async function load({ before, ...filters }) {
  const found = await api.get("jobs", { ...filters, before_seq: before, limit: PAGE });
  return found.reverse();
}

export function draw(jobs, world, params) {
  const columns = ["Job", "State", "Try", "Whose", "Cluster", "Submitted", "Ran", "Command"];
  const now = world.now();
  const rows = jobs.map((job) => [
    job.id,
    [
      jobLink(job.id),
      badge(job.state),
      String(job.attempt || "–"),
      `${job.user} · ${job.team}`,
      job.cluster,
      when(job.submitted_at, now),
      duration(runtime(job, now)),
      h("code", { class: "command", title: job.entrypoint }, job.entrypoint),
    ],
  ]);
  return [
    h("h1", {}, "Jobs"),
    filterForm(params),
    table("Jobs, newest first", columns, rows, "No such jobs."),
    pager(jobs, params),
  ];
}

function filterForm(params) {
  const option = (value, label) =>
    h("option", { value, selected: (params.states ?? "") === value }, label);
  const field = (name) =>
    h(
      "label",
      { "data-key": name },
      name,
      h("input", { name, value: params[name] ?? "", maxlength: 200, placeholder: "any" }),
    );
  return h(
    "form",
    { class: "filters", "aria-label": "Filter" },
    h(
      "label",
      {},
      "state",
      h(
        "select",
        { name: "states" },
        option("", "any"),
        STATES.map((state) => option(state, state.toLowerCase())),
      ),
    ),
    FILTERS.slice(1).map(field),
    h("button", { type: "submit" }, "Show"),
  );
}

function pager(jobs, params) {
  const { before, ...filters } = params;
  const link = (label, more) =>
    h("a", { href: `#/jobs?${new URLSearchParams({ ...filters, ...more })}` }, label);
  return h(
    "p",
    { class: "pager" },
    before && link("← Newest", {}),
    jobs.length === PAGE && link("Older →", { before: jobs.at(-1).seq }),
  );
}

export function on(kind, event) {
  const form = event.target.closest("form.filters");
  if (!form || kind === "click" || (kind === "change" && event.target.name !== "states")) return;
  event.preventDefault();
  const given = FILTERS.map((name) => [name, form.elements[name].value.trim()]);
  location.hash = `#/jobs?${new URLSearchParams(given.filter(([, value]) => value))}`;
}
