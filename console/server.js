// The panel Server, and the state of the server that every panel shows: away, draining, without its store.

import { Refusal, read, request } from "./api.js";
import { byId, count, el, number, say, span } from "./elements.js";
import { Plot } from "./plot.js";

const OPEN_MS = 2000;
const CLOSED_MS = 10_000; // so that the plots have a past when the panel is opened

let links = {};
let isStopped = true; // nobody may see anything
let isVisible = false;
let timer;
let before; // the metrics of the last time, with their second
let isWell = true; // it answers, and does not drain
let mayRead = true; // whether the key has the right to the figures
let remaining = 0; // clients before the drain

const plots = {
  clients: new Plot("Clients"),
  deliveries: new Plot("Deliveries a second"),
  published: new Plot("Publishes a second"),
  behind: new Plot("Clients with a backlog"),
  store: new Plot("Milliseconds until a publish is in the log"),
  log: new Plot("Notifications in memory"),
};

export function start(known) {
  links = known;
  mayRead = true;
  isStopped = false;
  byId("server-plots").replaceChildren(...Object.values(plots).map((plot) => plot.element));
  poll();
}

export function stop() {
  isStopped = true;
  clearTimeout(timer);
}

/** Ask now, since something has happened. */
export function poll() {
  if (isStopped) return;
  clearTimeout(timer);
  timer = setTimeout(async () => {
    timer = undefined;
    try {
      await state();
      await metrics();
    } finally {
      if (!isStopped) timer ??= setTimeout(poll, isVisible || !isWell ? OPEN_MS : CLOSED_MS);
    }
  });
}

// --- the state of the server

const STATES = { healthy: "running", running: "running", shutting_down: "shutting down", unhealthy: "store away" };

async function state() {
  try {
    // In a drain /status answers 200 and /health 503, which a browser shows as an error in its console.
    const status = links.status && mayRead ? await statusNow() : null;
    if (status?.server.status === "shutting_down") return tell(status.server.status, status.connections);
    const { status: name, message, connections } = await (await request("health", { taken: [503] })).json();
    tell(name, connections, message);
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    isWell = refusal.status !== 0;
    figure("State", isWell ? "unknown" : "away");
    figure("Store", "unknown");
    // What every panel says by itself needs no banner.
    banner(isWell ? "" : refusal.message);
  }
}

async function statusNow() {
  try {
    const status = await read("status", { limit: 0 });
    settings(status);
    return status;
  } catch (refusal) {
    if (refusal.status === 0) throw refusal;
    if (refusal.status === 403) mayRead = false;
    return null;
  }
}

function tell(status, { active, total, max_allowed: most }, message) {
  isWell = STATES[status] === "running";
  figure("State", STATES[status] ?? status);
  figure("Store", status === "unhealthy" ? "away" : "answers");
  figure("Clients", `${number(active)} of ${number(most)}`);
  figure("Clients in all", number(total));
  if (status === "shutting_down") {
    remaining = Math.max(remaining, active);
    banner("The server is shutting down: it takes no notifications and no new clients.");
    drain(active);
  } else {
    remaining = active;
    banner(
      status === "unhealthy"
        ? `${message.replace(/\.?$/, ".")} Notifications are refused until it is back; clients stay connected.`
        : "",
    );
  }
}

/** Show a text above every panel. It is read out, so nothing in it changes every second. */
function banner(text) {
  say(byId("banner"), text);
  byId("drain").hidden = true;
}

function drain(active) {
  const place = byId("drain");
  say(
    place.querySelector("p"),
    active ? `${number(active)} of ${count(remaining, "client")} still connected.` : "No client is connected any more.",
  );
  const bar = place.querySelector("progress");
  bar.max = Math.max(remaining, 1);
  bar.value = bar.max - active;
  place.hidden = false;
}

// --- the figures

/** Return the metrics in Prometheus' text format by name; of one with labels, the sum. */
function parsed(text) {
  const found = {};
  for (const [, name, value] of text.matchAll(/^([a-z_:][\w:]*)(?:\{.*\})? (\S+)$/gim))
    found[name] = (found[name] ?? 0) + Number(value);
  return found;
}

const NO_RIGHT = "The figures need a key, or a token with the right “admin”.";

const bytes = (value) =>
  value < 1e3
    ? `${value} B`
    : value < 1e6
      ? `${number(Math.round(value / 1e3))} kB`
      : `${number(Math.round(value / 1e5) / 10)} MB`;

async function metrics() {
  const second = Date.now() / 1000;
  if (!links.metrics_prometheus) {
    return say(
      byId("server-note"),
      "The figures are on a separate port of this server (internal_port), and not on this one. Open this page there.",
    );
  }
  if (!mayRead) return say(byId("server-note"), NO_RIGHT);
  try {
    const now = parsed(await (await request("metrics/prometheus", { headers: { Accept: "*/*" } })).text());
    say(byId("server-note"), "");
    draw(second, now);
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    before = undefined;
    for (const plot of Object.values(plots)) plot.add(second, null);
    // That the server is away stands above already.
    say(byId("server-note"), refusal.status ? refusal.message : "");
  }
}

function draw(second, now) {
  const rate = (name) => {
    const more = before ? now[name] - before.metrics[name] : NaN;
    return more >= 0 ? more / (second - before.second) : null; // fewer: it has started anew
  };
  const spent = rate("notifyd_process_publish_duration_seconds_sum");
  const publishes = rate("notifyd_process_publish_duration_seconds_count");
  plots.clients.add(second, now.websocket_active_connections);
  plots.deliveries.add(second, rate("websocket_notifications_sent"));
  plots.published.add(second, rate("notifyd_notifications_published_total"));
  plots.behind.add(second, now.notifyd_clients_behind);
  // The mean of those since the last time.
  plots.store.add(second, publishes > 0 && spent !== null ? (1000 * spent) / publishes : null);
  plots.log.add(second, now.notifyd_log_notifications);
  figure("Deliveries", number(now.websocket_notifications_sent));
  figure("Published", number(now.notifyd_notifications_published_total));
  figure("Largest backlog", number(now.notifyd_largest_backlog_notifications));
  figure("Slow clients closed", number(now.notifyd_slow_consumers_total));
  figure("In memory, with test ones", number(now.notifyd_log_notifications));
  figure("Log in memory", bytes(now.notifyd_log_bytes));
  figure("Up for", span(now.websocket_server_uptime_seconds));
  before = { second, metrics: now };
}

/** Show a figure under its name. */
function figure(name, value) {
  const list = byId("server-figures");
  let place = list.querySelector(`[data-name="${name}"]`);
  if (!place) {
    place = el("dd", { "data-name": name });
    list.append(el("div", {}, el("dt", {}, name), place));
  }
  say(place, value);
}

function settings({ server, shutdown, configuration, notification_service: service }) {
  const list = byId("server-settings");
  if (!list.hidden) return;
  const pairs = {
    version: server.version,
    started: new Date(server.start_time).toLocaleString(),
    ...configuration,
    notification_interval: service.notification_interval,
    shutdown_timeout: shutdown.shutdown_timeout,
  };
  list
    .querySelector("dl")
    .replaceChildren(
      ...Object.entries(pairs).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
    );
  list.hidden = false;
}

// The connection is lost, or the server says that it ends.
addEventListener("unsettled", poll);

// --- the panel

export function show() {
  isVisible = true;
  poll();
}

export function hide() {
  isVisible = false;
}
