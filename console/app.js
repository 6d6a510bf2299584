// The page: its panels, and the key without which it shows nothing where the server asks for one.

import { BASE, Refusal, key, read, request } from "./api.js";
import { byId, say } from "./elements.js";
import * as clients from "./clients.js";
import * as history from "./history.js";
import * as live from "./live.js";
import * as publish from "./publish.js";
import * as server from "./server.js";

const RETRY_MS = 2000;
const PANELS = { live, publish, clients, history, server };
// The route without which a panel has nothing to show: the internal port has some of them, the main port the others.
const NEEDS = { live: "ws", publish: "notify", clients: "clients", history: "notifications" };
// Where a link within the page leads the focus; other links lead to the tab.
const FIRST_FIELD = { publish: "publish-message" };

let links = {};
let open = ""; // the name of the panel that is shown
let isStarted = false;
let isLocked = false;

const tabs = Object.keys(PANELS).map((name) => byId(`tab-${name}`));

// --- panels

function select(name) {
  document.body.dataset.ready = "";
  for (const tab of tabs) {
    const isChosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !isChosen || isLocked;
  }
  if (name === open || !isStarted || isLocked) return;
  PANELS[open]?.hide();
  open = name;
  document.title = `${byId(`tab-${name}`).textContent} · notifyd`;
  if (!byId(name).classList.contains("absent")) PANELS[name].show();
}

const named = () => (location.hash.slice(1) in PANELS ? location.hash.slice(1) : "live");

function go(name) {
  // Not by location.hash, which scrolls.
  if (location.hash !== `#${name}`) window.history.pushState(null, "", `#${name}`);
  select(name);
}

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => go(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 };
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = tabs[(steps[event.key] + tabs.length) % tabs.length];
    next.focus();
    go(next.getAttribute("aria-controls"));
  });
}

// A link within the page, or the browser's back.
addEventListener("hashchange", () => {
  if (!(location.hash.slice(1) in PANELS)) return;
  select(named());
  if (!isLocked) byId(FIRST_FIELD[named()] ?? `tab-${named()}`).focus();
});
addEventListener("popstate", () => select(named()));

// --- the key

async function unlock() {
  try {
    // A path that needs a right; the internal port has no log.
    if (key.get()) await read(...(links.notifications ? ["notifications", { limit: 1 }] : ["status", { limit: 0 }]));
    else if (await needsKey()) return lock("");
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    if (refusal.status === 401) return; // the request has told it already
    if (!key.get()) {
      say(byId("connection"), refusal.message);
      setTimeout(unlock, refusal.wait * 1000 || RETRY_MS);
      return;
    }
    // 403 is a token with fewer rights. Every other refusal has its place in the panels.
  }
  const wasLocked = isLocked;
  isStarted = true;
  isLocked = false;
  byId("gate").hidden = true;
  byId("leave").hidden = !key.get();
  byId("tabs").hidden = false;
  select(named());
  // The form that had the focus is gone.
  if (wasLocked) byId(`tab-${named()}`).focus();
  if (links.ws) live.connect();
  else byId("connection").hidden = true;
  server.start(links);
}

/** Whether the server lets nobody in without a key: as its contract says, since a 401 is an error in the console. */
async function needsKey() {
  const { paths } = await read("openapi.json");
  if (!(paths["/notifications"] ?? paths["/status"]).get.security) return false;
  // A host's own authentication may know the browser, by a cookie. A refused WebSocket is no error in the console.
  return !paths["/events"]?.get.security || !(await isWelcome());
}

const isWelcome = () =>
  new Promise((tell) => {
    const socket = new WebSocket(new URL("ws", BASE.href.replace(/^http/, "ws")));
    socket.onclose = () => tell(false);
    socket.onmessage = () => {
      tell(true);
      socket.close();
    };
  });

addEventListener("locked", ({ detail }) => lock(detail.message));

/** Show nothing but the form for a key, and the reason. */
function lock(reason) {
  if (!key.get() && isLocked) return;
  const had = key.get();
  key.forget();
  isLocked = true;
  PANELS[open]?.hide();
  open = "";
  live.disconnect();
  server.stop();
  for (const name of Object.keys(PANELS)) byId(name).hidden = true;
  byId("tabs").hidden = true;
  byId("leave").hidden = true;
  const shown = byId("connection");
  shown.dataset.state = "closed";
  say(shown, "Not connected");
  say(byId("key-error"), had ? reason : "");
  byId("gate").hidden = false;
  byId("key").focus();
}

byId("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = byId("key").value.trim();
  byId("key").value = "";
  if (/[^\x21-\x7e]/.test(typed))
    return say(byId("key-error"), "A key or token has no spaces and no letters beyond ASCII. Type it again.");
  key.set(typed);
  unlock();
});

byId("leave").addEventListener("click", () => {
  key.forget();
  // Nothing that was shown stays.
  location.reload();
});

// --- the beginning

async function begin() {
  try {
    const index = await (await request("")).json();
    links = index.links;
    say(byId("version"), index.version);
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    say(byId("connection"), refusal.message);
    setTimeout(begin, RETRY_MS);
    return;
  }
  for (const [name, needed] of Object.entries(NEEDS)) {
    if (links[needed]) continue;
    byId(name).classList.add("absent");
    byId(name).replaceChildren(byId(name).querySelector("h2"), absence());
  }
  publish.start(links);
  history.start(links);
  await unlock();
}

function absence() {
  const text = document.createElement("p");
  text.className = "empty";
  text.textContent = links.ws
    ? "This is on a separate port of the server (internal_port). Open this page there."
    : "This is on the main port of the server. This one has its figures and its clients.";
  return text;
}

select(named());
begin();
