// The panel Publish: a notification, its answer, who has got it, and the same request for a shell.

import { BASE, Refusal, key, read, request, segment } from "./api.js";
import { byId, count, el, names, number, say } from "./elements.js";
import { Mistake, checkObject, compact } from "./json.js";
import { json, row } from "./notification.js";

const FIELDS = ["message", "type", "data", "topics", "users", "clients"];
const AUDIENCES = ["topics", "users", "clients"];
// While clients have yet to get it, their number is asked for after these pauses.
const PAUSES_MS = [150, 350, 500, 1000, 2000, 4000, 8000, 16_000, 30_000];

const field = (name) => byId(`publish-${name}`);
const errorOf = (name) => byId(`publish-${name}-error`);
const form = byId("publish-form");

let links = {};
let attempt = { body: "", key: "" }; // the last request: the same again has the same Idempotency-Key
let published = ""; // the id of the answer that is shown

export const start = (known) => (links = known);

// --- the request

/** Return the request's body. Data stands in it as it was typed: a number in JavaScript has 53 bits. */
function body() {
  const parts = [`"message":${JSON.stringify(field("message").value)}`];
  if (field("type").value.trim()) parts.push(`"type":${JSON.stringify(field("type").value.trim())}`);
  if (field("data").value.trim()) parts.push(`"data":${compact(field("data").value)}`);
  for (const name of AUDIENCES) {
    const named = names(field(name).value);
    if (named.length) parts.push(`"${name}":${JSON.stringify(named)}`);
  }
  return `{${parts.join(",")}}`;
}

/** Return a text as one word of a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl() {
  const lines = [`curl ${quoted(new URL("notify", BASE).href)}`];
  if (key.get()) lines.push(`-H "Authorization: Bearer $NOTIFYD_KEY"`);
  lines.push(`-H 'Content-Type: application/json'`, `-d ${quoted(body())}`);
  return lines.join(" \\\n  ");
}

const listed = (all) => (all.length < 4 ? all.join(", ") : `${all.slice(0, 3).join(", ")} and ${all.length - 3} more`);

function preview() {
  const [topics, users, clients] = AUDIENCES.map((name) => names(field(name).value));
  const whom = [
    topics.length && `those who follow ${listed(topics)}`,
    users.length && `all clients of ${listed(users)}`,
    clients.length && `the client${clients.length === 1 ? "" : "s"} ${listed(clients)}`,
  ].filter(Boolean);
  say(
    byId("publish-for"),
    whom.length ? `For ${whom.join(", and for ")}. Commas separate names.` : "For everyone who is connected.",
  );
  say(byId("publish-curl"), curl());
}

// --- mistakes, each at its field

function wrong(name, text) {
  say(errorOf(name), text);
  if (text) field(name).setAttribute("aria-invalid", "true");
  else field(name).removeAttribute("aria-invalid");
}

/** Return the mistake in Data, and show its place. */
function mistakeInData() {
  const text = field("data").value;
  const place = byId("publish-data-place");
  place.hidden = true;
  if (!text.trim()) return null;
  try {
    checkObject(text);
    return null;
  } catch (mistake) {
    if (!(mistake instanceof Mistake)) throw mistake;
    wrong("data", `Line ${mistake.line}, column ${mistake.column}: ${mistake.message}`);
    // Of a long line, the part around the mistake.
    const from = Math.max(0, mistake.column - 31);
    const before = mistake.shown.slice(from, mistake.column - 1).replaceAll("\t", " ");
    const after = mistake.shown.slice(mistake.column - 1, mistake.column + 30);
    place.textContent = `${before}${after}\n${" ".repeat(before.length)}^`;
    place.hidden = false;
    return mistake;
  }
}

/** Check the fields as far as a page can, and go to the first mistake. */
function check() {
  for (const name of FIELDS) wrong(name, "");
  say(byId("publish-error"), "");
  const mistake = mistakeInData();
  if (!field("message").value) wrong("message", "Write a message: it has 1 to 8,192 characters.");
  const first = FIELDS.find((name) => field(name).hasAttribute("aria-invalid"));
  if (!first) return true;
  field(first).focus();
  if (first === "data") field("data").setSelectionRange(mistake.at, mistake.at + 1);
  return false;
}

