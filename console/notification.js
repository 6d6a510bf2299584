// One notification as a row: time, type, topics, message, and its JSON folded.

import { clock, el } from "./elements.js";

/** Return a notification as a list item. `more(notification)` is asked for elements when its JSON is first unfolded. */
export function row(notification, more) {
  const { id, type, timestamp, topics, data } = notification;
  const summary = el(
    "summary",
    {},
    clock(timestamp),
    el("span.type", { title: type }, type),
    el("span.message", { dir: "auto" }, shown(data)),
    topics && el("span.topics", {}, ...topics.flatMap((topic) => [el("span.topic", {}, topic), " "])),
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
export const json = (value, of) =>
  el("pre", { tabindex: "0", role: "region", "aria-label": `JSON of the ${of}` }, JSON.stringify(value, null, 2));

/** Return the message of a notification's data: the server puts it there always, but a host's own might be anything. */
const shown = (data) => (typeof data?.message === "string" ? data.message : JSON.stringify(data));

/** Whether a notification has a text, which is in lower case, in its type, topics or data, or has it as its id. */
export const has = ({ id, type, topics = [], data }, text) =>
  id === text || `${type} ${topics.join(" ")} ${JSON.stringify(data)}`.toLowerCase().includes(text);
