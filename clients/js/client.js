// The client of notifyd: one ES module without dependencies, for browsers, Node.js, Deno and Bun.
//
//   import { NotifydClient } from "/client.js";      in a page: every notifyd server has this file there
//   import { NotifydClient } from "notifyd-client";  with the npm package
//
//   const client = new NotifydClient("ws://localhost:8000/ws", {
//     topics: ["builds"],
//     onNotification: ({ type, data }) => console.log(type, data.message),
//   });
//   ...
//   client.close();
//
// It reconnects until it is closed, or until a refusal that every later attempt would get as well. After a reconnect it
// resumes where it stopped, also before its first notification, and drops duplicates. README.md has all options.

const BASE_MS = 500; // the first delay is at most this; each failure doubles it
const CAP_MS = 30_000;
const PUBLISH_CAP_MS = 10_000;
const PUBLISH_MS = 10_000; // for one attempt to publish
const MAX_RETRY_AFTER_MS = 120_000;
const STABLE_MS = 10_000; // a connection that lasted this long counts as a success: the next delay is short again
const CONNECT_MS = 20_000; // a connection that is not open by then is given up
const IDLE_MS = 45_000; // after this much silence the client pings the server, after twice this much it gives it up
const PROBE_MS = 5_000; // as long, for the answer to a ping, after the device has slept or changed networks
const ACK_MS = 250; // between two acknowledgements: the server limits how many messages come in a second
const RENEW_MS = 30_000; // before a token expires, or after four fifths of what is left of a short one
const RELEASE_MS = 1_000; // so long no other tab takes over after a final close: all of them have heard of it by then
const LONGEST_MS = 2 ** 31 - 1; // a longer timer would run out at once
const MAX_WAITING = 10_000; // messages for a handler that is busy; with more the connection ends until it has caught up

// The final closes in the table of docs/protocol.md: the same request would be refused again. Those of the code 1008
// begin with such a reason. Others are temporary: "Connection limit exceeded", "Client ... is already connected",
// "Slow consumer".
const FINAL_CODES = [1002, 1007, 1009];
const FINAL = /^(Invalid |Query:|Unknown |Replaced by|Authentication required|Token |Not allowed|Disconnected)/;
// Of these, the ones that another token may change.
const OF_TOKENS = /^(Authentication required|Invalid token|Token |Not allowed)/;

const IS_ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** Return the milliseconds to wait: anything up to a limit that doubles with each failure ("full jitter"). */
export function backoff(failures, base = BASE_MS, cap = CAP_MS) {
  return Math.random() * Math.min(cap, base * 2 ** failures);
}

/** An error answer of the server. */
export class NotifydError extends Error {
  name = "NotifydError";

  constructor(message, { status, id, category } = {}) {
    super(status ? `${status} ${message}` : message);
    this.status = status;
    this.id = id;
    this.category = category;
  }
}

// --- receiving

export class NotifydClient {
  /** The position to resume from: the id of the last notification that the handler was given, or a newer one. */
  last;
  state;
  #options;
  #topics;
  #connection; // a Link, or the Tabs that share one
  #ends = new AbortController();
  #received; // the same for the last notification that has come: the handler may be busy with an earlier one
  #isAnotherLog = false; // its ids may be older than #received, and the next is no duplicate
  #waiting = []; // messages for the handlers, each with the position after it
  #isBusy = false; // a handler is
  #isBehind = false; // with more than a connection may bring
  #acked = ""; // the newest position that the handler is done with, until the server is told
  #ackTimer;

