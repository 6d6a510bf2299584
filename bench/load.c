/* The load generator: many WebSocket clients and their publisher, on a core of its own, driven by load.py.
 *
 * It is C because in Python it was the bottleneck: 1.6 us per delivery, when the fastest server sends in 1.1 us.
 *
 * Clients are divided into groups, and each round of publishing is for one group; without `format` all are in one. The
 * clients of the group must receive the same bytes, and the others none. The client that is ahead extends `stream`, and
 * the others are compared with it, so a delivery of any size costs one recv() and one memcmp(). All notifications have
 * one size, so that a byte count (`goal`) tells when a client is done: one byte more, or another byte, is a failure. The
 * clock stops when the last client has its last byte. load.py then checks the contents of the stream.
 *
 * Usage: load PROTOCOL PORT PATH HELLO GREETINGS PUBLISH_PORT PUBLISH_PATH HEADER. PROTOCOL is `websocket`, `stream`
 * (Server-Sent Events) or `nats`, in which PUBLISH_PATH is the subject. HELLO is the text that each client sends first,
 * GREETINGS the number of frames with which the server greets it (a stream: one event), and HEADER a line of its
 * handshake; HELLO and HEADER may be empty. Commands, one a line on stdin:
 *   format FRAME_BYTES PADDING GROUP_SIZE =FIELD =QUERY   FIELD ends a body, and QUERY a client's URL; %d in them
 *                                                         is the number of the group. FRAME_BYTES 0: of any size;
 *                                                         a round then ends when nothing more comes, and its time
 *                                                         counts for nothing
 *   form FORM                                             of publishing, `posts` at first: a `POST` for each; `frames`,
 *                                                         over a WebSocket; `lines`, NDJSON to PUBLISH_PATH/batch;
 *                                                         `pubs`, those of NATS
 *   address GROUPS                                        so many groups have their turn
 *   sleep MILLISECONDS                                    for as long as nothing comes; 0 is polling
 *   connect CLIENTS AT_ONCE
 *   publish ROUNDS REQUESTS CONNECTIONS DEPTH BATCH       each round waits for its group. BATCH: notifications a
 *                                                         request, to PUBLISH_PATH/batch; 0 is one, to PUBLISH_PATH
 *   drain                                                 read all that others have published, of any size, until
 *                                                         every client has it and no more comes
 *   disconnect
 * Each is answered by a line `[SECONDS of a round...] BYTES`, and that many bytes: the stream, which is then forgotten.
 * A check that fails is answered by `failed REASON`, and ends the process.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FD_LIMIT = 1 << 16, EVENTS = 256, PUBLISHERS = 64, PATIENCE_SECONDS = 30, SLEEP_MS = 1000, SETTLE_MS = 20 };
/* One recv() takes the whole backlog of a client after a burst, and the buffer stays within a core's cache. */
enum { BUFFER = 256 * 1024, STREAM_LIMIT = 64 << 20, HEAD_LIMIT = 4096 };
enum { OBJECT_LIMIT = 4096, BODY_LIMIT = 1 << 20, ANSWERS_LIMIT = 1 << 17 };
/* From one group to the next: a prime, so that few are spread over all, and many come to all. */
enum { GROUP_STEP = 7919 };
enum protocol { WEBSOCKET, STREAM, NATS };
enum form { POSTS, FRAMES, LINES, PUBS };

