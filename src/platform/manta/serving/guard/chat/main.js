// The chat: one conversation, kept in this page only. What a model says is shown as text, never as
// markup.

import { ask, key, models, Refused } from "./api.js";

const byId = (id) => document.getElementById(id);
const [form, chat, log, alertLine] = ["ask", "chat", "log", "alert"].map(byId);

let turns = []; // {role, content} that were answered, oldest first
let running = null; // AbortController of the answer that is coming

async function open(error = "") {
  try {
    const names = await models();
    byId("model").replaceChildren(...names.map((name) => new Option(name, name)));
  } catch (problem) {
    if (!(problem instanceof Refused)) return closed(problem.message);
    const typed = key.get() !== null;
    key.forget();
    return closed(error || (typed ? `${problem.message}. Is it whole, and was it not revoked?` : ""));
  }
  form.hidden = true;
  chat.hidden = byId("anew").hidden = false;
  byId("forget").hidden = key.get() === null;
  byId("text").focus();
}

function closed(error) {
  running?.abort();
  chat.hidden = byId("anew").hidden = byId("forget").hidden = true;
  form.hidden = false;
  byId("key-error").textContent = error;
  byId("key").focus();
}

function line(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const said = document.createElement("p");
  said.className = "said";
  said.textContent = text;
  item.append(said);
  log.append(item);
  item.scrollIntoView({ block: "end" });
  return said;
}

function note(said, text) {
  const told = document.createElement("p");
  told.className = "note";
  told.textContent = text;
  said.after(told);
  told.scrollIntoView({ block: "end" });
}

function warn(text) {
  alertLine.textContent = text;
  alertLine.hidden = !text;
}

function body(text) {
  const system = byId("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  return {
    model: byId("model").value,
    messages: [...first, ...turns, { role: "user", content: text }],
    temperature: byId("temperature").valueAsNumber,
    max_tokens: byId("most").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function say(text) {
  const mine = (running = new AbortController());
  const [began, asked] = [performance.now(), body(text)];
  const facts = { usage: null, first: null, cached: false };
  warn("");
  busy(true);
  line("user", text);
  const said = line("assistant", "");
  said.classList.add("coming");
  let trouble = "";
  try {
    for await (const piece of ask(asked, mine.signal, facts)) {
      facts.first ??= performance.now();
      said.textContent += piece;
      if (isAtEnd()) said.scrollIntoView({ block: "end" });
    }
  } catch (problem) {
    trouble = mine.signal.aborted ? "stopped" : problem.message;
    if (problem instanceof Refused) open(problem.message);
    else if (!mine.signal.aborted) warn(problem.message);
  }
  said.classList.remove("coming");
  if (running !== mine) return; // a new chat has begun meanwhile
  running = null;
  busy(false);
  // A question without an answer would stand twice in a row with the next one: not every model's
  // template takes that.
  const answer = said.textContent;
  if (answer) turns.push({ role: "user", content: text }, { role: "assistant", content: answer });
  else if (trouble) byId("text").value ||= text;
  note(said, trouble || summary(facts, began));
}

const isAtEnd = () => innerHeight + scrollY > document.body.scrollHeight - 120;

function summary({ usage, first, cached }, began) {
  const told = usage ? [`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`] : [];
  if (first) told.push(`first after ${Math.round(first - began)} ms`);
  const wrote_s = (performance.now() - first) / 1000;
  if (usage && first && usage.completion_tokens > 1 && !cached)
    told.push(`${((usage.completion_tokens - 1) / wrote_s).toFixed(1)} tokens/s`);
  if (cached) told.push("from the cache");
  return told.join(" · ");
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
}

function anew() {
  running?.abort();
  running = null;
  turns = [];
  log.replaceChildren();
  warn("");
  busy(false);
  byId("text").focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId("key");
  const given = input.value.trim();
  // A header takes no other characters, and no key of ours has any.
  if (!/^[\x21-\x7e]+$/.test(given)) return closed("This cannot be a key.");
  key.set(given);
  input.value = "";
  byId("key-error").textContent = "";
  return open();
});

byId("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId("text");
  const text = input.value.trim();
  if (!text || running) return;
  if (byId("settings").querySelector("input:invalid")) {
    warn("The temperature is 0 to 2, and the most tokens a whole number.");
    return;
  }
  input.value = "";
  say(text);
});

byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("say").requestSubmit();
});

byId("stop").addEventListener("click", () => running?.abort());
byId("anew").addEventListener("click", anew);
byId("forget").addEventListener("click", () => {
  key.forget();
  anew();
  open();
});
open();
