// The panel History: the log, newest first, and who has got a notification.

import { Refusal, read, segment } from "./api.js";
import { byId, count, el, named, say } from "./elements.js";
import { row } from "./notification.js";
import { figures } from "./publish.js";

const PAGE = 50;
const WHO = 100; // clients of a state that are named

const list = byId("history-list");
let links = {};
let chosen = {}; // of the fields, when Show was pressed
let position = ""; // `before` of the next page
let isShown = false;

export const start = (known) => (links = known);

/** Return an id that lies at a time: ids are UUIDv7, whose first 48 bits are milliseconds. */
function idAt(time) {
  const hex = Math.max(0, time.getTime()).toString(16).padStart(12, "0");
  return `${hex.slice(0, 8)}-${hex.slice(8)}-7000-8000-000000000000`;
}

const timeIn = (id) => (byId(id).value ? new Date(byId(id).value) : null);

async function begin() {
  const [from, until] = [timeIn("history-from"), timeIn("history-until")];
  if (from && until && from > until) return say(byId("history-error"), "From: this time is after Until.");
  chosen = { topics: byId("history-topics").value.trim(), user: byId("history-user").value.trim(), from };
  position = until ? idAt(until) : "";
  list.replaceChildren();
  await older();
}

/** Show the next page. */
async function older() {
  const mine = chosen;
  const { topics, user, from } = chosen;
  try {
    const parameters = { order: "desc", limit: PAGE, before: position, topics, user };
    const { notifications, position: next, complete } = await read("notifications", parameters);
    if (mine !== chosen) return;
    const found = from ? notifications.filter(({ timestamp }) => new Date(timestamp) >= from) : notifications;
    const first = list.children.length;
    list.append(...found.map((each) => row(each, links.notifications_id && whoGotIt)));
    position = next;
    const isEnd = notifications.length < PAGE || found.length < notifications.length;
    const hadFocus = document.activeElement === byId("history-older");
    byId("history-older").hidden = isEnd;
    byId("history-empty").hidden = list.children.length > 0;
    say(byId("history-error"), "");
    const lost = isEnd && !complete && !from ? " Older ones have left the log." : "";
    say(
      byId("history-note"),
      list.children.length ? `${count(list.children.length, "notification")}${isEnd ? "" : ", and more"}.${lost}` : "",
    );
    // Reading goes on at the first that is new.
    if (hadFocus) list.children[Math.min(first, list.children.length - 1)]?.querySelector("summary").focus();
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    say(byId("history-error"), refusal.message);
  }
}

// --- who has got it

const STATES = ["acknowledged", "written", "pending"];

/** Return the delivery of a notification, as soon as it is there. */
function whoGotIt({ id }) {
  const place = el("div.who", { role: "status" });
  ask(place, id).catch((refusal) => {
    if (!(refusal instanceof Refusal)) throw refusal;
    if (refusal.status !== 404) place.append(el("p.error", {}, refusal.message));
  });
  return place;
}

async function ask(place, id) {
  const { delivery } = await read(`notifications/${segment(id)}`);
  const counts = el("dl.figures.small");
  figures(counts, delivery);
  place.replaceChildren(counts);
  if (!links.notifications_id_clients) return;
  const states = await Promise.all(
    STATES.map((state) => read(`notifications/${segment(id)}/clients`, { state, limit: WHO })),
  );
  for (const [number, { clients, next }] of states.entries()) {
    if (!clients.length) continue;
    const items = clients.map(({ client_id: client, user }) =>
      el("li", {}, el("code", {}, client), ...(user ? [" of ", named(user)] : [])),
    );
    const title = STATES[number][0].toUpperCase() + STATES[number].slice(1);
    place.append(el("h3", {}, `${title}${next ? `, the first ${WHO}` : ""}`), el("ul", {}, ...items));
  }
}

// --- the panel

export function show() {
  // Once: later by Show, so that nobody loses the place.
  if (!isShown) begin();
  isShown = true;
}

export const hide = () => {};

byId("history-form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
byId("history-older").addEventListener("click", older);
