// The model's HTTP API with the key of this tab. The key is in a header only: URLs end up in logs.

const NAME = "manta-api-key";

export const key = {
  get: () => sessionStorage.getItem(NAME),
  set: (value) => sessionStorage.setItem(NAME, value),
  forget: () => sessionStorage.removeItem(NAME),
};

/** The key is missing, unknown or over. */
export class Refused extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    // Relative: the application may have a route prefix.
    answer = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server is not reachable.");
  }
  if (!answer.ok) throw await problem(answer);
  return answer;
}

async function problem(answer) {
  const told = await answer.json().catch(() => ({}));
  const why = told.error?.message ?? told.message ?? `the server answered ${answer.status}`;
  if (answer.status === 401) return new Refused(why);
  const later = answer.headers.get("retry-after");
  return new Error(later && !why.includes("try again") ? `${why}; try again in ${later} s` : why);
}

/** Names of the models that are served. */
export async function models() {
  const { data } = await (await call("v1/models")).json();
  return data.map((model) => model.id);
}

/** The texts of a streamed answer, one after the other; `facts` learns use and cache. */
export async function* ask(body, signal, facts) {
  const answer = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  facts.cached = answer.headers.get("x-manta-cache") === "hit";
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message ?? "The model failed.");
    facts.usage = event.usage ?? facts.usage;
    const text = event.choices?.[0]?.delta?.content;
    if (text) yield text;
  }
  throw new Error("The answer was cut short.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
