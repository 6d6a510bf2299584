// One notification as a row: time, type, topics, message, and its JSON folded.

import { clock, el, named, visible } from "./elements.js";

/** Return a notification as a list item. `more(notification)` is asked for elements when its JSON is first unfolded. */
export function row(notification, more) {
  const { id, type, timestamp, topics, data } = notification;
  const summary = el(
    "summary",
    {},
    clock(timestamp),
    el("span.type", { title: visible(type) }, named(type)),
    el("span.message", { dir: "auto" }, shown(data)),
    topics && el("span.topics", {}, ...topics.flatMap((topic) => [el("span.topic", {}, named(topic)), " "])),
  );
  const details = el("details", {}, summary);
  // Most are never unfolded.
  details.addEventListener(
    "toggle",
    () => {
      details.append(el("div.body", {}, json(notification, "notification"), more?.(notification)));
    },
    { once: true },
  );
  return el("li.row", { "data-id": id }, details);
}

/** Return a value as JSON to read; `of` says whose it is. A keyboard scrolls it. */
export function json(value, of) {
  const lines = JSON.stringify(value, null, 2).split("\n");
  return el("pre", { tabindex: "0", role: "region", "aria-label": `JSON of the ${of}` }, lines.map(visible).join("\n"));
}

/** Return the message of a notification's data: the server puts it there always, but a host's own might be anything. */
const shown = (data) => (typeof data?.message === "string" ? data.message : JSON.stringify(data));

/** Whether a notification has a text, which is in lower case, in its type, topics or data, or has it as its id. */
export const has = ({ id, type, topics = [], data }, text) =>
  id === text || `${type} ${topics.join(" ")} ${JSON.stringify(data)}`.toLowerCase().includes(text);