  /**
   * Options, all optional: clientId; user (where no token names one); topics (names); since (the id to resume from);
   * token (an API key or a JSON Web Token, or a function that returns one or a promise of one: it is called for every
   * connection, and before the token expires); ack (acknowledge what the handler is done with, and begin after what
   * clientId has acknowledged before); shared (one connection for all tabs, where the browser can);
   * onNotification(notification), which may return a promise; onMessage(message) for the protocol's other messages;
   * onState(state, detail) with "connecting", "open" {clientId, user}, "waiting" {code, reason, delay} or "closed"
   * {code, reason}, the reason why it is closed for good; onError(error) for what these throw; WebSocket (the class).
   */
  constructor(url, options = {}) {
    this.#options = options = { WebSocket: globalThis.WebSocket, ...options };
    if (!options.WebSocket) throw new Error("no WebSocket here: run node --experimental-websocket, or pass one");
    if (options.ack && !options.clientId) throw new Error("ack needs a clientId: the server keeps the place under it");
    if (options.ack && options.shared) throw new Error("ack and shared exclude each other");
    const at = new URL(url, globalThis.location?.href);
    at.protocol = at.protocol.replace("http", "ws");
    if (options.clientId) at.searchParams.set("client_id", options.clientId);
    if (options.user) at.searchParams.set("user", options.user);
    const ofUrl = at.searchParams.getAll("topics").join(",").split(",");
    this.#topics = new Set([...ofUrl.filter((name) => name.trim()), ...names(options.topics ?? [])]);
    // Empty: from now on.
    this.last = this.#received = options.since ?? at.searchParams.get("since") ?? "";
    for (const name of ["topics", "since"]) at.searchParams.delete(name);
    this.#connect(at);
    this.#wakeUp();
  }

  /** The topics that it has asked for and follows. */
  get topics() {
    return [...this.#topics];
  }

  /** Follow more topics from now on. The promise fails with NotifydError when the server refuses. */
  subscribe(...topics) {
    return this.#ask({ type: "subscribe", topics: names(topics.flat()) });
  }

  unsubscribe(...topics) {
    return this.#ask({ type: "unsubscribe", topics: names(topics.flat()) });
  }

  /** Go on with another token of the same user. The promise fails with NotifydError when the server refuses. */
  authenticate(token) {
    return this.#ask({ type: "auth", token });
  }

  /** Close for good. */
  close() {
    if (this.state === "closed") return;
    this.#sendAck();
    this.#waiting.length = 0;
    this.#enter("closed", { code: 1000, reason: "" });
  }

  #connect(url) {
    const owner = {
      url,
      options: this.#options,
      topics: () => this.#topics,
      position: () => this.#received,
      begin: (position) => (this.last = this.#received ||= position),
      receive: (message, followed) => this.#receive(message, followed),
      enter: (state, detail) => this.#enter(state, detail),
    };
    // Both are there in secure contexts alone; elsewhere each tab has a connection of its own.
    const canShare = globalThis.navigator?.locks && globalThis.BroadcastChannel;
    this.#connection = this.#options.shared && canShare ? new Tabs(owner) : new Link(owner);
    this.#connection.start();
  }

  /** Look after the connection when the device is back from sleep, or in another network. */
  #wakeUp() {
    const { signal } = this.#ends;
    const isLeft = (type) => type === "visibilitychange" && document.visibilityState === "hidden";
    const wake = ({ type }) => isLeft(type) || this.#connection.wake();
    for (const event of ["online", "pageshow"]) globalThis.addEventListener?.(event, wake, { signal });
    for (const event of ["visibilitychange", "resume"]) globalThis.document?.addEventListener(event, wake, { signal });
  }