/* The example of RFC 6455, section 1.3: one key for all, and its answer. */
static const char key[] = "dGhlIHNhbXBsZSBub25jZQ==", accept_key[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

struct publisher {
    int fd, length, sent, answered;
    char received[ANSWERS_LIMIT];
};

static struct sockaddr_in ws_address, publish_address;
static enum protocol protocol;
static enum form form;
static const char *path, *hello, *publish_path, *header;
static char padding[OBJECT_LIMIT / 2], query[128], field[128], target[128];
static int greetings, poller, sleep_ms = SLEEP_MS, round_number, group_size = FD_LIMIT, addressed = 1;
static int clients[FD_LIMIT], client_count;
static char *heads[FD_LIMIT]; /* by file descriptor, while it shakes hands: the request, then the answer */
static struct publisher publishers[PUBLISHERS], *publisher_of[FD_LIMIT];
static char stream[STREAM_LIMIT], buffer[BUFFER];
static size_t offsets[FD_LIMIT]; /* by file descriptor: how much of the stream the client has, or NOTHING_FOR_IT */
static const size_t NOTHING_FOR_IT = (size_t)-1;
static size_t stream_length, goal, frame_bytes;
static int number = 1000000; /* seven digits throughout, for one size */

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs(" failed ", stdout);
    vprintf(format, arguments);
    putchar('\n');
    exit(1);
}

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static void watch(int fd, uint32_t events, int operation) {
    epoll_ctl(poller, operation, fd, &(struct epoll_event){.events = events, .data.fd = fd});
}

static void write_all(int fd, const char *bytes, size_t length) {
    while (length) {
        ssize_t sent = send(fd, bytes, length, MSG_NOSIGNAL);
        if (sent < 0) fail("a request could not be sent: %s", strerror(errno));
        bytes += sent;
        length -= (size_t)sent;
    }
}

/* Frames a client's text, of up to 65,535 bytes: masked by zeros, which leaves it as it is. Returns its length. */
static int frame_text(char *frame, const char *text, int length) {
    int head = length < 126 ? 6 : 8;
    memset(frame, 0, (size_t)head);
    frame[0] = (char)0x81;
    frame[1] = (char)(0x80 | (length < 126 ? length : 126));
    if (head == 8) frame[2] = (char)(length >> 8), frame[3] = (char)length;
    memcpy(frame + head, text, (size_t)length);
    return head + length;
}

static void say_hello(int fd) {
    char frame[8 + 125];
    write_all(fd, frame, (size_t)frame_text(frame, hello, (int)strlen(hello)));
}

/* Is the handshake answered? */
static const char *accepted(const char *text) {
    const char *head_end = strstr(text, "\r\n\r\n"), *status = protocol == STREAM ? "HTTP/1.1 200" : "HTTP/1.1 101";
    if (head_end && (strncmp(text, status, 12) || (protocol == WEBSOCKET && !strcasestr(text, accept_key))))
        fail("a handshake was answered by %.80s", text);
    return head_end;
}

/* Have all greetings arrived? (Frames as in RFC 6455, section 5.2, unmasked.) NATS pings each client after two seconds,
 * and then no more for an hour. */
static int greeted(const char *text, size_t length) {
    if (protocol == NATS) return strstr(text, "PONG\r\n") && strstr(text, "PING\r\n");
    const char *head_end = accepted(text);
    if (!head_end) return 0;
    if (protocol == STREAM) { /* one event or comment; in chunks, an end of line comes behind it */
        const char *end = strstr(head_end, "\n\n");
        return end && (!strcasestr(text, "\nTransfer-Encoding:") || !strcmp(end, "\n\n\r\n"));
    }
    const unsigned char *at = (const unsigned char *)head_end + 4, *end = (const unsigned char *)text + length;
    for (int frame = 0; frame < greetings; frame++) {
        if (end - at < 4) return 0;
        if (at[0] != 0x81) fail("a client was greeted by a frame that is no text (first byte %02x)", at[0]);
        size_t payload = at[1] == 126 ? (size_t)(at[2] << 8 | at[3]) : at[1], head = at[1] == 126 ? 4 : 2;
        if ((size_t)(end - at) < head + payload) return 0;
        at += head + payload;
    }
    if (at != end) fail("a client was greeted by more than %d frames", greetings);
    return 1;
}

