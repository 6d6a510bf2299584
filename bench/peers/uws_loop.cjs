// The publish of uWebSockets.js' own examples: every client subscribes to one topic.
//
// Publishes of one turn of the event loop go out together: without setImmediate each of them would be a send of its own.
//
// Usage: uws_loop.cjs PORT PATH_OF_THE_PACKAGE
const uws = require(process.argv[3]);

const TOPIC = "all";
let collected = [];

const app = uws.App();

function publishAll() {
  const bodies = collected;
  collected = [];
  for (const body of bodies) app.publish(TOPIC, body, false);
}

app
  .ws("/ws", {
    compression: uws.DISABLED,
    idleTimeout: 0,
    sendPingsAutomatically: false,
    maxBackpressure: 64 * 1024 * 1024,
    open: (client) => client.subscribe(TOPIC),
  })
  .post("/notify", (response) => {
    let body = Buffer.alloc(0);
    response.onAborted(() => {});
    response.onData((chunk, isLast) => {
      body = Buffer.concat([body, Buffer.from(chunk)]);
      if (!isLast) return;
      if (collected.push(body) === 1) setImmediate(publishAll);
      response.writeHeader("Content-Type", "application/json");
      response.end(JSON.stringify({ status: "success", recipients: app.numSubscribers(TOPIC) }));
    });
  })
  .listen("127.0.0.1", Number(process.argv[2]), (listening) => {
    if (!listening) process.exit(1);
  });
