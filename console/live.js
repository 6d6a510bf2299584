// The panel Live: the page as a client, and its notifications as they arrive.
//
// 1. The page keeps the newest KEPT notifications and shows the newest SHOWN of those that fit, so an old tab is as
//    fast as a new one. Rows are made a few times a second, however many notifications come.
// 2. A screen reader hears a summary every few seconds, never each notification.

import { NotifydClient } from "../client.js";
import { BASE, Refusal, key } from "./api.js";
import { byId, count, el, named, names, number, say, settled, span, visible } from "./elements.js";
import { has, row } from "./notification.js";

const KEPT = 2000;
const SHOWN = 200;
const RENDER_MS = 200;
const SAID_MS = 6000;

let client; // of the topics below
let last = ""; // the position to go on from
let topics = [];
let lostAt = 0; // when the connection was lost, until the server has said what came meanwhile
let isVisible = false;
let unseen = 0; // arrived while another panel was open

const kept = []; // the newest last
let fresh = []; // of these, the ones without a row so far
let timer;

const list = byId("live-list");
const pause = byId("live-pause");
const isPaused = () => pause.getAttribute("aria-pressed") === "true";

// --- the connection

/** Connect, or connect again with the topics of the field; nothing between the two is missed. */
export function connect() {
  disconnect();
  const secret = key.get();
  const mine = (client = new NotifydClient(new URL("ws", BASE), {
    topics,
    since: last,
    ...(secret && { token: secret }),
    onNotification: arrived,
    onMessage: (message) => heard[message.type]?.(message.data),
    onState: (state, detail) => queueMicrotask(() => mine === client && entered(state, detail)),
  }));
}

export function disconnect() {
  last = client?.last ?? last;
  const left = client;
  client = undefined;
  left?.close();
}

const heard = { resume: resumed, shutdown: () => dispatchEvent(new CustomEvent("unsettled")) };

const STATES = {
  connecting: () => ["Connecting"],
  open: ({ clientId, user }) => [el("span", {}, `Connected as ${clientId}`, ...(user ? [" of ", named(user)] : []))],
  waiting: () => ["Connection lost, trying again"],
  closed: () => ["Not connected"],
};

function entered(state, detail) {
  const shown = byId("connection");
  if (state !== "connecting" || shown.dataset.state !== "waiting") {
    shown.dataset.state = state;
    say(shown, ...STATES[state](detail));
  }
  if (state === "open") dispatchEvent(new CustomEvent("connected", { detail }));
  if (state === "open" && !lostAt) note("");
  if (state === "waiting") {
    lostAt ||= Date.now();
    dispatchEvent(new CustomEvent("unsettled"));
    const reason = detail.reason ? `: ${detail.reason}` : "";
    note(`The connection is lost${reason}. The page connects again by itself, and then gets what it has missed.`);
  }
  if (state === "closed") ended(detail.reason);
}

function ended(reason) {
  if (/^(Token |Invalid token|Authentication required)/.test(reason)) {
    dispatchEvent(new CustomEvent("locked", { detail: new Refusal(401, reason) }));
    return;
  }
  const isAboutTopics = /topic/.test(reason);
  byId("live-topics").setAttribute("aria-invalid", isAboutTopics);
  note(
    isAboutTopics ? `${reason}. Change the topics above.` : `The server has closed the connection: ${reason}.`,
    true,
  );
}

/** Say what the connection that was lost has missed. */
function resumed({ replayed, complete }) {
  if (!lostAt) return;
  const away = span((Date.now() - lostAt) / 1000);
  lostAt = 0;
  const came = replayed
    ? `${count(replayed, "notification")} came meanwhile and ${replayed === 1 ? "is" : "are"} here now`
    : "nothing came meanwhile";
  const gap = complete ? "" : " Some may be missing: the log of the server does not reach back that far.";
  note(`Connected again after ${away}: ${came}.${gap}`);
}

/** Show a text above the list, maybe with a button that connects again. */
function note(text, canConnect = false) {
  const [place, shown] = [byId("live-note"), visible(text)];
  if (place.firstChild?.textContent === shown) return;
  place.replaceChildren(shown);
  if (canConnect) place.append(" ", el("button", { type: "button", onclick: connect }, "Connect again"));
}