/* Writes what a client of a group sends first, and returns its length. */
static int compose_handshake(char request[HEAD_LIMIT], int group) {
    if (protocol == NATS) return sprintf(request, "CONNECT {\"verbose\":false}\r\nSUB %s 1\r\nPING\r\n", publish_path);
    int length = sprintf(request, "GET %s", path);
    if (group >= 0) length += sprintf(request + length, query, group);
    length += sprintf(request + length, " HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s", ntohs(ws_address.sin_port), header);
    if (protocol == STREAM) return length + sprintf(request + length, "Accept: text/event-stream\r\n\r\n");
    return length + sprintf(request + length, "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: %s\r\n"
                            "Sec-WebSocket-Version: 13\r\n\r\n", key);
}

static void open_client(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) fail("no socket: %s", strerror(errno));
    connect(fd, (struct sockaddr *)&ws_address, sizeof ws_address);
    watch(fd, EPOLLOUT, EPOLL_CTL_ADD);
    compose_handshake(heads[fd] = malloc(HEAD_LIMIT), client_count / group_size);
    offsets[fd] = 0; /* bytes of the answer, until it is greeted */
    clients[client_count++] = fd;
}

/* Takes one step of a handshake, and returns whether it was the last. */
static int step(int fd, uint32_t events) {
    if (events & EPOLLOUT) {
        write_all(fd, heads[fd], strlen(heads[fd]));
        *heads[fd] = 0;
        watch(fd, EPOLLIN | EPOLLET, EPOLL_CTL_MOD);
        return 0;
    }
    if (offsets[fd] == NOTHING_FOR_IT) fail("a client received something after its greeting");
    int was_accepted = protocol == NATS || accepted(heads[fd]);
    ssize_t got = recv(fd, heads[fd] + offsets[fd], HEAD_LIMIT - 1 - offsets[fd], 0);
    if (got <= 0) fail("a handshake ended early: %s", got ? strerror(errno) : "closed");
    offsets[fd] += (size_t)got;
    heads[fd][offsets[fd]] = 0;
    if (*hello && !was_accepted && accepted(heads[fd])) say_hello(fd);
    if (!greeted(heads[fd], offsets[fd])) return 0;
    if (protocol == NATS) write_all(fd, "PONG\r\n", 6);
    free(heads[fd]);
    offsets[fd] = NOTHING_FOR_IT;
    return 1;
}

/* Opens clients, never more than `at_once` of them between SYN and greeting. */
static void connect_clients(int wanted, int at_once) {
    int unfinished = 0;
    double deadline = now() + PATIENCE_SECONDS;
    while (wanted || unfinished) {
        for (; wanted && unfinished < at_once; wanted--, unfinished++) open_client();
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, SLEEP_MS);
        for (int i = 0; i < count; i++) unfinished -= step(events[i].data.fd, events[i].events);
        if (now() > deadline) fail("%d handshakes are unfinished", unfinished);
    }
}

/* Drops all clients with a reset, which leaves no port in TIME_WAIT. Nothing may be left to read. */
static void disconnect_clients(void) {
    struct epoll_event event;
    if (client_count && epoll_wait(poller, &event, 1, SETTLE_MS)) fail("a client received more than was published");
    for (int i = 0; i < client_count; i++) {
        setsockopt(clients[i], SOL_SOCKET, SO_LINGER, &(struct linger){.l_onoff = 1}, sizeof(struct linger));
        close(clients[i]);
    }
    client_count = 0;
}

/* Reads what a client has, compares, and returns whether it has come to the goal. */
static int receive(int fd) {
    ssize_t got = recv(fd, buffer, BUFFER, 0);
    if (got < 0 && errno == EAGAIN) return 0; /* a full buffer was all there was */
    if (got <= 0) fail("a client was closed: %s", got ? strerror(errno) : "end of file");
    size_t size = (size_t)got, start = offsets[fd], end = start + size;
    if (start == NOTHING_FOR_IT) fail("a client received what was not for it");
    if (end > goal) fail("a client received %zu bytes too many", end - goal);
    if (end > stream_length) {
        memcpy(stream + stream_length, buffer + (stream_length - start), end - stream_length);
        stream_length = end;
    }
    if (memcmp(stream + start, buffer, size)) fail("clients received different bytes between %zu and %zu", start, end);
    offsets[fd] = end;
    if (end == goal) return 1;
    return size == BUFFER ? receive(fd) : 0; /* edge-triggered: less than asked for means empty */
}