  async #ask(message) {
    if (this.state === "closed") throw new NotifydError("closed");
    await this.#connection.ask(message);
    for (const topic of message.topics ?? []) this.#topics[isSubscribe(message) ? "add" : "delete"](topic);
  }

  /** Take a message. Of tabs that share a connection, some follow these of its topics, where it is for topics. */
  #receive(message, followed = []) {
    if (message.id !== undefined) {
      if (!this.#advance(message.id)) return; // a duplicate: ids are ordered by time
      if (followed.length && !followed.some((topic) => this.#topics.has(topic))) return;
    }
    if (message.type === "resume") {
      const { position, replayed } = message.data;
      // Nothing received yet and nothing to come: from here on nothing can be missed.
      if (!replayed) this.#received ||= position;
      this.#isAnotherLog = position < this.#received;
    }
    if (message.type === "position") this.#advance(message.position); // nothing for this client came before it
    if (message.type === "subscribed") this.#keep(message.topics);
    this.#waiting.push([message, this.#received]);
    this.#handle();
    if (this.#waiting.length < MAX_WAITING || this.#isBehind) return;
    this.#isBehind = true;
    this.#connection.pause();
  }

  /** Go on to an id, and return whether it is new. */
  #advance(id) {
    if (id <= this.#received && !this.#isAnotherLog) return false;
    this.#isAnotherLog = false;
    this.#received = id;
    return true;
  }

  /** Forget topics that an admin or a new token took away: with them the next connection would be refused. */
  #keep(topics) {
    for (const topic of this.#topics) if (!topics.includes(topic)) this.#topics.delete(topic);
  }

  /** Give the waiting messages to the handlers, one at a time. */
  #handle() {
    const { onNotification, onMessage } = this.#options;
    while (this.#waiting.length && !this.#isBusy) {
      const [message, position] = this.#waiting.shift();
      const before = this.last;
      this.last = position;
      try {
        const promise = message.id === undefined ? onMessage?.(message) : onNotification?.(message);
        if (typeof promise?.then === "function") this.#await(promise, message, before);
        else this.#isDone(message, position);
      } catch (error) {
        this.#hasFailed(error, message, before);
      }
    }
  }

  async #await(promise, message, before) {
    const position = this.last;
    this.#isBusy = true;
    try {
      await promise;
      this.#isDone(message, position);
    } catch (error) {
      this.#hasFailed(error, message, before);
    }
    this.#isBusy = false;
    this.#handle();
    if (this.#isBehind && this.#waiting.length < MAX_WAITING / 2) {
      this.#isBehind = false;
      this.#connection.wake();
    }
  }

  #isDone(message, position) {
    const isPlace = message.id || message.type === "position" || (message.type === "resume" && !message.data.replayed);
    if (!this.#options.ack || !isPlace || this.state === "closed") return;
    this.#acked = position;
    this.#ackTimer ??= setTimeout(() => this.#sendAck(), ACK_MS);
  }

  #sendAck() {
    clearTimeout(this.#ackTimer);
    this.#ackTimer = undefined;
    // Without a connection the next one will carry it.
    if (this.#acked && this.#connection.send({ type: "ack", id: this.#acked })) this.#acked = "";
  }

  /** Report an error of a handler. With `ack` come back for the notification, since nobody has dealt with it. */
  #hasFailed(error, message, before) {
    this.#report(error);
    if (!this.#options.ack || message.id === undefined || this.state === "closed") return;
    this.#sendAck();
    this.#waiting.length = 0;
    this.last = this.#received = before;
    this.#connection.rewind(before, { code: 1000, reason: "the handler has failed" });
  }

  #enter(state, detail) {
    if (this.state === "closed" || (state === this.state && state !== "waiting")) return;
    this.state = state;
    if (state === "closed") {
      this.#ends.abort();
      this.#connection.stop();
    }
    if (state === "open") this.#sendAck();
    try {
      this.#options.onState?.(state, detail);
    } catch (error) {
      this.#report(error);
    }
  }

  #report(error) {
    // Without a page, reportError would end the program.
    const { onError = globalThis.document ? globalThis.reportError : console.error } = this.#options;
    onError(error);
  }
}

/** Return the names of topics without spaces around them. */
function names(topics) {
  return (typeof topics === "string" ? [topics] : [...topics]).map((name) => {
    if (typeof name === "string" && name.trim() && !name.includes(",")) return name.trim();
    throw new TypeError(`topics: expected names without commas, got ${JSON.stringify(name)}`);
  });
}

function isSubscribe(message) {
  return message.type === "subscribe";
}

// --- one connection

