// The panel Clients: who is connected, on all processes of the server.

import { Refusal, read, request, segment } from "./api.js";
import { ago, byId, count, el, named, number, say, settled } from "./elements.js";

const PAGE = 1000; // clients in an answer of the server, at most
const MOST = 200; // rows, until somebody asks for more
const REFRESH_MS = 5000;

const body = byId("clients-table").tBodies[0];
const text = byId("clients-text");

let rows = new Map(); // by client_id
let most = MOST;
let own = ""; // the client of this page
let timer;
let turn = 0; // of the newest reading: an older one that is still under way gives up

addEventListener("connected", ({ detail }) => (own = detail.clientId));

const haystack = (client) =>
  [client.user, client.client_id, ...client.topics, client.user_agent, client.address].join(" ").toLowerCase();

/** Read the clients, all pages as far as they are needed, and show those that have the text; `aloud` for a person. */
async function refresh(aloud = true) {
  const mine = ++turn;
  clearTimeout(timer);
  const wanted = text.value.trim().toLowerCase();
  try {
    const found = [];
    let matches = 0;
    let after = "";
    let total = 0;
    let pages = 0;
    do {
      const page = await read("clients", { limit: wanted ? PAGE : Math.min(PAGE, most), after });
      if (mine !== turn) return;
      pages++;
      const fitting = wanted ? page.clients.filter((client) => haystack(client).includes(wanted)) : page.clients;
      matches += fitting.length;
      found.push(...fitting.slice(0, most - found.length));
      ({ total, next: after } = page);
    } while (after && (wanted || found.length < most));
    say(byId("clients-error"), "");
    draw(found, total, wanted ? matches : total, wanted);
    if (aloud) say(byId("clients-said"), byId("clients-note").textContent);
    timer = setTimeout(refresh, REFRESH_MS * pages, false);
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    if (mine !== turn) return;
    say(byId("clients-error"), refusal.message);
    if (refusal.status === 403) draw([], 0, 0, "");
    else timer = setTimeout(refresh, REFRESH_MS, false);
  }
}

/** Show these clients; a row that is there already stays, with the focus in it. */
function draw(found, total, matches, wanted) {
  const before = rows;
  rows = new Map(found.map((client) => [client.client_id, before.get(client.client_id) ?? newRow(client)]));
  for (const client of found) update(rows.get(client.client_id), client);
  const wantedRows = [...rows.values()];
  for (const [id, row] of before) if (!rows.has(id)) row.remove();
  wantedRows.forEach(
    (row, place) => body.children[place] !== row && body.insertBefore(row, body.children[place] ?? null),
  );
  const shown = found.length < matches ? `, ${number(found.length)} shown` : "";
  say(
    byId("clients-note"),
    wanted ? `${number(matches)} of ${count(total, "client")}${shown}` : `${count(total, "client")} connected${shown}`,
  );
  byId("clients-table").hidden = !found.length;
  byId("clients-more").hidden = found.length >= matches;
  const empty = byId("clients-empty");
  empty.hidden = found.length > 0 || byId("clients-error").textContent !== "";
  say(
    empty,
    wanted
      ? "No client has this text."
      : "Nobody is connected. A client connects with: curl -N " + new URL("events", document.baseURI).href,
  );
}

const LABELS = ["User", "Client", "Topics", "Connected", "Last heard", "Agent"];

function newRow(client) {
  const cells = LABELS.map((label) =>
    el(label === "Client" ? "th" : "td", {
      role: label === "Client" ? "rowheader" : "cell",
      scope: label === "Client" && "row",
      "data-label": label,
    }),
  );
  const id = `client-${client.client_id}`;
  cells[1].id = id;
  const button = el("button", { type: "button", "aria-describedby": id }, "Disconnect");
  return el("tr", { role: "row" }, ...cells, el("td.act", { role: "cell" }, button));
}

function update(row, client) {
  const [user, id, topics, since, heard, agent] = row.cells;
  say(user, client.user === null ? "nobody" : named(client.user));
  user.classList.toggle("faint", client.user === null);
  if (!id.firstChild)
    id.append(el("code", {}, client.client_id), el("span.tag", { hidden: true }, "this page"), el("small"));
  id.querySelector(".tag").hidden = client.client_id !== own;
  // A newer connection may have taken the id over.
  const transport = client.transport === "sse" ? "stream" : client.transport;
  say(id.querySelector("small"), [transport, client.address].filter(Boolean).join(" · "));
  row.querySelector("button").onclick = () => ask(client);
  say(topics, ...client.topics.flatMap((topic) => [el("span.topic", {}, named(topic)), " "]));
  since.replaceChildren(ago(client.connected_at));
  heard.replaceChildren(ago(client.last_ping));
  say(agent, named(client.user_agent ?? ""));
}

// --- putting a client out

function ask(client) {
  const dialog = byId("ask");
  say(byId("ask-title"), `Disconnect ${client.client_id}?`);
  const owner = client.user === null ? [] : ["It belongs to ", named(client.user), ". "];
  const page = client.client_id === own ? "It is this page. " : "";
  const end = "It is closed for good: the clients of notifyd do not come back by themselves.";
  say(byId("ask-text"), ...owner, page, end);
  say(byId("ask-yes"), "Disconnect");
  dialog.returnValue = "";
  dialog.addEventListener("close", () => dialog.returnValue === "yes" && disconnect(client), { once: true });
  dialog.showModal();
}

async function disconnect({ client_id: id }) {
  const place = [...rows.keys()].indexOf(id);
  try {
    // Gone meanwhile is as good.
    await request(`clients/${segment(id)}`, { method: "DELETE", taken: [404] });
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    return say(byId("clients-error"), refusal.message);
  }
  await refresh(false);
  for (const place of ["clients-note", "clients-said"]) say(byId(place), `${id} is disconnected.`);
  // The button that had the focus is gone.
  const next = body.rows[Math.min(place, body.rows.length - 1)];
  (next?.querySelector("button") ?? byId("clients-refresh")).focus();
}

// --- the panel

export function show() {
  refresh();
}

export function hide() {
  turn++;
  clearTimeout(timer);
}

text.addEventListener(
  "input",
  settled(() => refresh(), 250),
);
byId("clients-refresh").addEventListener("click", () => refresh());
byId("clients-more").addEventListener("click", () => {
  most += MOST;
  refresh();
});
byId("clients")
  .querySelector("form")
  .addEventListener("submit", (event) => {
    event.preventDefault();
    refresh();
  });
