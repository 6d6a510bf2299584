// The broadcast of the `ws` package's README, on Node: `send` to one client after the other.
//
// Usage: ws_loop.cjs PORT PATH_OF_THE_WS_PACKAGE
const http = require("node:http");
const { WebSocket, WebSocketServer } = require(process.argv[3]);

const BACKLOG = 4096;

const server = http.createServer((request, response) => {
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    const body = Buffer.concat(chunks);
    if (request.method === "POST") {
      for (const client of sockets.clients) {
        if (client.readyState === WebSocket.OPEN) client.send(body, { binary: false });
      }
    }
    const answer = JSON.stringify({ status: "success", recipients: sockets.clients.size });
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": answer.length });
    response.end(answer);
  });
});
const sockets = new WebSocketServer({ server, path: "/ws", perMessageDeflate: false });
sockets.on("connection", (client) => client.on("error", () => {}));
server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: BACKLOG });
