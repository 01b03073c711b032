// Elements, and how values are shown. Data becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "path", "rect", "text", "title", "defs", "marker"]);

/** An element: attributes whose value is null or false are left out; children may be nested. */
export function h(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value != null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return made;
}

/** An `<a>` inside an `<svg>`. */
export function svgLink(attributes, ...children) {
  const made = document.createElementNS(SVG, "a");
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Make `there` look like `fresh`, keeping what is the same: focus, selection and scroll stay. */
export function morph(there, fresh) {
  matchAttributes(there, fresh);
  if (there.hasAttribute("data-own")) return; // its view writes the inside
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, index) => {
    const old = there.childNodes[index];
    const kept = old && (alike(old, node) ? old : laterWithKey(old, node));
    if (!kept) {
      there.insertBefore(node, old ?? null);
      return;
    }
    if (kept !== old) there.insertBefore(kept, old);
    if (node.nodeType === Node.ELEMENT_NODE) morph(kept, node);
    else if (kept.data !== node.data) kept.data = node.data;
  });
  while (there.childNodes.length > wanted.length) there.lastChild.remove();
}

function matchAttributes(there, fresh) {
  for (const { name } of [...there.attributes]) {
    const byReader = name === "open"; // of a <details>
    if (!byReader && !fresh.hasAttribute(name)) there.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (there.getAttribute(name) !== value) there.setAttribute(name, value);
  }
}

function alike(a, b) {
  return a.nodeName === b.nodeName && a.dataset?.key === b.dataset?.key;
}

function laterWithKey(old, node) {
  if (!node.dataset?.key) return null;
  let next = old.nextSibling;
  while (next && !alike(next, node)) next = next.nextSibling;
  return next;
}

// -- Values --

const MARKS = {
  QUEUED: "○",
  STARTING: "◔",
  RUNNING: "▶\uFE0E",
  SUCCEEDED: "✓",
  FAILED: "✕",
  STOPPED: "■",
};
export const STATES = Object.keys(MARKS);

/** The sign of a state: never its colour alone. */
export const mark = (state) => MARKS[state] ?? "·";

/** A state as a word with its sign and colour. */
export function badge(state, word = state.toLowerCase()) {
  const sign = h("span", { "aria-hidden": "true" }, mark(state));
  return h("span", { class: `badge ${(state || "none").toLowerCase()}` }, sign, ` ${word}`);
}

export const jobLink = (id) => h("a", { href: `#/jobs/${encodeURIComponent(id)}`, class: "id" }, id);

/** Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h. */
export function duration(seconds) {
  if (seconds == null) return "–";
  return spoken(seconds).replaceAll(" ", "\u00A0"); // never broken over two lines
}

function spoken(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

/** A moment: the time if it is today's, else with the date; the rest on pointing at it. */
export function when(at, now) {
  if (at == null) return "–";
  const moment = new Date(at * 1000);
  const isToday = moment.toDateString() === new Date(now * 1000).toDateString();
  const time = moment.toLocaleTimeString("en-GB");
  const shown = isToday ? time : `${two(moment.getDate())} ${month(moment)} ${time.slice(0, 5)}`;
  return h("time", { datetime: moment.toISOString(), title: moment.toISOString() }, shown);
}

const two = (number) => String(number).padStart(2, "0");
const month = (moment) => moment.toLocaleString("en-GB", { month: "short" });

/** How long a job has run, or ran; null before it started. */
export function runtime(job, now) {
  return job.started_at == null ? null : (job.ended_at ?? now) - job.started_at;
}

export function amount(value) {
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 100 ? 2 : 0 });
}

/** `12 of 16` of a resource; memory in GiB, the queue's own `slot` as jobs. */
export function resource(name, held, capacity) {
  const isBytes = name.endsWith("memory");
  const scaled = (value) => amount(isBytes ? value / 2 ** 30 : value);
  const label = { slot: "jobs" }[name] ?? name.replaceAll("_", " ");
  return `${label} ${scaled(held)} of ${scaled(capacity)}${isBytes ? " GiB" : ""}`;
}

/** A table that becomes a list of cards on a narrow screen. `rows`: [key, cells]. */
export function table(caption, columns, rows, nothing) {
  if (!rows.length) return h("p", { class: "nothing" }, nothing);
  const heads = columns.map((name) => h("th", { scope: "col" }, name));
  const cells = (row) => row.map((cell, at) => h("td", { "data-label": columns[at] }, cell));
  return h(
    "table",
    { "aria-label": caption },
    h("thead", {}, h("tr", {}, heads)),
    h("tbody", {}, rows.map(([key, row]) => h("tr", { "data-key": key }, cells(row)))),
  );
}

export function section(title, ...children) {
  return h("section", {}, h("h2", {}, title), ...children);
}

/** A line of text over a bar; `share` of 1 fills it. */
export function gauge(key, text, share) {
  const width = share > 0 ? 100 * Math.min(1, share) : 0;
  return h(
    "p",
    { class: "gauge", "data-key": key },
    h("span", {}, text),
    h(
      "svg",
      { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
      h("rect", { class: "track", width: 100, height: 6 }),
      h("rect", { class: share >= 1 ? "fill full" : "fill", width, height: 6 }),
    ),
  );
}