/** One connection, which comes back by itself, and its place in the log. */
class Link {
  #owner;
  #position; // of the last message that has come
  #socket;
  #attempt; // what the last #connect() has begun; others are void
  #timer; // of the reconnect while there is no socket, of the silence while there is one
  #renewal;
  #failures = 0;
  #opened = Infinity;
  #isOpen = false; // the welcome has come
  #asked = []; // what the server has yet to answer, in order
  #token; // the last one shown
  #refused; // the close that only another token can change

  constructor(owner) {
    this.#owner = owner;
    this.#position = owner.position();
    this.#token = owner.options.token;
  }

  start() {
    clearTimeout(this.#timer);
    const attempt = (this.#attempt = {});
    const { token } = this.#owner.options;
    const isCurrent = () => attempt === this.#attempt;
    this.#owner.enter("connecting", {});
    if (typeof token !== "function") return this.#open(this.#token);
    Promise.resolve()
      .then(token)
      .then(
        (given) => isCurrent() && this.#open(given),
        (error) => isCurrent() && this.#leave({ code: 1006, reason: `no token: ${error?.message ?? error}` }),
      );
  }

  /** Send a message that the server answers, now or when there is a connection, and until it is answered. */
  ask(message) {
    if (message.type === "auth") this.#token = message.token;
    return new Promise((resolve, reject) => {
      this.#asked.push({ message, resolve, reject });
      if (this.#isOpen) this.send(message);
    });
  }

  /** Send a message, and return whether there is a connection. */
  send(message) {
    const isThere = this.#socket?.readyState === 1;
    if (isThere) this.#socket.send(JSON.stringify(message));
    return isThere;
  }

  /** Connect at once if it waits; else find out soon whether the server is still there. */
  wake() {
    if (this.#isOpen) this.#probe(PROBE_MS);
    else if (this.#attempt?.isWaiting) this.start();
  }

  /** Have everything after this position once more: after a while if this is for a failure, else at once. */
  rewind(position, failure) {
    this.#position = position;
    if (this.#attempt?.isWaiting) return;
    if (failure) return this.#leave(failure);
    this.#end();
    this.start();
  }

  /** Receive nothing until wake(). */
  pause() {
    if (this.#socket) this.#leave({ code: 1000, reason: "the handler is behind" }, LONGEST_MS);
  }

  stop() {
    this.#end();
    this.#attempt = undefined;
    for (const { reject } of this.#asked.splice(0)) reject(new NotifydError("closed"));
  }

  #open(token) {
    if (this.#refused && token === this.#token) return this.#close(this.#refused);
    this.#token = token;
    const { url: at, options, topics } = this.#owner;
    const url = new URL(at);
    if (topics().size) url.searchParams.set("topics", [...topics()].join(","));
    url.searchParams.set("since", this.#position || (options.ack ? "acked" : ""));
    let socket;
    try {
      // A browser can set no header: the token comes as a subprotocol.
      socket = new options.WebSocket(url.href, ...(token ? [["bearer", quoted(token)]] : []));
    } catch (error) {
      return this.#close({ code: 1006, reason: String(error?.message ?? error) }); // and so would every later one
    }
    // Late events of a socket that was given up are ignored.
    const heard = (handler) => (event) => socket === this.#socket && handler(event);
    socket.onopen = heard(() => (this.#opened = Date.now()));
    socket.onmessage = heard(({ data }) => {
      this.#watch();
      this.#receive(JSON.parse(data));
    });
    socket.onclose = heard(({ code = 1006, reason = "" }) => this.#hasClosed({ code, reason }));
    socket.onerror = heard(() => this.#hasClosed({ code: 1006, reason: "" })); // node 20 sends no close then
    this.#socket = socket;
    this.#timer = setTimeout(() => this.#leave({ code: 1006, reason: "no answer" }), CONNECT_MS);
  }

  #receive(message) {
    const [first] = this.#asked;
    if (message.id !== undefined) this.#position = message.id;
    switch (message.type) {
      case "ping":
        this.send({ type: "pong" });
        break;
      case "shutdown":
        this.#socket.close(1000); // and, as after every close, come back after a while
        break;
      case "welcome":
        this.#isOpen = true;
        this.#refused = undefined;
        this.#renewBefore(1000 * claims(this.#token).exp, Date.parse(message.server_time));
        for (const { message } of this.#asked) this.send(message);
        this.#owner.enter("open", { clientId: message.client_id, user: message.user });
        break;
      case "resume":
        if (!message.data.replayed) this.#position ||= message.data.position;
        break;
      case "position":
        this.#position = message.position;
        break;
      case "subscribed":
        if (first?.message.topics?.every((topic) => message.topics.includes(topic) === isSubscribe(first.message))) {
          this.#asked.shift().resolve();
        }
        break;
      case "authenticated":
        this.#renewBefore(Date.parse(message.expires_at ?? ""), Date.parse(message.timestamp));
        if (first?.message.type === "auth") this.#asked.shift().resolve();
        break;
      case "error": // in the order of the questions; an error of an ack is the answer to none
        if (!message.message.startsWith("id:")) this.#asked.shift()?.reject(new NotifydError(message.message));
        break;
    }
    this.#owner.receive(message);
  }

  #hasClosed(close) {
    const isRefusal = close.code === 1008 && FINAL.test(close.reason);
    if (!isRefusal && !FINAL_CODES.includes(close.code)) return this.#leave(close);
    const canRenew = typeof this.#owner.options.token === "function" && isRefusal && OF_TOKENS.test(close.reason);
    if (!canRenew) return this.#close(close);
    this.#refused = close;
    this.#leave(close);
  }

  #leave({ code, reason }, delay) {
    if (Date.now() - this.#opened >= STABLE_MS) this.#failures = 0;
    delay ??= backoff(this.#failures++);
    this.#end();
    this.#attempt = { isWaiting: true };
    this.#timer = setTimeout(() => this.start(), delay);
    this.#owner.enter("waiting", { code, reason, delay });
  }

  #close({ code, reason }) {
    this.#owner.enter("closed", { code, reason });
  }

  #end() {
    clearTimeout(this.#timer);
    clearTimeout(this.#renewal);
    const socket = this.#socket;
    this.#socket = undefined;
    this.#isOpen = false;
    this.#opened = Infinity;
    // A browser complains on its console of a connection that is closed before it is open.
    if (socket?.readyState === 0) socket.onopen = () => socket.close();
    else socket?.close();
  }

  /** Notice a server that vanished without a close. */
  #watch() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#probe(IDLE_MS), IDLE_MS);
  }

  #probe(patience) {
    clearTimeout(this.#timer);
    this.send({ type: "ping" });
    this.#timer = setTimeout(() => this.#leave({ code: 1006, reason: "no answer" }), patience);
  }

  /** Show a new token before this one expires, by the server's clock. */
  #renewBefore(expires, now) {
    const { token } = this.#owner.options;
    const left = expires - now;
    if (typeof token !== "function" || !(left > 1000)) return; // the close will tell
    clearTimeout(this.#renewal);
    const delay = Math.min(Math.max(left - RENEW_MS, 0.8 * left), LONGEST_MS);
    this.#renewal = setTimeout(async () => {
      try {
        await this.ask({ type: "auth", token: await token() });
      } catch {
        this.#renewBefore(expires, now + delay);
      }
    }, delay);
  }
}

/** Return a key or token in the form of a subprotocol, which has no slash, colon or equals sign. */
function quoted(token) {
  return encodeURIComponent(token).replace(/[()]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);
}

/** Return the claims of a JSON Web Token, {} of anything else. */
function claims(token) {
  try {
    const body = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(body, (sign) => sign.charCodeAt(0)))) ?? {};
  } catch {
    return {};
  }
}

// --- one connection for many tabs

/**
 * The connection of all tabs of one origin with the same URL, client_id and user.
 *
 * The tab that holds the lock leads: it has the Link, and passes on to the others what it hears. When it goes, however
 * it ends, the browser gives the lock to the next tab, which connects and resumes after the last message that it has
 * had. Each tab drops what it has had, so that nothing is lost and nothing comes twice. Each also holds a lock of its
 * own, by which the leader learns of its end.
 */
class Tabs {
  #owner;
  #id = randomHex();
  #name;
  #channel;
  #ends; // of this tab's part: for good, or while the browser keeps the page for the way back
  #gone = new AbortController(); // for good
  #link; // of the leader
  #tabs = new Map(); // the topics of each tab by its id, as far as this one has heard
  #isNew = true; // no leader has answered
  #asked = new Map(); // by number, what the leader has yet to answer
  #numbers = 0;
  #news = { state: "connecting", detail: {} };
  #failures = 0;
  #attended = new Set(); // tabs of which this one will learn the end

  constructor(owner) {
    this.#owner = owner;
    const { signal } = this.#gone;
    globalThis.addEventListener?.("pagehide", () => this.#end(), { signal });
    globalThis.addEventListener?.("pageshow", (event) => event.persisted && this.#join(), { signal });
  }

  start() {
    this.#owner.enter("connecting", {});
    this.#join();
  }

  ask(message) {
    return new Promise((resolve, reject) => {
      const number = ++this.#numbers;
      this.#asked.set(number, { message, resolve, reject });
      this.#put(number);
    });
  }

  wake() {
    if (this.#link) this.#link.wake();
    else this.#post({ wake: true });
  }

  pause() {} // one tab that is behind holds up no other

  stop() {
    this.#gone.abort();
    for (const { reject } of this.#asked.values()) reject(new NotifydError("closed"));
    this.#asked.clear();
    const isFinal = this.#link && this.#news.state === "closed";
    this.#link?.stop();
    if (isFinal) setTimeout(() => this.#end(), RELEASE_MS);
    else this.#end();
  }

  async #join() {
    if (this.#ends) return;
    const { signal } = (this.#ends = new AbortController());
    const ended = new Promise((resolve) => signal.addEventListener("abort", resolve));
    const { locks } = navigator;
    try {
      this.#name ??= await nameOf(this.#owner);
      if (signal.aborted) return;
      this.#channel = new BroadcastChannel(this.#name);
      this.#channel.onmessage = ({ data }) => this.#hear(data);
      await new Promise((held) => locks.request(`${this.#name} ${this.#id}`, () => (held(), ended)));
      this.#hello();
      await locks.request(this.#name, { signal }, () => (this.#lead(), ended));
    } catch (error) {
      if (!signal.aborted) this.#joinLater(String(error?.message ?? error));
    }
  }

  /** Try again when there was no token. */
  #joinLater(reason) {
    const delay = backoff(this.#failures++);
    this.#end();
    setTimeout(() => this.#gone.signal.aborted || this.#join(), delay);
    this.#owner.enter("waiting", { code: 1006, reason, delay });
  }

  #end() {
    this.#ends?.abort();
    this.#link?.stop();
    this.#channel?.close();
    this.#ends = this.#link = this.#channel = undefined;
  }

  #post(message) {
    this.#channel?.postMessage({ from: this.#id, ...message });
  }

  #hello() {
    const topics = [...this.#owner.topics()];
    this.#tabs.set(this.#id, topics);
    this.#post({ hello: { topics, position: this.#owner.position(), isNew: this.#isNew } });
  }

  #hear({ from, to = this.#id, hello, lead, news, tabs, heard, ask, answer, wake }) {
    if (to !== this.#id) return;
    if (tabs) for (const [tab, topics] of tabs) this.#tabs.set(tab, topics);
    if (hello) this.#greet(from, hello);
    if (lead) this.#hello();
    if (lead) for (const number of this.#asked.keys()) this.#put(number);
    if (news) this.#follow(news);
    if (heard) this.#owner.receive(heard.message, heard.followed);
    if (ask && this.#link) this.#serve(from, ask);
    if (answer) this.#resolve(answer.number, answer.error);
    if (wake) this.#link?.wake();
  }

  /** Have the leader ask the server. */
  async #put(number) {
    const { message } = this.#asked.get(number);
    if (this.#link) this.#resolve(number, await this.#act(this.#id, message));
    else this.#post({ ask: { number, message } });
  }

  #resolve(number, error) {
    const asked = this.#asked.get(number);
    this.#asked.delete(number);
    if (error === undefined) asked?.resolve();
    else asked?.reject(new NotifydError(error));
  }

  /** Take news of the leader; the position is that of a tab which has just joined. */
  #follow({ state, detail, position }) {
    if (position !== undefined) this.#isNew = false;
    this.#owner.begin(position ?? "");
    this.#news = { state, detail };
    this.#owner.enter(state, detail);
    // The timers of a leader out of sight are slow.
    if (state === "waiting") setTimeout(() => this.#news.detail === detail && this.wake(), detail.delay);
  }

  // The leader's part.

  async #serve(tab, { number, message }) {
    const error = await this.#act(tab, message);
    this.#post({ to: tab, answer: { number, error } });
  }

  #lead() {
    const { url, options, position } = this.#owner;
    const enter = (state, detail) => {
      this.#news = { state, detail };
      this.#post({ news: this.#news });
      this.#owner.enter(state, detail);
    };
    const receive = (message) => {
      if (message.type === "subscribed") this.#keep(message.topics);
      const isNotification = message.id !== undefined;
      const followed = isNotification ? message.topics?.filter((topic) => this.#followed().has(topic)) : [];
      this.#post({ heard: { message, followed } });
      this.#owner.receive(message, followed);
    };
    this.#isNew = false;
    this.#link = new Link({ url, options, position, topics: () => this.#followed(), receive, enter });
    this.#link.start();
    for (const tab of this.#tabs.keys()) this.#attend(tab);
    this.#post({ lead: true });
    for (const number of this.#asked.keys()) this.#put(number);
  }

  /** Forget topics that the server took away. */
  #keep(topics) {
    for (const [tab, had] of this.#tabs) this.#tabs.set(tab, had.filter((topic) => topics.includes(topic)));
  }

  #followed() {
    return new Set([...this.#tabs.values()].flat());
  }

  /** Take in a tab. One that wants to resume from earlier, or follows topics that were unknown, gets what it lacks. */
  async #greet(tab, { topics, position, isNew }) {
    if (!this.#link) return this.#tabs.set(tab, topics);
    const tell = (news) => this.#post({ to: tab, news, tabs: [...this.#tabs] });
    const refuse = (reason) => tell({ state: "closed", detail: { code: 1008, reason } });
    if (position && !IS_ID.test(position)) return refuse("Invalid since");
    const ours = this.#owner.position();
    tell({ ...this.#news, position: ours });
    const isBehind = position && (isNew ? position < ours : this.#missing(topics).length);
    if (!this.#tabs.has(tab)) this.#tabs.set(tab, []);
    this.#attend(tab);
    const error = await this.#act(tab, { type: "subscribe", topics });
    if (error) refuse(error);
    else if (isBehind) this.#link?.rewind(position < ours ? position : ours);
  }

  /** Act on a question of a tab, and return the error. */
  async #act(tab, message) {
    const { type, topics } = message;
    if (type === "auth") return this.#outcome(message);
    const change = (changed) => this.#tabs.has(tab) && this.#tabs.set(tab, changed(this.#tabs.get(tab)));
    if (type === "unsubscribe") change((had) => had.filter((topic) => !topics.includes(topic)));
    const rest = this.#missing(topics);
    const error = rest.length ? await this.#outcome({ type, topics: rest }) : undefined;
    if (error === undefined && type === "subscribe") change((had) => [...new Set([...had, ...topics])]);
    this.#post({ tabs: [[tab, this.#tabs.get(tab) ?? []]] });
    return error;
  }

  #missing(topics) {
    const followed = this.#followed();
    return topics.filter((topic) => !followed.has(topic));
  }

  async #outcome(message) {
    try {
      await this.#link.ask(message);
    } catch (error) {
      return error.message;
    }
  }

  /** Learn of the end of another tab. */
  #attend(tab) {
    if (tab === this.#id || this.#attended.has(tab)) return;
    this.#attended.add(tab);
    const leave = () => {
      const topics = this.#tabs.get(tab) ?? [];
      this.#tabs.delete(tab);
      this.#act(tab, { type: "unsubscribe", topics });
    };
    navigator.locks.request(`${this.#name} ${tab}`, { signal: this.#ends.signal }, leave).catch(() => {});
  }
}

/** Return the name of the group of tabs: those of other users, and with other keys, have nothing in common. */
async function nameOf({ url, options: { token } }) {
  const given = typeof token === "function" ? await token() : token;
  return `notifyd ${url.href} ${claims(given).sub ?? (given ? await digest(given) : "")}`;
}

async function digest(text) {
  return hex(new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text))));
}

function randomHex() {
  return hex(crypto.getRandomValues(new Uint8Array(16)));
}

function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- publishing

const BUSY = [408, 429, 502, 503, 504];

/** The HTTP API of one server. Its promises fail with NotifydError, or with the error of fetch when no answer came. */
export class Notifyd {
  #url;
  #options;

  /** Options: token (an API key or a JSON Web Token), attempts (8), fetch (the function to use). */
  constructor(url, options = {}) {
    this.#url = new URL(url, globalThis.location?.href).href.replace(/\/+$/, "");
    this.#options = { attempts: 8, fetch: globalThis.fetch, ...options };
  }

  /**
   * Publish to everyone, or to clients, topics and users; return the answer of the server.
   *
   * Options: type, data, clients, topics, users, and the Idempotency-Key `key`: with one of your own a later run may
   * repeat it. A retry after a lost answer has the same key, and is published once.
   */
  notify(message, { key = randomHex(), ...options } = {}) {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
    return this.#ask("/notify", { method: "POST", headers, body: JSON.stringify({ message, ...options }) });
  }

  /** Return the health, also that of a server that is shutting down or unhealthy. */
  async health() {
    const answer = await this.#fetch("/health", {});
    const body = await bodyOf(answer);
    if (body.status === undefined) throw await errorOf(answer, body);
    return body;
  }

  metrics() {
    return this.#ask("/metrics");
  }

  status() {
    return this.#ask("/status");
  }

  async #ask(path, request = {}) {
    const { attempts } = this.#options;
    for (let failures = 1; ; failures++) {
      let delay = backoff(failures - 1, BASE_MS, PUBLISH_CAP_MS);
      try {
        const answer = await this.#fetch(path, request);
        const body = await bodyOf(answer);
        if (answer.ok) return body;
        if (failures >= attempts || !BUSY.includes(answer.status)) throw errorOf(answer, body);
        delay += retryAfter(answer.headers.get("Retry-After"));
      } catch (error) {
        if (failures >= attempts || error instanceof NotifydError) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, delay));
    }
  }

  #fetch(path, request) {
    const { token, fetch } = this.#options;
    const headers = { ...request.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    return fetch(this.#url + path, { ...request, headers, signal: AbortSignal.timeout(PUBLISH_MS) });
  }
}

/** Return the body's JSON object, {} if it is something else: a proxy has error pages of its own. */
async function bodyOf(answer) {
  const text = await answer.text();
  try {
    return Object(JSON.parse(text));
  } catch {
    return {};
  }
}

function errorOf({ status, statusText }, { error }) {
  return new NotifydError(error?.message ?? statusText, { ...error, status });
}

/** Return the milliseconds that an answer asks to wait: a number or a date (RFC 9110, section 10.2.3), within reason. */
export function retryAfter(given) {
  const wait = /^\d+$/.test(given) ? 1000 * given : Date.parse(given) - Date.now();
  return Math.min(Math.max(wait || 0, 0), MAX_RETRY_AFTER_MS);
}
