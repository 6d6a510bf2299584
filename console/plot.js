// A plot of the last minutes in SVG: one line, its scale, and a sentence for screen readers.

import { el, number, say } from "./elements.js";

export const SECONDS = 300;
const WIDTH = 300;
const HEIGHT = 72;

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Return the top of a scale for values up to one: 1, 2 or 5 times a power of ten. */
function top(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(most, 1)));
  return [1, 2, 5, 10].map((step) => step * power).find((value) => value >= most);
}

const rounded = (value) => number(value < 10 ? Math.round(value * 10) / 10 : Math.round(value));

export class Plot {
  #points = []; // [seconds, value], null where the server was away
  #line = svg("path", { class: "line", "vector-effect": "non-scaling-stroke" });
  #area = svg("path", { class: "area" });
  #now = el("strong", {}, "–");
  #top = el("span.top");

  constructor(title) {
    this.title = title;
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.picture.append(this.#area, this.#line);
    this.element = el(
      "figure.plot",
      {},
      el("figcaption", {}, title, this.#now),
      el("div.frame", {}, this.picture, this.#top),
      el("div.axis", { "aria-hidden": "true" }, el("span", {}, "5 min ago"), el("span", {}, "now")),
    );
  }

  /** Add a value of this second; null where there is none. */
  add(seconds, value) {
    this.#points.push([seconds, value]);
    while (this.#points[0][0] < seconds - SECONDS) this.#points.shift();
    this.#draw(seconds);
  }

  #draw(until) {
    const values = this.#points.map(([, value]) => value).filter((value) => value !== null);
    const most = top(Math.max(0, ...values));
    const x = (seconds) => (WIDTH * (1 - (until - seconds) / SECONDS)).toFixed(1);
    const y = (value) => (HEIGHT - 1 - (HEIGHT - 3) * (value / most)).toFixed(1);
    const lines = [];
    for (const [seconds, value] of this.#points) {
      if (value === null) lines.push([]);
      else (lines.at(-1) ?? lines[lines.push([]) - 1]).push([x(seconds), y(value)]);
    }
    const drawn = lines.filter((line) => line.length);
    this.#line.setAttribute("d", drawn.map((line) => `M${line.join("L")}`).join(""));
    this.#area.setAttribute(
      "d",
      drawn.map((line) => `M${line[0][0]},${HEIGHT}L${line.join("L")}L${line.at(-1)[0]},${HEIGHT}Z`).join(""),
    );
    const last = this.#points.at(-1)[1];
    say(this.#now, last === null ? "–" : rounded(last));
    say(this.#top, rounded(most));
    const said = last === null ? "unknown now" : `now ${rounded(last)}`;
    this.picture.setAttribute(
      "aria-label",
      `${this.title}: ${said}, at most ${rounded(Math.max(0, ...values))} in the last 5 minutes`,
    );
  }
}
