/* The floor: the least that a broadcast with one system call per client can cost.
 *
 * One process, one epoll loop. A client is a file descriptor in an array; `POST /notify` frames its body
 * once and send()s that frame to each client in turn, then answers. There is no log, queue, identity, limit or
 * validation, and it waits for a client whose socket is full. The rest is HTTP, the handshake of RFC 6455
 * and the system calls: no server that writes to each socket by itself can avoid these.
 *
 * Usage: floor PORT
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FD_LIMIT = 1 << 16, REQUEST_LIMIT = 16384, EVENTS = 512, BACKLOG = 4096 };

/* A connection speaks HTTP while it has a request buffer; a WebSocket client has none, only its place. */
struct connection {
    char *request;
    int length; /* bytes in `request` */
    int seat;   /* its place in `clients` */
};

static struct connection connections[FD_LIMIT];
static int clients[FD_LIMIT];
static int client_count;

static uint32_t rotate(uint32_t word, int bits) { return word << bits | word >> (32 - bits); }

/* RFC 3174, for messages of up to 119 bytes: two blocks hold a handshake key and the GUID. */
static void sha1(const char *text, size_t length, uint8_t digest[20]) {
    uint32_t state[5] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
    uint8_t padded[128] = {0};
    size_t blocks = length + 9 <= 64 ? 1 : 2;
    memcpy(padded, text, length);
    padded[length] = 0x80;
    padded[blocks * 64 - 2] = (uint8_t)(length * 8 >> 8);
    padded[blocks * 64 - 1] = (uint8_t)(length * 8);
    for (size_t block = 0; block < blocks; block++) {
        uint32_t w[80], a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
        const uint8_t *at = padded + block * 64;
        for (int t = 0; t < 16; t++, at += 4)
            w[t] = (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
        for (int t = 16; t < 80; t++) w[t] = rotate(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16], 1);
        for (int t = 0; t < 80; t++) {
            uint32_t f, k;
            if (t < 20) f = (b & c) | (~b & d), k = 0x5A827999;
            else if (t < 40) f = b ^ c ^ d, k = 0x6ED9EBA1;
            else if (t < 60) f = (b & c) | (b & d) | (c & d), k = 0x8F1BBCDC;
            else f = b ^ c ^ d, k = 0xCA62C1D6;
            uint32_t next = rotate(a, 5) + f + e + k + w[t];
            e = d, d = c, c = rotate(b, 30), b = a, a = next;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e;
    }
    for (int i = 0; i < 20; i++) digest[i] = (uint8_t)(state[i / 4] >> (24 - i % 4 * 8));
}

/* 20 bytes become 27 characters and one '='. */
static void base64_of_digest(const uint8_t digest[20], char out[29]) {
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0, o = 0; i < 20; i += 3, o += 4) {
        uint32_t triple = (uint32_t)digest[i] << 16 | (uint32_t)digest[i + 1] << 8 | (i + 2 < 20 ? digest[i + 2] : 0);
        for (int j = 0; j < 4; j++) out[o + j] = alphabet[triple >> (18 - 6 * j) & 63];
    }
    out[27] = '=';
    out[28] = 0;
}

static void drop(int fd) {
    struct connection *connection = &connections[fd];
    if (!connection->request) {
        int last = clients[--client_count];
        clients[connection->seat] = last;
        connections[last].seat = connection->seat;
    }
    free(connection->request);
    connection->request = NULL;
    close(fd);
}

/* Waits for a full socket. A peer that is gone shows up in epoll and is dropped there. */
static void send_all(int fd, const char *bytes, size_t length) {
    while (length) {
        ssize_t sent = send(fd, bytes, length, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
        } else if (sent < 0) {
            return;
        } else {
            bytes += sent;
            length -= (size_t)sent;
        }
    }
}

static void broadcast(const char *payload, size_t length) {
    static char frame[REQUEST_LIMIT + 4];
    size_t head = length < 126 ? 2 : 4;
    frame[0] = (char)0x81; /* FIN, text */
    frame[1] = (char)(length < 126 ? length : 126);
    if (head == 4) frame[2] = (char)(length >> 8), frame[3] = (char)length;
    memcpy(frame + head, payload, length);
    for (int i = 0; i < client_count; i++) send_all(clients[i], frame, head + length);
}

static void answer(int fd, const char *body) {
    char response[256];
    int length = snprintf(response, sizeof response,
                          "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                          strlen(body), body);
    send_all(fd, response, (size_t)length);
}

static void upgrade(int fd, const char *key) {
    char text[64], accept_key[29], response[160];
    uint8_t digest[20];
    snprintf(text, sizeof text, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
    sha1(text, strlen(text), digest);
    base64_of_digest(digest, accept_key);
    int length = snprintf(response, sizeof response,
                          "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                          "Sec-WebSocket-Accept: %s\r\n\r\n", accept_key);
    send_all(fd, response, (size_t)length);
    struct connection *connection = &connections[fd];
    free(connection->request);
    connection->request = NULL;
    connection->seat = client_count;
    clients[client_count++] = fd;
}

static const char *header(const char *head, const char *name) {
    const char *at = strcasestr(head, name);
    if (!at) return NULL;
    at += strlen(name);
    return at + strspn(at, " ");
}

/* Answers every complete request in the buffer (they may be pipelined) and keeps the rest. */
static void serve(int fd) {
    struct connection *connection = &connections[fd];
    char *at = connection->request, *end = at + connection->length, *head_end;
    while (*end = 0, (head_end = strstr(at, "\r\n\r\n"))) {
        char *body = head_end + 4;
        *head_end = 0; /* so that a header is not looked for in the body */
        const char *key = header(at, "\nSec-WebSocket-Key:"), *length_text = header(at, "\nContent-Length:");
        long length = length_text ? atol(length_text) : 0;
        if (key) {
            upgrade(fd, key);
            return;
        }
        if (end - body < length) {
            *head_end = '\r';
            break;
        }
        if (!strncmp(at, "POST", 4)) {
            char result[64];
            broadcast(body, (size_t)length);
            snprintf(result, sizeof result, "{\"status\":\"success\",\"recipients\":%d}", client_count);
            answer(fd, result);
        } else {
            answer(fd, "{}");
        }
        at = body + length;
    }
    connection->length = (int)(end - at);
    memmove(connection->request, at, (size_t)connection->length);
}

static void readable(int fd) {
    struct connection *connection = &connections[fd];
    char ignored[4096];
    char *into = connection->request ? connection->request + connection->length : ignored;
    int room = connection->request ? REQUEST_LIMIT - 1 - connection->length : (int)sizeof ignored;
    ssize_t got = recv(fd, into, (size_t)room, 0);
    if (got == 0 || (got < 0 && errno != EAGAIN)) {
        drop(fd);
    } else if (got > 0 && connection->request) {
        connection->length += (int)got;
        serve(fd);
    }
}

static void accept_all(int listener, int poller) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        connections[fd] = (struct connection){.request = malloc(REQUEST_LIMIT)};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN, .data.fd = fd});
    }
}

int main(int argc, char **argv) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), poller = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)(argc > 1 ? atoi(argv[1]) : 8000)),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < FD_LIMIT ? files.rlim_max : FD_LIMIT;
    setrlimit(RLIMIT_NOFILE, &files);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, BACKLOG)) {
        perror("floor");
        return 1;
    }
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &(struct epoll_event){.events = EPOLLIN, .data.fd = listener});
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.fd == listener) accept_all(listener, poller);
            else readable(events[i].data.fd);
        }
    }
}
