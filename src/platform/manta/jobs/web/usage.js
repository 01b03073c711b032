// What teams, users or jobs have held and cost, and the budgets of teams.

import * as api from "./api.js";
import { amount, gauge, h, jobLink, section, table } from "./ui.js";

const NUM_ROWS = 200;
const COSTS = { node_seconds: "Node-hours", usd: "USD", kwh: "kWh", kgco2e: "kgCO₂e" };

const AT_LIMIT = { hold: "new jobs wait", stop: "running jobs are stopped" };

export const title = () => "Usage";

/** Sums over many jobs cost the server something: read anew now and then only. */
export const concerns = () => false;

export async function load({ by = "team", days = "30" }) {
  const [held, costs, budgets] = await Promise.all([
    api.get("usage", { by, days }),
    api.get("costs", { by, days }),
    api.get("budgets"),
  ]);
  return { held, costs, budgets };
}

export function draw({ held, costs, budgets }, _, { by = "team", days = "30" }) {
  return [
    h("h1", {}, "Usage"),
    h(
      "p",
      { class: "choices" },
      ["team", "user", "job"].map((one) => choice(`by ${one}`, one === by, { by: one, days })),
      h("span", { class: "gap" }),
      ["1", "7", "30", "365"].map((n) => choice(`${n} d`, n === days, { by, days: n })),
    ),
    usageTable(held.slice(0, NUM_ROWS), costs, by),
    h(
      "p",
      { class: "note" },
      "Hours are what jobs asked for, times how long they ran. A job pays its share of the cluster; ",
      "what none held is idle. A question mark: no price list or power figure tells.",
    ),
    budgets.length > 0 &&
      section("Budgets", h("ul", { class: "cards" }, budgets.map(budgetCard))),
  ];
}

function choice(label, isChosen, params) {
  const href = `#/usage?${new URLSearchParams(params)}`;
  return [h("a", { href, "aria-current": isChosen ? "true" : null }, label), " "];
}

function usageTable(held, costs, by) {
  const kinds = [...new Set(held.flatMap((one) => Object.keys(one.resource_hours)))].sort();
  const columns = [by, "Attempts", "Hours", "Failed", ...kinds.map(kindHeading), ...Object.values(COSTS)];
  const rows = held.map((one) => [
    one.owner,
    [
      by === "job" ? jobLink(one.owner) : h("strong", {}, one.owner),
      amount(one.num_attempts),
      amount(one.hours),
      amount(one.failed_hours),
      ...kinds.map((kind) => hoursOf(kind, one.resource_hours[kind] ?? 0)),
      ...costCells(costs.owners[one.owner]),
    ],
  ]);
  const sum = (name, cost) => [
    `(${name})`,
    [`(${name})`, ...Array(3 + kinds.length).fill("–"), ...costCells(cost)],
  ];
  const sums = rows.length ? [sum("idle", costs.idle), sum("total", costs.total)] : [];
  return table(`Usage by ${by}`, columns, [...rows, ...sums], "Nothing has run in this time.");
}

const isBytes = (kind) => kind.endsWith("memory");
const kindHeading = (kind) => `${kind.replaceAll("_", " ")}-hours${isBytes(kind) ? " (GiB)" : ""}`;
const hoursOf = (kind, value) => amount(isBytes(kind) ? value / 2 ** 30 : value);

function costCells(cost) {
  return Object.keys(COSTS).map((name) => {
    if (!cost) return "–";
    const scaled = name === "node_seconds" ? { ...cost, [name]: cost[name] / 3600 } : cost;
    return known(scaled, name);
  });
}

/** A sum: `?` if nothing is known of it, `3.2+?` if not all is. */
export function known(cost, name) {
  if (cost[name] == null) return "?";
  return amount(cost[name]) + (cost.partial.includes(name) ? "+?" : "");
}

function budgetCard(budget) {
  const spent = `${amount(budget.spent_usd)}${budget.is_partial ? "+?" : ""}`;
  return h(
    "li",
    { class: "card", "data-key": budget.team },
    h("h3", {}, budget.team),
    gauge("usd", `${spent} of ${amount(budget.usd)} USD this ${budget.per}`, budget.spent_usd / budget.usd),
    h("p", {}, `${budget.state}; at the limit ${AT_LIMIT[budget.at_limit]}`),
  );
}
