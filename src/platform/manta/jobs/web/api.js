// The HTTP API with the key of this tab. The key is in a header only: URLs end up in logs.

const KEY = "manta-key";
const PATIENCE_MS = 10_000;

/** The server does not answer, or not as one that works. */
export class Unreachable extends Error {}

/** The key is none of the server's. */
export class Refused extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** GET as JSON; `params` without the empty ones. */
export async function get(path, params = {}) {
  return (await ask(path, params)).json();
}

/** Bytes of a log, and the offset of the first of them. */
export async function getLog(jobId, params) {
  const answer = await ask(`jobs/${encodeURIComponent(jobId)}/log`, params);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  return { bytes, offset: Number(answer.headers.get("X-Log-Offset")) };
}

async function ask(path, params) {
  const given = Object.entries(params).filter(([, value]) => value !== "" && value != null);
  const query = new URLSearchParams(given.map(([name, value]) => [name, String(value)]));
  const answer = await reach(`api/v1/${path}?${query}`);
  if (answer.status === 401) throw new Refused("The queue does not know this key.");
  if (answer.status >= 500) throw new Unreachable(await reason(answer));
  if (!answer.ok) throw new Error(await reason(answer));
  return answer;
}

async function reach(url) {
  try {
    return await fetch(url, {
      headers: { Authorization: `Bearer ${key.get()}` },
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
  } catch (error) {
    throw new Unreachable(error.message);
  }
}

async function reason(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `the server answered ${answer.status}`;
  }
}
