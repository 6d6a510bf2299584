// JSON as somebody types it: where its first mistake is. JSON.parse names the place in its own words, which differ from
// browser to browser, and in some not at all.

const SPACE = /[ \t\n\r]*/y;
const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const ESCAPE = /\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})/y;
const WORD = /true|false|null/y;
const DEEPEST = 250; // the server refuses more levels

/** A mistake in a JSON text: line and column count from 1. */
export class Mistake extends Error {
  constructor(text, at, message) {
    const before = text.slice(0, at).split("\n");
    super(message);
    this.at = at;
    this.line = before.length;
    this.column = before.at(-1).length + 1;
    this.shown = text.split("\n")[this.line - 1];
  }
}

/** Check that a text is one JSON object. Throws the first Mistake. */
export function checkObject(text) {
  let at = 0;
  const fail = (message, place = at) => {
    throw new Mistake(text, place, message);
  };
  const take = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text)?.[0];
    if (found !== undefined) at += found.length;
    return found;
  };
  const found = () =>
    at < text.length ? `got ${JSON.stringify(String.fromCodePoint(text.codePointAt(at)))}` : "the text ends";
  const skip = () => take(SPACE);

  function string() {
    at++; // the quote
    for (;;) {
      take(PLAIN);
      if (text[at] === '"') return at++;
      if (text[at] === "\\") take(ESCAPE) ?? fail('expected one of \\" \\\\ \\/ \\b \\f \\n \\r \\t \\u0000');
      else
        fail(
          at < text.length
            ? "a text cannot have a line break or a tab: write \\n or \\t"
            : 'expected " at the end of the text',
        );
    }
  }
  function items(end, item) {
    at++; // the bracket
    skip();
    if (text[at] === end) return at++;
    for (;;) {
      item();
      skip();
      if (text[at] === end) return at++;
      if (text[at] !== ",") fail(`expected , or ${end}, ${found()}`);
      const comma = at++;
      skip();
      if (text[at] === end) fail(`no comma before ${end}`, comma);
    }
  }
  function member() {
    if (text[at] !== '"') fail(`expected a name in double quotes, ${found()}`);
    string();
    skip();
    if (text[at] !== ":") fail(`expected :, ${found()}`);
    at++;
    skip();
    value();
  }
  let depth = 0;
  function value() {
    if (++depth > DEEPEST) fail(`more than ${DEEPEST} levels`);
    if (text[at] === "{") items("}", member);
    else if (text[at] === "[") items("]", value);
    else if (text[at] === '"') string();
    else if (take(NUMBER) === undefined && take(WORD) === undefined) fail(`expected a value, ${found()}`);
    depth--;
  }

  skip();
  if (text[at] !== "{") fail(`expected an object, such as {"priority": "high"}, ${found()}`);
  value();
  skip();
  if (at < text.length) fail(`expected nothing behind the object, ${found()}`);
}

/** Return JSON without the white space between its parts. Numbers stay as they are written. */
export const compact = (text) => text.replace(/("(?:[^"\\]|\\.)*")|\s+/g, "$1");
