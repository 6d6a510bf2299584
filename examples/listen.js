// Print every notification as a line of JSON, in Node.js, Deno or Bun.
//
//   npm install --prefix examples
//   node examples/listen.js [ws://localhost:8000/ws?topics=builds]
//
// The variable TOKEN has the token or key, where the server wants one.
// Node.js before 22 needs the flag --experimental-websocket before the file's name. Ctrl+C ends it.

import { NotifydClient } from "notifyd-client";

const describe = {
  connecting: () => "connecting",
  open: ({ clientId, user }) => `connected as ${clientId}${user ? ` of ${user}` : ""}`,
  waiting: ({ code, reason, delay }) => `disconnected (${code} ${reason}), again in ${Math.round(delay)} ms`,
  closed: ({ code, reason }) => `closed (${code} ${reason})`,
};

new NotifydClient(process.argv[2] ?? "ws://localhost:8000/ws", {
  token: process.env.TOKEN,
  onNotification: (notification) => console.log(JSON.stringify(notification)),
  onMessage: ({ type, data, message }) => {
    if (type === "error") console.error(`error: ${message}`);
    if (type === "resume" && !data.complete) console.error("some notifications are missed: too old for the server");
  },
  onState: (state, detail) => {
    console.error(describe[state](detail));
    if (state === "closed") process.exitCode = 1;
  },
});
