// Runs of `manta run`, each as the graph of its steps.

import * as api from "./api.js";
import { badge, duration, h, mark, svgLink, when } from "./ui.js";

const PAGE = 10;
const STEP = { width: 136, height: 46, across: 38, down: 18 };

export const title = () => "Pipelines";

export const load = ({ before }) => api.get("runs", { limit: PAGE, before_seq: before });

export function draw(runs, world, { before }) {
  const now = world.now();
  return [
    h("h1", {}, "Pipelines"),
    !runs.length && h("p", { class: "nothing" }, "No runs yet; begin one with manta run."),
    runs.map((run) => drawRun(run, now)),
    h(
      "p",
      { class: "pager" },
      before && h("a", { href: "#/pipelines" }, "← Newest"),
      runs.length === PAGE && h("a", { href: `#/pipelines?before=${runs.at(-1).seq}` }, "Older →"),
    ),
  ];
}

function drawRun(run, now) {
  const numDone = run.steps.filter((step) => step.state === "SUCCEEDED").length;
  return h(
    "section",
    { class: "run", "data-key": run.id },
    h("h2", { class: "id" }, run.pipeline, " ", badge(run.state)),
    h(
      "p",
      { class: "told" },
      h("span", { class: "id" }, run.id),
      ` · ${run.actor} · began `,
      when(run.started_at, now),
      ` · ${numDone} of ${run.steps.length} steps`,
    ),
    graph(run, now),
  );
}

/** Steps in layers by what they need: from left to right, or downwards where that is too wide. */
function graph(run, now) {
  const depth = {};
  for (const step of run.steps) depth[step.name] = 1 + Math.max(-1, ...step.needs.map((n) => depth[n] ?? 0));
  const layers = [];
  for (const step of run.steps) (layers[depth[step.name]] ??= []).push(step);
  const wide = layers.length * (STEP.width + STEP.across) + 40;
  const isDownwards = wide > document.getElementById("content").clientWidth;
  const spots = isDownwards ? placeDown(layers) : placeAcross(layers);
  const [width, height] = extent(spots);
  const edges = run.steps.flatMap((step) =>
    step.needs.map((need) => edge(spots[need], spots[step.name], isDownwards)),
  );
  const all = run.steps.map((step) => `${step.name} ${word(step)}`).join(", ");
  return h(
    "svg",
    {
      class: "graph",
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "group",
      "aria-label": `Steps: ${all}`,
    },
    edges,
    run.steps.map((step) => node(step, spots[step.name], now)),
  );
}

function placeAcross(layers) {
  const spots = {};
  const most = Math.max(...layers.map((layer) => layer.length));
  layers.forEach((layer, column) =>
    layer.forEach((step, row) => {
      const y = (row + (most - layer.length) / 2) * (STEP.height + STEP.down);
      spots[step.name] = { x: column * (STEP.width + STEP.across), y };
    }),
  );
  return spots;
}

function placeDown(layers) {
  const spots = {};
  const most = Math.max(...layers.map((layer) => layer.length));
  layers.forEach((layer, row) =>
    layer.forEach((step, column) => {
      const x = (column + (most - layer.length) / 2) * (STEP.width + STEP.down);
      spots[step.name] = { x, y: row * (STEP.height + STEP.across / 1.6) };
    }),
  );
  return spots;
}

function extent(spots) {
  const all = Object.values(spots);
  const far = (axis, size) => Math.max(...all.map((spot) => spot[axis])) + size + 2;
  return [far("x", STEP.width), far("y", STEP.height)];
}

function edge(from, to, isDownwards) {
  if (!from || !to) return null;
  const half = { x: STEP.width / 2, y: STEP.height / 2 };
  const [x1, y1, x2, y2] = isDownwards
    ? [from.x + half.x, from.y + STEP.height, to.x + half.x, to.y]
    : [from.x + STEP.width, from.y + half.y, to.x, to.y + half.y];
  const [mx, my] = [(x1 + x2) / 2, (y1 + y2) / 2];
  const bend = isDownwards ? `${x1} ${my} ${x2} ${my}` : `${mx} ${y1} ${mx} ${y2}`;
  return h("path", { class: "edge", d: `M${x1} ${y1} C${bend} ${x2} ${y2}` });
}

function node(step, { x, y }, now) {
  const box = [
    h("title", {}, `${step.name}: ${word(step)} ${step.message}`),
    h("rect", { x: x + 1, y: y + 1, width: STEP.width, height: STEP.height, rx: 8 }),
    h("text", { x: x + 12, y: y + 20, class: "name" }, short(step.name)),
    h("text", { x: x + 12, y: y + 37, class: "state" }, `${mark(step.state)} ${told(step, now)}`),
  ];
  const kind = `step ${(step.state || "none").toLowerCase()}`;
  if (!step.job_id || !step.state) return h("g", { class: kind }, box);
  return svgLink({ class: kind, href: `#/jobs/${encodeURIComponent(step.job_id)}` }, ...box);
}

function word(step) {
  if (step.message === "unchanged") return "unchanged";
  return step.state ? step.state.toLowerCase() : step.job_id ? "not yet" : "to deploy";
}

/** A word, or how long, with the state's sign; the whole is in the title. */
function told(step, now) {
  const isTimed = step.started_at != null && ["RUNNING", "SUCCEEDED"].includes(step.state);
  if (!isTimed || step.message === "unchanged") return word(step);
  return duration((step.ended_at ?? now) - step.started_at);
}

const short = (name) => (name.length > 15 ? `${name.slice(0, 14)}…` : name);
