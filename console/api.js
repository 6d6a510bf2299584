// Requests to the server that serves this page, with the key that was typed in. The key stands in a header, never in a
// URL, and sessionStorage keeps it until the tab is closed.
//
// Addresses are relative to the page: so they are right under a mount, and behind a proxy that has its own prefix.

export const BASE = new URL(".", document.baseURI);
const storage = storageHere();
// By the path of the page: several servers can be mounted at one origin.
const PLACE = `notifyd.key ${BASE.pathname}`;

export const key = {
  get: () => storage.getItem(PLACE) ?? "",
  set: (value) => storage.setItem(PLACE, value),
  forget: () => storage.removeItem(PLACE),
};

/** Return sessionStorage, or the page's memory in a browser that keeps nothing for pages. */
function storageHere() {
  try {
    return sessionStorage;
  } catch {
    const held = new Map();
    return {
      getItem: (name) => held.get(name),
      setItem: (name, value) => held.set(name, value),
      removeItem: (name) => held.delete(name),
    };
  }
}

/** A request that was refused, or not answered (status 0). Its message says what to do. */
export class Refusal extends Error {
  constructor(status, reason, wait) {
    super(advice(status, reason, wait));
    this.status = status;
    this.reason = reason;
    this.wait = wait; // seconds until the same request may succeed, where the server says it
  }
}

function advice(status, reason, wait) {
  const said = reason.replace(/\.?$/, ".");
  if (status === 0) return "The server does not answer. Is it running? The page goes on by itself once it is back.";
  if (status === 401 && /^Invalid token/.test(reason))
    return "The server does not know this key or token. Type another.";
  if (status === 401) return `${said} Type another key or token.`;
  if (status === 403 && /needs admin/.test(reason)) return "This needs a key, or a token with the right “admin”.";
  if (status === 403 && /to publish$/.test(reason))
    return "Publishing needs a key, or a token with the right “publish”.";
  if (status === 403) return `${said} Use a key, or a token that allows it.`;
  if (status === 429) return `${said} Wait ${wait} s, then try again.`;
  if (status === 503 && /shutting down/i.test(reason)) return "The server is shutting down. Try again once it is back.";
  if (status === 503) return `${said} Try again in ${wait} s.`;
  return said;
}

/** Return the answer to a request. Throws a Refusal for every status but 2xx and those in `taken`. */
export async function request(path, { method = "GET", parameters = {}, headers = {}, body, taken = [] } = {}) {
  const url = new URL(path, BASE);
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== "" && value != null) url.searchParams.set(name, value);
  }
  const secret = key.get();
  const sent = { Accept: "application/json", ...(secret && { Authorization: `Bearer ${secret}` }), ...headers };
  let response;
  try {
    response = await fetch(url, { method, headers: sent, body, cache: "no-store" });
  } catch {
    throw new Refusal(0, "");
  }
  if (response.ok || taken.includes(response.status)) return response;
  const text = await response.text();
  let reason = `${response.status} ${response.statusText}`;
  try {
    reason = JSON.parse(text).error.message;
  } catch {
    // The answer of a proxy.
  }
  const refusal = new Refusal(response.status, reason, Number(response.headers.get("Retry-After")) || 5);
  if (response.status === 401) dispatchEvent(new CustomEvent("locked", { detail: refusal }));
  throw refusal;
}

export const read = async (path, parameters) => (await request(path, { parameters })).json();

/** Return a value as one segment of a path. */
export const segment = encodeURIComponent;