// --- the notifications

function arrived(notification) {
  kept.push(notification);
  if (kept.length > KEPT) kept.splice(0, kept.length - KEPT);
  fresh.push(notification);
  if (fresh.length > KEPT) fresh = fresh.slice(-KEPT);
  dispatchEvent(new CustomEvent("arrived", { detail: notification }));
  if (!isVisible) unseen++;
  timer ??= setTimeout(render, RENDER_MS);
  tell();
}

function fits() {
  const type = byId("live-type").value.trim().toLowerCase();
  const text = byId("live-text").value.trim().toLowerCase();
  const only = byId("live-only").checked;
  return (each) =>
    (!type || each.type.toLowerCase().includes(type)) && (!only || each.topics) && (!text || has(each, text));
}

/** Show the notifications that have come since the last time. */
function render() {
  timer = undefined;
  byId("tab-live").dataset.count = unseen ? (unseen > 99 ? "99+" : unseen) : "";
  if (!isVisible || isPaused()) return summarise();
  const rows = fresh
    .filter(fits())
    .slice(-SHOWN)
    .reverse()
    .map((each) => row(each));
  fresh = [];
  // A few catch the eye; many at once would be a flicker.
  if (rows.length < 5) for (const each of rows) each.classList.add("new");
  list.prepend(...rows);
  while (list.children.length > SHOWN) {
    // A reader of the row goes on at the list, not at the top of the page.
    if (list.lastChild.contains(document.activeElement)) list.focus();
    list.lastChild.remove();
  }
  summarise();
}

/** Show all anew: the filter has changed. During a pause the ones that wait go on waiting. */
function renderAll() {
  if (!isPaused()) fresh = [];
  const seen = kept.slice(0, kept.length - fresh.length);
  list.replaceChildren(
    ...seen
      .filter(fits())
      .slice(-SHOWN)
      .reverse()
      .map((each) => row(each)),
  );
  summarise();
}

function summarise() {
  byId("live-empty").hidden = kept.length > 0;
  const shown = list.children.length;
  const parts = [];
  if (isPaused())
    parts.push(`Paused: ${fresh.length ? `${count(fresh.length, "notification")} waiting` : "nothing new"}`);
  if (kept.length)
    parts.push(
      shown < kept.length
        ? `${number(shown)} of ${count(kept.length, "notification")} shown`
        : count(kept.length, "notification"),
    );
  if (kept.length === KEPT) parts.push("older ones are in the History");
  say(byId("live-count"), parts.join(" · "));
}

// --- the summary for screen readers

let saidAt = 0;
let unsaid = 0;
let telling;

function tell() {
  unsaid++;
  telling ??= setTimeout(
    () => {
      telling = undefined;
      saidAt = Date.now();
      const { type = "", data } = kept.at(-1) ?? {};
      if (isVisible && !isPaused() && unsaid)
        byId("live-said").textContent = `${unsaid} new. The last: ${visible(type)}, ${data?.message ?? ""}`;
      unsaid = 0;
    },
    Math.max(RENDER_MS, saidAt + SAID_MS - Date.now()),
  );
}

// --- the panel

export function show() {
  isVisible = true;
  unseen = 0;
  render();
}

export function hide() {
  isVisible = false;
}

pause.addEventListener("click", () => {
  pause.setAttribute("aria-pressed", !isPaused());
  render();
});
byId("live-clear").addEventListener("click", () => {
  kept.length = fresh.length = 0;
  renderAll();
});
for (const id of ["live-type", "live-text"]) byId(id).addEventListener("input", settled(renderAll, 150));
byId("live-only").addEventListener("change", renderAll);

const follow = () => {
  const wanted = names(byId("live-topics").value);
  if (wanted.join() === topics.join()) return;
  topics = wanted;
  byId("live-topics").removeAttribute("aria-invalid");
  if (client) connect();
};
byId("live-topics").addEventListener("input", settled(follow, 600));
byId("live-topics").addEventListener("change", follow);
byId("live")
  .querySelector("form")
  .addEventListener("submit", (event) => {
    event.preventDefault();
    follow();
  });