/** Show a refusal at the field that it names: "topics[0]: expected ...". */
function refused(refusal) {
  const [, name, rest] = /^(\w+)(?:\[\d+\])?: (.*)/s.exec(refusal.reason ?? "") ?? [];
  if (FIELDS.includes(name)) {
    wrong(name, rest);
    field(name).focus();
  } else {
    say(byId("publish-error"), refusal.message);
  }
}

// --- publishing

async function publish() {
  if (!check()) return;
  const text = body();
  if (attempt.body !== text) attempt = { body: text, key: newKey() };
  const button = byId("publish-send");
  button.setAttribute("aria-disabled", "true");
  try {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": attempt.key };
    const response = await request("notify", { method: "POST", headers, body: text });
    attempt = { body: "", key: "" };
    await answered(response);
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    refused(refusal);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

/** Return a new Idempotency-Key; randomUUID() is for pages of localhost and https alone. */
const newKey = () => `console-${[...crypto.getRandomValues(new Uint32Array(4))].join("-")}`;

async function answered(response) {
  published = response.headers.get("Notification-Id");
  const answer = await response.json();
  const { recipients } = answer;
  const mine = published;
  const whom = recipients
    ? `It is for ${count(recipients, "connected client")}.`
    : "Nobody whom it is for is connected: the log keeps it for those who come back.";
  byId("publish-answer").replaceChildren(
    el("p.good", {}, el("strong", {}, "Published."), ` ${whom}`),
    el("div", { id: "publish-arrived" }),
  );
  const delivery = el("dl.figures.small", { id: "publish-delivery" });
  const fields = el("dl.pairs", {}, el("dt", {}, "Id"), el("dd", {}, el("code", {}, mine)));
  const whole = el("details", {}, el("summary", {}, "JSON"), json(answer, "answer"));
  byId("publish-body").replaceChildren(delivery, fields, whole);
  showArrival();
  if (!links.notifications_id) return;
  for (const pause of PAUSES_MS) {
    await new Promise((done) => setTimeout(done, pause));
    if (published !== mine) return;
    try {
      const { delivery: counts } = await read(`notifications/${segment(mine)}`);
      figures(delivery, counts);
      if (!counts.pending) return;
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      return; // without the right to know, the answer says how many it is for
    }
  }
}

const DELIVERY = { addressed: "Addressed", written: "Written", acknowledged: "Acknowledged", pending: "Pending" };

/** Show the counts of a delivery; one that nobody has counted is null. */
export function figures(place, delivery) {
  place.replaceChildren(
    ...Object.entries(DELIVERY).map(([name, label]) =>
      el("div", {}, el("dt", {}, label), el("dd", {}, delivery[name] === null ? "unknown" : number(delivery[name]))),
    ),
  );
}

// --- the notification itself, as this page's own client gets it

const arrivals = new Map();

addEventListener("arrived", ({ detail }) => {
  const { id } = detail;
  arrivals.set(id, detail);
  if (arrivals.size > 100) arrivals.delete(arrivals.keys().next().value);
  if (id === published) showArrival();
});

function showArrival() {
  const place = byId("publish-arrived");
  if (!place || !arrivals.has(published) || place.firstChild) return;
  const link = el("a", { href: "#live" }, "Live");
  place.append(
    el("p", {}, "It has arrived here, and stands in ", link, ":"),
    el("ol.rows", { role: "list" }, row(arrivals.get(published))),
  );
}

// --- the panel

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("publish-send").getAttribute("aria-disabled") !== "true") publish();
});
form.addEventListener("input", ({ target }) => {
  const name = target.id.replace("publish-", "");
  wrong(name, "");
  if (name === "data") byId("publish-data-place").hidden = true;
  preview();
});
// Ctrl+Enter publishes from within a text of several lines.
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
field("data").addEventListener("change", mistakeInData);
byId("publish-copy").addEventListener("click", async () => {
  const said = byId("publish-copied");
  try {
    await navigator.clipboard.writeText(curl());
    say(said, key.get() ? "Copied. Put your key or token into NOTIFYD_KEY." : "Copied.");
  } catch {
    // A page without TLS, but for localhost, has no clipboard.
    getSelection().selectAllChildren(byId("publish-curl"));
    say(said, "Selected: copy it with Ctrl+C.");
  }
  setTimeout(() => say(said, ""), 6000);
});

export const show = preview;
export const hide = () => {};
