/* blockdex_connect against a thread that answers as no engine does: nothing is left open or mapped, and nothing waits longer
 * than it was told. argv: the case. Prints how the connection went. */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "blockdex_client.h"

enum { PATIENCE = 200 };

static int listening;
static const char *what;

static bool is(const char *name) { return !strcmp(what, name); }

static unsigned files(void) {
    unsigned count = 0;
    DIR *open_files = opendir("/proc/self/fd");
    while (readdir(open_files)) count++;
    closedir(open_files);
    return count;
}

static bool is_mapped(void) {
    char row[512];
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(row, sizeof row, maps)) found |= strstr(row, "memfd:blockdex") != NULL;
    fclose(maps);
    return found;
}

static void send_files(int connected, int count, size_t said, struct blockdex_greeting greeting, int segment) {
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(8 * sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec out = {&greeting, said};
    struct msghdr message = {.msg_iov = &out, .msg_iovlen = 1, .msg_control = control.bytes};
    int fds[8] = {segment, 0, 0, 0, 0, 0, 0, 0};
    message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
    memcpy(CMSG_DATA(header), fds, (size_t)count * sizeof(int));
    if (sendmsg(connected, &message, 0) < 0) exit(2);
}

/* What an engine does, but for one thing. */
static void *answer(void *unused) {
    struct blockdex_hello hello;
    struct blockdex_greeting greeting = {BLOCKDEX_MAGIC, BLOCKDEX_VERSION + is("greeting of another version"), 0};
    struct blockdex_header header = {.magic = BLOCKDEX_MAGIC + is("segment of another kind"),
                                     .version = BLOCKDEX_VERSION + is("segment of another version"),
                                     .slot_bytes = BLOCKDEX_SLOT_BYTES - 128 * is("slots of another size"),
                                     .request_slots = 4 - is("slots whose number is no power of two"),
                                     .answer_slots = 4,
                                     .request_slots_offset = is("slots in the header") ? 0 : 4096,
                                     .answer_slots_offset = 5120,
                                     .request_arena_offset = 6144,
                                     .request_arena_bytes = 1024,
                                     .answer_arena_offset = 7168,
                                     .answer_arena_bytes = 1024 + 64 * is("an arena that ends outside"),
                                     .segment_bytes = 8192};
    /* As long as it says, and shorter than a header. */
    size_t kept = is("short segment") ? 128 : sizeof header;
    if (is("short segment")) header.segment_bytes = kept;
    int connected = accept(listening, NULL, NULL), segment = memfd_create("blockdex", 0);
    if (ftruncate(segment, (off_t)header.segment_bytes + 64 * is("segment of another size")) ||
        pwrite(segment, &header, kept, 0) < 0)
        exit(2);
    if (recv(connected, &hello, sizeof hello, MSG_WAITALL) != sizeof hello) exit(2);
    if (hello.magic != BLOCKDEX_MAGIC || hello.version != BLOCKDEX_VERSION || hello.tenant_bytes != 1) exit(2);
    if (is("no greeting")) usleep(4000 * PATIENCE);
    if (is("refused")) {
        const char refusal[] = "not you";
        char said[sizeof greeting + sizeof refusal - 1];
        greeting.refusal_bytes = sizeof refusal - 1;
        memcpy(said, &greeting, sizeof greeting);
        memcpy(said + sizeof greeting, refusal, sizeof refusal - 1);
        (void)!send(connected, said, sizeof said, 0);
    } else if (is("no files"))
        (void)!send(connected, &greeting, sizeof greeting, 0);
    else if (!is("no greeting") && !is("hung up"))
        send_files(connected,
                   is("two files")    ? 2
                   : is("four files") ? 4
                                      : 3,
                   is("half a greeting") ? 8 : 16, greeting, segment);
    close(segment);
    close(connected);
    return unused;
}

int main(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t size = sizeof address;
    struct blockdex_client client;
    struct blockdex_error error = {0};
    char path[108] = "@";
    pthread_t engine;
    if (argc != 2) return 2;
    what = argv[1];
    listening = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listening, (struct sockaddr *)&address, sizeof(sa_family_t)) || listen(listening, 1) ||
        getsockname(listening, (struct sockaddr *)&address, &size))
        return 2;
    unsigned before = files();
    if (pthread_create(&engine, NULL, answer, NULL)) return 2;
    memcpy(path + 1, address.sun_path + 1, size - sizeof(sa_family_t) - 1);
    int64_t began = blockdex_now();
    bool connected = blockdex_connect(&client, path, "t", PATIENCE / 1e3, &error);
    int64_t took = (blockdex_now() - began) / 1000000;
    pthread_join(engine, NULL);
    if (connected) blockdex_disconnect(&client);
    printf("%s, %s, %d files left, %s\n", connected ? "connected" : error.message,
           took < 3 * PATIENCE ? "in time" : "late", (int)(files() - before), is_mapped() ? "mapped" : "not mapped");
    return 0;
}
