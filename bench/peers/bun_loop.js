// The publish of Bun's documentation: every client subscribes to one topic.
//
// Usage: bun bun_loop.js PORT
const TOPIC = "all";

Bun.serve({
  port: Number(process.argv[2]),
  hostname: "127.0.0.1",
  async fetch(request, server) {
    if (request.method !== "POST") return server.upgrade(request) ? undefined : new Response("no", { status: 426 });
    server.publish(TOPIC, await request.text());
    return Response.json({ status: "success", recipients: server.subscriberCount(TOPIC) });
  },
  websocket: {
    perMessageDeflate: false,
    idleTimeout: 0,
    sendPings: false,
    backpressureLimit: 64 * 1024 * 1024,
    open: (client) => client.subscribe(TOPIC),
    message() {},
  },
});
