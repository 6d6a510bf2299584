// A WebSocket client of notifyd: one ES module without dependencies, for browsers and node.
//
//   browser   import { NotifydClient } from "./client.js"; a whole page is in index.html
//   node      node examples/listen.js [ws://localhost:8000/ws] prints every notification
//             (node before 22: node --experimental-websocket, or the option `WebSocket` from the package "ws")
//
//   const client = new NotifydClient("ws://localhost:8000/ws", {
//     topics: ["builds"],
//     onNotification: ({ type, data }) => console.log(type, data.message),
//   });
//   ...
//   client.close();
//
// It reconnects until it is closed, or until a refusal that every later attempt would get as well. After a reconnect it
// resumes where it stopped, also before its first notification, and drops duplicates.

const BASE_MS = 500; // the first delay is at most this; each failure doubles it
const CAP_MS = 30_000;
const STABLE_MS = 10_000; // a connection that lasted this long counts as a success: the next delay is short again
const IDLE_MS = 45_000; // after this much silence the client pings the server, after twice this much it gives it up

// Closes (1008) with such a reason are final: the same request would be refused again. Others are temporary:
// "Connection limit exceeded", "Client ... is already connected", "Slow consumer".
const FINAL = /^(Invalid |Query:|Unknown |Replaced by|Authentication required|Token |Not allowed|Disconnected)/;

/** Return the milliseconds to wait: anything up to a limit that doubles with each failure ("full jitter"). */
export function backoff(failures, base = BASE_MS, cap = CAP_MS) {
  return Math.random() * Math.min(cap, base * 2 ** failures);
}

export class NotifydClient {
  #socket;
  #timer; // of the reconnect while there is no socket, of the silence while there is one
  #failures = 0;
  #isAnotherLog = false; // its ids may be older than `last`, and the next is no duplicate

  /**
   * Options, all optional: clientId; user (where no token names one); topics (names); since (the id to resume from);
   * token (an API key or a JSON Web Token); onNotification(notification); onMessage(message) for the protocol's other
   * messages; onState(state, detail) with "connecting", "open" {clientId, user}, "waiting" {code, reason, delay} or
   * "closed" {code, reason}, the reason why it is closed for good; WebSocket (the class to use).
   */
  constructor(url, options = {}) {
    this.options = { WebSocket: globalThis.WebSocket, ...options };
    if (!this.options.WebSocket) throw new Error("no WebSocket here: run node --experimental-websocket, or pass one");
    this.url = new URL(url, globalThis.location?.href);
    this.url.protocol = this.url.protocol.replace("http", "ws");
    if (options.clientId) this.url.searchParams.set("client_id", options.clientId);
    if (options.user) this.url.searchParams.set("user", options.user);
    if (options.topics?.length) this.url.searchParams.set("topics", options.topics.join(","));
    // The position to resume from: the id of the last notification, or a newer one. Empty: from now on.
    this.last = options.since ?? this.url.searchParams.get("since") ?? "";
    this.#connect();
  }

  /** Close for good. */
  close() {
    if (this.state !== "closed") this.#leave("closed", { code: 1000, reason: "" });
  }

  #connect() {
    const url = new URL(this.url);
    url.searchParams.set("since", this.last);
    const { token } = this.options;
    // A browser can set no header: the token comes as a subprotocol.
    const socket = new this.options.WebSocket(url.href, ...(token ? [["bearer", token]] : []));
    let opened = Infinity;
    // Late events of a socket that was given up are ignored.
    const heard = (handler) => (event) => socket === this.#socket && handler(event);
    const lost = heard(({ code = 1006, reason = "" }) => {
      if (Date.now() - opened >= STABLE_MS) this.#failures = 0;
      if (code === 1008 && FINAL.test(reason)) return this.#leave("closed", { code, reason });
      const delay = backoff(this.#failures++);
      this.#leave("waiting", { code, reason, delay });
    });
    socket.onopen = () => (opened = Date.now());
    socket.onmessage = heard(({ data }) => {
      this.#watch(lost);
      this.#receive(JSON.parse(data));
    });
    socket.onclose = lost;
    socket.onerror = () => lost({}); // node 20 sends no close event when it cannot connect
    this.#socket = socket;
    this.#watch(lost);
    this.#enter("connecting", {});
  }

  #receive(message) {
    if (message.id !== undefined) {
      if (!this.#advance(message.id)) return; // a duplicate: ids are ordered by time
      return this.options.onNotification?.(message);
    }
    if (message.type === "ping") this.#send({ type: "pong" });
    if (message.type === "shutdown") this.#socket.close(1000); // and, as after every close, come back after a while
    if (message.type === "welcome") this.#enter("open", { clientId: message.client_id, user: message.user });
    if (message.type === "resume") {
      const { position } = message.data;
      if (!this.last) this.last = position; // nothing received yet: from here on nothing can be missed
      this.#isAnotherLog = position < this.last;
    }
    if (message.type === "position") this.#advance(message.position); // nothing for this client came before it
    this.options.onMessage?.(message);
  }

  /** Go on to an id, and return whether it is new. */
  #advance(id) {
    if (id <= this.last && !this.#isAnotherLog) return false;
    this.#isAnotherLog = false;
    this.last = id;
    return true;
  }

  #send(message) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(message));
  }

  /** Notice a server that vanished without a close. */
  #watch(lost) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#send({ type: "ping" });
      this.#timer = setTimeout(() => lost({}), IDLE_MS);
    }, IDLE_MS);
  }

  #leave(state, detail) {
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = undefined;
    socket?.close();
    if (state === "waiting") this.#timer = setTimeout(() => this.#connect(), detail.delay);
    this.#enter(state, detail);
  }

  #enter(state, detail) {
    this.state = state;
    this.options.onState?.(state, detail);
  }
}
