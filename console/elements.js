// Elements, and the texts in them. Everything that comes from outside becomes a text node, never HTML; the page's
// Content-Security-Policy has Trusted Types hold that.

/** Return the element of the page with an id. */
export const byId = (id) => document.getElementById(id);

/** Return a new element: "span.type" has a class. Children are texts or nodes; null and undefined are left out. */
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Set a text, or texts and nodes, only where it differs: a live region is read out again for each change. */
export function say(element, ...parts) {
  if (element.textContent !== parts.map((part) => part.textContent ?? part).join("")) element.replaceChildren(...parts);
}

// Characters that nobody sees, and that may turn the order of the others; a joiner is part of a letter.
const UNSEEN = /[\p{Cc}\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;

/** Return a text with such characters written out: \u202e. */
export const visible = (text) =>
  text.replace(UNSEEN, (unseen) => `\\u${unseen.codePointAt(0).toString(16).padStart(4, "0")}`);

/** Return a name as a node: it changes nothing beside it, whatever a stranger has put into it. */
export const named = (text) => el("bdi", {}, visible(text));

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const WHOLE = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/** Return the time of a timestamp, with its day unless that is today. */
export function clock(timestamp) {
  const at = new Date(timestamp);
  const isToday = at.toDateString() === new Date().toDateString();
  const text = isToday ? CLOCK.format(at) : `${DAY.format(at)} ${CLOCK.format(at)}`;
  return el("time", { datetime: timestamp, title: WHOLE.format(at) }, text);
}

/** Return how long seconds are, in the unit that is read best: "12 s", "3 min", "5 h", "2 days". */
export function span(seconds) {
  const count = Math.max(0, Math.round(seconds));
  if (count < 90) return `${count} s`;
  if (count < 90 * 60) return `${Math.round(count / 60)} min`;
  if (count < 36 * 3600) return `${Math.round(count / 3600)} h`;
  return `${Math.round(count / 86400)} days`;
}

/** Return how long ago a timestamp is. */
export function ago(timestamp) {
  const at = new Date(timestamp);
  return el("time", { datetime: timestamp, title: WHOLE.format(at) }, `${span((Date.now() - at) / 1000)} ago`);
}

const NUMBER = new Intl.NumberFormat();
export const number = (value) => NUMBER.format(value);

/** Return a count with its noun: "1 client", "2 clients". */
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Return the names in a field, which commas separate, each once. */
export const names = (text) => [
  ...new Set(
    text
      .split(",")
      .map((name) => name.trim())
      .filter(Boolean),
  ),
];

/** Call a function once the calls have paused for so long. */
export function settled(call, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, milliseconds);
  };
}