/* Introduces a publisher that sends no requests of their own, and waits until it is welcome. */
static void introduce(struct publisher *publisher) {
    char head[HEAD_LIMIT] = "CONNECT {\"verbose\":true}\r\n";
    const char *until = form == FRAMES ? "\"welcome\"" : form == LINES ? "\r\n\r\n" : "+OK\r\n";
    if (form == FRAMES) compose_handshake(head, -1);
    if (form == LINES)
        sprintf(head, "POST %s/batch HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/x-ndjson\r\n"
                "Transfer-Encoding: chunked\r\n\r\n", publish_path, ntohs(publish_address.sin_port));
    write_all(publisher->fd, head, strlen(head));
    for (int got, length = 0; !memmem(publisher->received, (size_t)length, until, strlen(until)); length += got)
        if ((got = (int)recv(publisher->fd, publisher->received + length, HEAD_LIMIT, 0)) <= 0 || length > HEAD_LIMIT)
            fail("a publisher was answered by %.*s", length, publisher->received);
}

static void open_publisher(struct publisher *publisher) {
    int on = 1;
    struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    *publisher = (struct publisher){.fd = socket(AF_INET, SOCK_STREAM, 0)};
    if (connect(publisher->fd, (struct sockaddr *)&publish_address, sizeof publish_address))
        fail("no connection to publish on: %s", strerror(errno));
    setsockopt(publisher->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(publisher->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(publisher->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (form != POSTS) introduce(publisher);
    watch(publisher->fd, EPOLLIN, EPOLL_CTL_ADD);
    publisher_of[publisher->fd] = publisher;
}

static void close_publisher(struct publisher *publisher) {
    publisher_of[publisher->fd] = NULL;
    if (form == LINES) write_all(publisher->fd, "0\r\n\r\n", 5);
    close(publisher->fd);
    publisher->fd = 0;
}

/* Writes a body, and returns its length. It names its publisher, so that load.py can tell whether one's notifications
 * kept their order. */
static int compose(char body[BODY_LIMIT], struct publisher *publisher, int batch) {
    int length = 0;
    char start[64] = "{";
    if (form == FRAMES) sprintf(start, "{\"type\":\"publish\",\"ref\":\"%d\",", publisher->sent++);
    for (int i = 0; i < batch || !i; i++) {
        const char *open = batch && !i ? "[" : "", *close = !batch ? "" : i < batch - 1 ? "," : "]";
        length += sprintf(body + length, "%s%s\"message\":\"bench\",\"data\":{\"number\":%d,\"by\":\"%03d\",\"pad\":\"%s\"}%s}%s",
                          open, start, number++, (int)(publisher - publishers), padding, target, close);
        if (length > BODY_LIMIT - OBJECT_LIMIT) fail("a batch of %d is too large", batch);
    }
    return length;
}

/* Requests that go out together are one write, as pipelining is meant. */
static void publish(struct publisher *publisher, int requests, int batch) {
    static char body[BODY_LIMIT], out[2 * BODY_LIMIT];
    size_t length = 0;
    for (; requests; requests--) {
        int size = compose(body, publisher, batch);
        if (length + (size_t)size > sizeof out - OBJECT_LIMIT) fail("%d requests of a batch are too large", requests);
        if (form == FRAMES) length += (size_t)frame_text(out + length, body, size);
        else if (form == LINES) length += (size_t)sprintf(out + length, "%x\r\n%s\n\r\n", size + 1, body);
        else if (form == PUBS) length += (size_t)sprintf(out + length, "PUB %s %d\r\n%s\r\n", publish_path, size, body);
        else length += (size_t)sprintf(out + length, "POST %s%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                                  "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%.*s", publish_path,
                                  batch ? "/batch" : "", ntohs(publish_address.sin_port), size, size, body);
    }
    write_all(publisher->fd, out, length);
}

/* Counts the answers in front of the end of a text, moves `at` behind them, and fails where one is an error. */
static int short_answers(struct publisher *publisher, char **at, char *end) {
    static const char *errors[] = {[FRAMES] = "\"error\"", [LINES] = "{\"error\"", [PUBS] = "-ERR"};
    char token[64], *found;
    int count = 0;
    if ((found = memmem(*at, (size_t)(end - *at), errors[form], strlen(errors[form]))))
        fail("a publish was answered by %.*s", (int)(end - found < 200 ? end - found : 200), found);
    for (;; count++) {
        /* On one connection the answers are in the order of the requests. */
        sprintf(token, form == FRAMES ? "\"ref\":\"%d\"" : form == LINES ? "\"recipients\":" : "+OK\r\n", publisher->answered);
        if (!(found = memmem(*at, (size_t)(end - *at), token, strlen(token)))) break;
        *at = found + strlen(token);
        publisher->answered++;
    }
    /* Who publishes over a WebSocket is a client as well, and gets notifications between its answers. */
    if (end - *at > (long)sizeof token) *at = end - sizeof token;
    return count;
}

/* Reads once, and returns how many requests that answered. Anything but success fails. */
static int answers(struct publisher *publisher) {
    char *text = publisher->received, *at = text, *head_end;
    ssize_t got = recv(publisher->fd, text + publisher->length, sizeof publisher->received - 1 - (size_t)publisher->length, 0);
    if (got <= 0) fail("a publishing connection was closed before all was delivered");
    char *end = text + publisher->length + got;
    int count = 0;
    *end = 0;
    if (form != POSTS) count = short_answers(publisher, &at, end);
    else for (; (head_end = strstr(at, "\r\n\r\n")); count++) {
        const char *length_text = strcasestr(at, "\ncontent-length:");
        if (strncmp(at, "HTTP/1.1 2", 10) || !length_text || length_text > head_end)
            fail("a publish was answered by %.*s", (int)strcspn(at, "\r"), at);
        char *next = head_end + 4 + atoi(length_text + 16);
        if (next > end) break;
        at = next;
    }
    publisher->length = (int)(end - at);
    memmove(text, at, (size_t)publisher->length);
    return count;
}

/* Lets the next group receive and nobody else, and returns how many are in it. */
static int next_group(void) {
    int groups = (client_count + group_size - 1) / group_size, members = 0;
    int group = groups ? round_number++ % addressed * GROUP_STEP % groups : 0;
    for (int i = 0; i < client_count; i++) {
        int chosen = i / group_size == group;
        offsets[clients[i]] = chosen ? stream_length : NOTHING_FOR_IT;
        members += chosen;
    }
    snprintf(target, sizeof target, field, group);
    return members;
}

/* Reads until every client has the same, more than before, and no more comes. */
static void drain(size_t before) {
    int behind = client_count;
    goal = STREAM_LIMIT;
    for (double began = now(), last = began; behind;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, sleep_ms < SETTLE_MS ? sleep_ms : SETTLE_MS);
        for (int i = 0; i < ready; i++) receive(events[i].data.fd);
        if (ready) last = now();
        if (now() < last + SETTLE_MS / 1e3) continue;
        for (int i = behind = 0; i < client_count; i++) behind += offsets[clients[i]] != stream_length;
        behind += stream_length == before;
        if (now() > began + PATIENCE_SECONDS) fail("%d clients are missing some of it", behind);
    }
}

/* Publishes, and reads until the group is at the goal and every request is answered. Returns the seconds to the last
 * client's last byte, or, where there is no client, to the last answer. */
static double deliver(int requests, int connections, int depth, int batch) {
    int members = next_group(), behind = frame_bytes ? members : 0, unanswered = requests;
    size_t before = stream_length;
    goal = !frame_bytes ? STREAM_LIMIT : before + (size_t)(requests * (batch ? batch : 1)) * frame_bytes;
    double started = now(), stopped = started;
    for (int i = 0; i < connections && requests; i++) {
        int first = depth < requests ? depth : requests;
        publish(&publishers[i], first, batch);
        requests -= first;
    }
    while (behind || unanswered) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, sleep_ms), timed = behind || !members;
        for (int i = 0; i < ready; i++) {
            struct publisher *publisher = publisher_of[events[i].data.fd];
            if (!publisher) {
                behind -= receive(events[i].data.fd);
                continue;
            }
            int answered = answers(publisher), more = answered < requests ? answered : requests;
            unanswered -= answered;
            requests -= more;
            if (more) publish(publisher, more, batch);
        }
        if (timed) stopped = now(); /* answers that come later don't count */
        if (now() > started + PATIENCE_SECONDS) fail("%d clients and %d answers are missing", behind, unanswered);
    }
    if (!frame_bytes && members) drain(before);
    return stopped - started;
}

static void publish_rounds(int rounds, int requests, int connections, int depth, int batch) {
    for (int i = 0; i < connections; i++) open_publisher(&publishers[i]);
    while (rounds--) printf("%.7f ", deliver(requests, connections, depth, batch));
    for (int i = 0; i < connections; i++) close_publisher(&publishers[i]);
}

static enum form form_named(const char *name) {
    static const char *names[] = {[POSTS] = "posts", [FRAMES] = "frames", [LINES] = "lines", [PUBS] = "pubs"};
    for (enum form each = POSTS; each <= PUBS; each++)
        if (!strcmp(name, names[each])) return each;
    fail("no such form: %s", name);
}

static void obey(const char *command) {
    int a, b, c, d, e;
    char word[16];
    if (sscanf(command, "format %zu %d %d %127s %127s", &frame_bytes, &a, &group_size, field, query) == 5) {
        memset(padding, 'x', (size_t)a);
        memmove(field, field + 1, sizeof field - 1);
        memmove(query, query + 1, sizeof query - 1);
    }
    else if (sscanf(command, "connect %d %d", &a, &b) == 2)
        connect_clients(a, b);
    else if (sscanf(command, "publish %d %d %d %d %d", &a, &b, &c, &d, &e) == 5)
        publish_rounds(a, b, c, d, e);
    else if (sscanf(command, "form %15s", word) == 1)
        form = form_named(word);
    else if (!strcmp(command, "drain\n")) {
        for (int i = 0; i < client_count; i++) offsets[clients[i]] = 0;
        drain(0);
    }
    else if (!strcmp(command, "disconnect\n"))
        disconnect_clients();
    else if (sscanf(command, "address %d", &addressed) != 1 && sscanf(command, "sleep %d", &sleep_ms) != 1)
        fail("no such command: %s", command);
}

static void hand_over_stream(void) {
    printf("%zu\n", stream_length);
    fwrite(stream, 1, stream_length, stdout);
    fflush(stdout);
    stream_length = goal = 0;
}

static struct sockaddr_in local(const char *port) {
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)atoi(port)),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

int main(int argc, char **argv) {
    if (argc != 9) return 2;
    protocol = !strcmp(argv[1], "stream") ? STREAM : !strcmp(argv[1], "nats") ? NATS : WEBSOCKET;
    form = protocol == NATS ? PUBS : POSTS;
    ws_address = local(argv[2]);
    path = argv[3];
    hello = argv[4];
    greetings = atoi(argv[5]);
    publish_address = local(argv[6]);
    publish_path = argv[7];
    header = argv[8];
    if (strlen(hello) > 125) return 2;
    poller = epoll_create1(0);
    for (char command[512]; fgets(command, sizeof command, stdin); hand_over_stream()) obey(command);
}
