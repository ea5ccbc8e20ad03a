#include "ring/connection.h"

#include <sys/epoll.h>

#include "blockdex_client.h"
#include "ring/regions.h"
#include "wire/request_codec.h"

/* Copying so many bytes takes a tenth of a millisecond, in which other threads may run. */
enum { LONG_BYTES = 1 << 19, MOST_EVENTS = 1024, MOST_FILES = 4 };

/* How long a wait lasts before it looks for signals. */
static const double SLICE_SECONDS = 0.1;

/* Memory of this process that the server has as a region. */
struct lent {
    const uint8_t *memory;
    uint64_t bytes;
    uint32_t region;
};

/* `busy`: a thread uses it without the interpreter's lock. `events`: JSON objects that nobody has asked for yet.
 * `reply`: room for that to a question, while one is asked. */
struct connection {
    PyObject_HEAD
    struct blockdex_client client;
    struct wire_spans columns;
    struct bounds bounds;
    PyObject *events;
    double room_seconds;
    struct lent lent[MAX_REGIONS];
    uint32_t num_lent;
    char *reply;
    pid_t pid;
    int epoll;
    bool busy;
};

/* Keeps what the server tells; of too many, the first. */
static void keep_event(void *context, const char *json, size_t bytes) {
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *events = ((struct connection *)context)->events;
    PyObject *event = PyList_Size(events) < MOST_EVENTS ? PyBytes_FromStringAndSize(json, (Py_ssize_t)bytes) : NULL;
    if (event && PyList_Append(events, event) < 0) PyErr_Clear();
    Py_XDECREF(event);
    PyGILState_Release(state);
}

/* (code, reason, text): the numbers of the text a line each, as `name=value`. */
static PyObject *refusal_of(const struct blockdex_error *error) {
    char text[sizeof error->message];
    const size_t bytes = error->message_bytes - 1;
    for (size_t at = 0; at < bytes; at++) text[at] = error->message[at] ? error->message[at] : '\n';
    PyObject *reason = PyUnicode_DecodeUTF8(error->reason, (Py_ssize_t)strlen(error->reason), "replace");
    PyObject *said = PyUnicode_DecodeUTF8(text, (Py_ssize_t)bytes, "replace");
    if (reason && said) return Py_BuildValue("(kNN)", (unsigned long)error->code, reason, said);
    Py_XDECREF(reason);
    Py_XDECREF(said);
    return NULL;
}

/* Whether this process and thread may use it; an error is set where not. */
static bool may_use(const struct connection *self) {
    if (self->pid != getpid())
        PyErr_Format(PyExc_RuntimeError, "connection: process %d has made it, process %d cannot use it", (int)self->pid,
                     (int)getpid());
    else if (self->busy)
        PyErr_SetString(PyExc_RuntimeError, "connection: another thread uses it");
    else
        return true;
    return false;
}

/* --- Connecting --- */

/* One file that can be read whenever there is something to take. */
static bool watch(struct connection *self) {
    struct epoll_event readable = {.events = EPOLLIN};
    self->epoll = epoll_create1(EPOLL_CLOEXEC);
    return self->epoll >= 0 && !epoll_ctl(self->epoll, EPOLL_CTL_ADD, self->client.client_bell, &readable) &&
           !epoll_ctl(self->epoll, EPOLL_CTL_ADD, self->client.link, &readable);
}

static bool open_connection(struct connection *self, const char *path, const char *tenant, double timeout) {
    struct blockdex_error error;
    bool connected;
    Py_BEGIN_ALLOW_THREADS;
    connected = blockdex_connect(&self->client, path, tenant, timeout, &error);
    Py_END_ALLOW_THREADS;
    if (!connected)
        PyErr_SetString(error.code == BLOCKDEX_UNAUTHENTICATED ? PyExc_PermissionError : PyExc_ConnectionError,
                        error.message);
    else if (!watch(self))
        PyErr_SetFromErrno(PyExc_OSError);
    else
        return true;
    return false;
}

static PyObject *connection_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"path",         "tenant",       "timeout", "num_heads", "max_spans", "max_message_bytes",
                            "spin_seconds", "room_seconds", NULL};
    const char *path, *tenant;
    double timeout, spin_seconds = 50e-6, room_seconds = 2;
    unsigned long long num_heads, max_spans, max_message_bytes;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "ssdKKK|dd:RingConnection", names, &path, &tenant, &timeout,
                                     &num_heads, &max_spans, &max_message_bytes, &spin_seconds, &room_seconds))
        return NULL;
    if (!num_heads || num_heads > UINT32_MAX || !max_spans || max_spans > BLOCKDEX_MAX_SLOTS)
        return PyErr_Format(PyExc_ValueError, "num_heads and max_spans must be 1 to %u, got %llu and %llu",
                            BLOCKDEX_MAX_SLOTS, num_heads, max_spans);
    struct connection *self = (void *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    blockdex_init(&self->client);
    self->epoll = -1;
    self->pid = getpid();
    self->room_seconds = room_seconds;
    self->bounds = (struct bounds){num_heads, max_message_bytes};
    self->events = PyList_New(0);
    if (!self->events || !columns_open(&self->columns, (uint32_t)max_spans)) {
        if (self->events) PyErr_NoMemory();
        Py_DECREF(self);
        return NULL;
    }
    if (!open_connection(self, path, tenant, timeout)) {
        Py_DECREF(self);
        return NULL;
    }
    self->client.spin_seconds = spin_seconds;
    self->client.told = keep_event;
    self->client.context = self;
    return (PyObject *)self;
}

static void disconnect(struct connection *self) {
    blockdex_disconnect(&self->client);
    if (self->epoll >= 0) close(self->epoll);
    self->epoll = -1;
}

static void connection_dealloc(PyObject *object) {
    struct connection *self = (struct connection *)object;
    PyTypeObject *type = Py_TYPE(object);
    disconnect(self);
    columns_close(&self->columns);
    PyMem_Free(self->reply);
    Py_XDECREF(self->events);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *connection_close(PyObject *object, PyObject *unused) {
    struct connection *self = (struct connection *)object;
    (void)unused;
    if (!may_use(self)) return NULL;
    disconnect(self);
    Py_RETURN_NONE;
}

static PyObject *connection_hang_up(PyObject *object, PyObject *unused) {
    struct connection *self = (struct connection *)object;
    (void)unused;
    if (self->pid == getpid() && self->client.link >= 0) shutdown(self->client.link, SHUT_RDWR);
    Py_RETURN_NONE;
}

/* --- Requests --- */

/* Finds what a request needs: at once, or, without the interpreter's lock, as soon as there is room. */
static char *reserve(struct connection *self, struct blockdex_request *slot, double timeout,
                     struct blockdex_error *error) {
    self->client.room_seconds = 0;
    char *payload = blockdex_reserve(&self->client, slot, timeout, error);
    if (payload || self->client.over.code || self->room_seconds <= 0 || strcmp(error->reason, "OVERLOADED"))
        return payload;
    self->client.room_seconds = self->room_seconds;
    self->busy = true;
    Py_BEGIN_ALLOW_THREADS;
    payload = blockdex_reserve(&self->client, slot, timeout, error);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    return payload;
}

static PyObject *ticket_of(struct connection *self, const struct blockdex_request *slot) {
    blockdex_publish(&self->client, slot);
    return PyLong_FromUnsignedLongLong(slot->ticket);
}

/* Where memory lies in what the server was lent: region and offset. False where it does not, or no slot can say it. */
static bool find_place(const struct connection *self, const uint8_t *memory, uint64_t bytes, uint32_t *region,
                       uint64_t *offset) {
    for (uint32_t at = 0; at < self->num_lent; at++) {
        const struct lent *lent = &self->lent[at];
        const uint64_t begin = (uint64_t)((uintptr_t)memory - (uintptr_t)lent->memory);
        if (begin >= lent->bytes || bytes > lent->bytes - begin || begin % 64) continue;
        *region = lent->region;
        *offset = begin;
        return true;
    }
    return false;
}

/* Names regions where tensors lie in them; false where one lies in none that has to. */
static bool name_regions(const struct connection *self, const struct wire_request *request,
                         const struct request_places *places, struct blockdex_request *slot,
                         struct blockdex_error *error) {
    const struct {
        const char *name;
        const uint8_t *memory;
        uint64_t bytes;
        bool must;
        uint32_t *region;
        uint64_t *offset;
    } tensors[] = {
        {"keys", request->keys.data, request->keys.bytes, places->keys_apart, &slot->keys_region, &slot->keys_offset},
        {"queries", request->queries.data, request->queries.bytes, places->queries_apart, &slot->queries_region,
         &slot->queries_offset},
        {"block_ids", places->block_ids, 0, places->block_ids, &slot->block_ids_region, &slot->block_ids_offset},
        {"scores", places->scores, 0, places->scores, &slot->scores_region, &slot->scores_offset},
    };
    for (size_t at = 0; at < sizeof tensors / sizeof *tensors; at++)
        if (tensors[at].memory &&
            !find_place(self, tensors[at].memory, tensors[at].bytes, tensors[at].region, tensors[at].offset) &&
            tensors[at].must)
            return blockdex_fail(error, BLOCKDEX_INVALID_ARGUMENT, "INVALID_REGION",
                                 "%s: must lie in memory that is shared with the server", tensors[at].name);
    slot->payload_bytes = blockdex_parts_of(slot).bytes;
    return true;
}

PyObject *connection_submit(PyObject *connection, const struct wire_request *request,
                            const struct request_places *places, double timeout) {
    struct connection *self = (struct connection *)connection;
    struct wire_tensor keys = request->keys, queries = request->queries;
    struct blockdex_request slot;
    struct blockdex_error error;
    if (PyType_GetSlot(Py_TYPE(connection), Py_tp_dealloc) != (void *)connection_dealloc)
        return PyErr_Format(PyExc_TypeError, "a RingConnection is needed, got %R", connection);
    if (!may_use(self)) return NULL;
    tokens_describe(request, 0, &slot);
    if (!name_regions(self, request, places, &slot, &error)) return refusal_of(&error);
    if (slot.keys_region) keys.bytes = 0;
    if (slot.queries_region) queries.bytes = 0;
    self->client.epoch = request->epoch;
    char *payload = reserve(self, &slot, timeout, &error);
    if (!payload) return refusal_of(&error);
    tokens_write_columns(request, "", &slot, payload);
    if (slot.payload_bytes < LONG_BYTES) {
        tokens_write_tensors(&keys, &queries, &slot, payload, 0, UINT64_MAX);
        return ticket_of(self, &slot);
    }
    self->busy = true;
    Py_BEGIN_ALLOW_THREADS;
    tokens_write_tensors(&keys, &queries, &slot, payload, 0, UINT64_MAX);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    return ticket_of(self, &slot);
}

static PyObject *connection_submit_message(PyObject *object, PyObject *arguments) {
    struct connection *self = (struct connection *)object;
    struct wire_request request = {.spans = &self->columns};
    struct refusal refusal;
    unsigned int kind;
    double timeout;
    const char *bytes;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(arguments, "Iy#d:submit", &kind, &bytes, &size, &timeout) || !may_use(self)) return NULL;
    if (kind >= NUM_KINDS) return PyErr_Format(PyExc_ValueError, "kind must be below %d, got %u", NUM_KINDS, kind);
    request.kind = kind;
    memset(self->columns.counts, 0, sizeof self->columns.counts);
    if (!wire_read(&request, (const uint8_t *)bytes, (size_t)size))
        return PyErr_Format(PyExc_ValueError, "message: %zd bytes are none of a token request", size);
    if (!tokens_fit(&request, &self->bounds, &refusal))
        return Py_BuildValue("(iss)", (int)refusal.code, refusal.reason, refusal.message);
    const struct request_places nowhere = {0};
    return connection_submit(object, &request, &nowhere, timeout);
}

static PyObject *connection_lend(PyObject *object, PyObject *arguments) {
    struct connection *self = (struct connection *)object;
    unsigned long long address, bytes;
    unsigned int region;
    if (!PyArg_ParseTuple(arguments, "KKI:lend", &address, &bytes, &region) || !may_use(self)) return NULL;
    if (self->num_lent == MAX_REGIONS)
        return PyErr_Format(PyExc_ValueError, "region: %u of %d are lent", self->num_lent, MAX_REGIONS);
    self->lent[self->num_lent++] = (struct lent){(const uint8_t *)(uintptr_t)address, bytes, region};
    Py_RETURN_NONE;
}

static PyObject *connection_take_back(PyObject *object, PyObject *region) {
    struct connection *self = (struct connection *)object;
    const unsigned long number = PyLong_AsUnsignedLong(region);
    if (PyErr_Occurred() || !may_use(self)) return NULL;
    for (uint32_t at = self->num_lent; at-- > 0;)
        if (self->lent[at].region == number) self->lent[at] = self->lent[--self->num_lent];
    Py_RETURN_NONE;
}

static PyObject *connection_submit_sequences(PyObject *object, PyObject *arguments) {
    struct connection *self = (struct connection *)object;
    struct blockdex_request slot = {0};
    struct blockdex_error error;
    unsigned long long epoch, sequence_id, child_id, number;
    const char *columns;
    Py_ssize_t bytes;
    double timeout;
    if (!PyArg_ParseTuple(arguments, "HKKKKIy#d:submit_sequences", &slot.kind, &epoch, &sequence_id, &child_id, &number,
                          &slot.num_spans, &columns, &bytes, &timeout) ||
        !may_use(self))
        return NULL;
    const uint64_t cells = slot.kind == BLOCKDEX_SET_PAGE_TABLES ? number : 0;
    const uint64_t words = (uint64_t)slot.num_spans * blockdex_num_columns(slot.kind);
    if (!blockdex_is_lifecycle(slot.kind) || bytes % 8 || cells > (uint64_t)bytes / 8 ||
        words + cells != (uint64_t)bytes / 8)
        return PyErr_Format(PyExc_ValueError, "kind %u of %u rows takes no columns of %zd bytes", slot.kind,
                            slot.num_spans, bytes);
    slot.sequence_id = sequence_id;
    slot.child_id = child_id;
    slot.number = number;
    slot.payload_bytes = (uint64_t)bytes;
    self->client.epoch = epoch;
    char *payload = reserve(self, &slot, timeout, &error);
    if (!payload) return refusal_of(&error);
    if (bytes) memcpy(payload, columns, (size_t)bytes);
    return ticket_of(self, &slot);
}

static PyObject *connection_give_up(PyObject *object, PyObject *ticket) {
    struct connection *self = (struct connection *)object;
    const unsigned long long number = PyLong_AsUnsignedLongLong(ticket);
    if (PyErr_Occurred() || !may_use(self)) return NULL;
    if (!self->client.over.code) blockdex_give_up(&self->client, number);
    Py_RETURN_NONE;
}

/* --- Answers --- */

/* A copy that whoever gets it may write; None where there is none. */
static PyObject *copy_of(const void *from, uint64_t bytes) {
    return from ? PyByteArray_FromStringAndSize(from, (Py_ssize_t)bytes) : Py_NewRef(Py_None);
}

/* (0, epoch, shape, first, second): block ids and scores, or lengths and revisions. */
static PyObject *answer_of(const struct blockdex_result *result) {
    const bool selected = result->block_ids;
    const uint64_t blocks = UINT64_C(4) * result->num_tokens * result->num_heads * result->topk;
    const uint64_t layers = UINT64_C(8) * result->num_layers;
    PyObject *first = selected ? copy_of(result->block_ids, blocks) : copy_of(result->lengths, layers);
    PyObject *second = selected ? copy_of(result->scores, blocks) : copy_of(result->revisions, layers);
    PyObject *shape = selected ? Py_BuildValue("(III)", result->num_tokens, result->num_heads, result->topk)
                               : Py_BuildValue("(I)", result->num_layers);
    if (first && second && shape)
        return Py_BuildValue("(iKNNN)", 0, (unsigned long long)result->epoch, shape, first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    Py_XDECREF(shape);
    return NULL;
}

/* What became of a request that is not in flight any more, which is released. */
static PyObject *outcome_of(struct connection *self, uint64_t ticket, enum blockdex_outcome outcome,
                            const struct blockdex_result *result, const struct blockdex_error *error) {
    if (outcome == BLOCKDEX_FAILED) return refusal_of(error);
    PyObject *answer = answer_of(result);
    blockdex_release(&self->client, ticket);
    return answer;
}

static PyObject *connection_wait(PyObject *object, PyObject *arguments) {
    struct connection *self = (struct connection *)object;
    struct blockdex_result result;
    struct blockdex_error error;
    enum blockdex_outcome outcome;
    unsigned long long ticket;
    double timeout;
    if (!PyArg_ParseTuple(arguments, "Kd:wait", &ticket, &timeout) || !may_use(self)) return NULL;
    const int64_t until = blockdex_until(blockdex_now(), timeout);
    double left = timeout;
    do {
        self->busy = true;
        Py_BEGIN_ALLOW_THREADS;
        outcome = blockdex_wait(&self->client, ticket, left < SLICE_SECONDS ? left : SLICE_SECONDS, &result, &error);
        Py_END_ALLOW_THREADS;
        self->busy = false;
        if (outcome != BLOCKDEX_IN_FLIGHT) return outcome_of(self, ticket, outcome, &result, &error);
        if (PyErr_CheckSignals() < 0) return NULL;
        left = (double)(until - blockdex_now()) / 1e9;
    } while (left > 0);
    Py_RETURN_NONE;
}

/* Adds all answers that are there to a list. */
static bool take_all(struct connection *self, PyObject *list) {
    struct blockdex_result result;
    struct blockdex_error error;
    for (uint64_t ticket; (ticket = blockdex_oldest(&self->client));) {
        const enum blockdex_outcome outcome = blockdex_wait(&self->client, ticket, 0, &result, &error);
        PyObject *answer = outcome_of(self, ticket, outcome, &result, &error);
        PyObject *item = answer ? Py_BuildValue("(KN)", (unsigned long long)ticket, answer) : NULL;
        const bool added = item && PyList_Append(list, item) == 0;
        Py_XDECREF(item);
        if (!added) return false;
    }
    return true;
}

static PyObject *connection_poll(PyObject *object, PyObject *unused) {
    struct connection *self = (struct connection *)object;
    (void)unused;
    if (!may_use(self)) return NULL;
    PyObject *list = PyList_New(0);
    bool taken = list;
    do {
        taken = taken && take_all(self, list);
    } while (taken && !self->client.over.code && !blockdex_may_wait(&self->client));
    if (!taken) Py_CLEAR(list);
    return list;
}

static PyObject *connection_take_events(PyObject *object, PyObject *unused) {
    struct connection *self = (struct connection *)object;
    (void)unused;
    if (!may_use(self)) return NULL;
    PyObject *fresh = PyList_New(0), *events = self->events;
    if (!fresh) return NULL;
    self->events = fresh;
    return events;
}

/* The files of a sequence; -1 with an error set where it is none. */
static int read_files(PyObject *sequence, int files[MOST_FILES]) {
    const Py_ssize_t count = PySequence_Size(sequence);
    if (count > MOST_FILES) PyErr_Format(PyExc_ValueError, "files: at most %d, got %zd", MOST_FILES, count);
    for (Py_ssize_t at = 0; at < count && !PyErr_Occurred(); at++) {
        PyObject *item = PySequence_GetItem(sequence, at);
        files[at] = item ? PyObject_AsFileDescriptor(item) : -1;
        Py_XDECREF(item);
    }
    return PyErr_Occurred() ? -1 : (int)count;
}

static void drop_reply(struct connection *self) {
    self->client.reply = NULL;
    PyMem_Free(self->reply);
    self->reply = NULL;
}

static PyObject *connection_ask(PyObject *object, PyObject *arguments) {
    struct connection *self = (struct connection *)object;
    struct blockdex_error error;
    const char *question;
    PyObject *sequence, *reply = NULL;
    double timeout;
    int files[MOST_FILES], count;
    bool answered;
    if (!PyArg_ParseTuple(arguments, "sOd:ask", &question, &sequence, &timeout) ||
        (count = read_files(sequence, files)) < 0 || !may_use(self))
        return NULL;
    char *text = PyMem_Malloc(BLOCKDEX_LONGEST_TOLD);
    if (!text) return PyErr_NoMemory();
    drop_reply(self);
    self->busy = true;
    Py_BEGIN_ALLOW_THREADS;
    answered =
        blockdex_ask(&self->client, question, files, (size_t)count, text, BLOCKDEX_LONGEST_TOLD, timeout, &error);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    reply = answered ? PyBytes_FromString(text) : refusal_of(&error);
    PyMem_Free(text);
    return reply;
}

static PyObject *connection_begin_question(PyObject *object, PyObject *arguments) {
    struct connection *self = (struct connection *)object;
    struct blockdex_error error;
    const char *question;
    PyObject *sequence;
    int files[MOST_FILES], count;
    if (!PyArg_ParseTuple(arguments, "sO:begin_question", &question, &sequence) ||
        (count = read_files(sequence, files)) < 0 || !may_use(self))
        return NULL;
    /* A reply that nobody has taken yet is passed over when it comes. */
    if (!self->reply && !(self->reply = PyMem_Malloc(BLOCKDEX_LONGEST_TOLD))) return PyErr_NoMemory();
    if (blockdex_begin_question(&self->client, question, files, (size_t)count, self->reply, BLOCKDEX_LONGEST_TOLD,
                                &error))
        Py_RETURN_NONE;
    drop_reply(self);
    return refusal_of(&error);
}

static PyObject *connection_take_reply(PyObject *object, PyObject *unused) {
    struct connection *self = (struct connection *)object;
    struct blockdex_error error;
    (void)unused;
    if (!may_use(self)) return NULL;
    if (blockdex_is_over(&self->client, &error)) return refusal_of(&error);
    if (!self->reply || self->client.reply) Py_RETURN_NONE;
    const bool answered = blockdex_end_question(&self->client, self->reply, &error);
    PyObject *reply = answered ? PyBytes_FromString(self->reply) : refusal_of(&error);
    drop_reply(self);
    return reply;
}

static PyObject *connection_fileno(PyObject *object, PyObject *unused) {
    (void)unused;
    return PyLong_FromLong(((struct connection *)object)->epoll);
}

static PyObject *get_over(PyObject *object, void *unused) {
    const struct connection *self = (struct connection *)object;
    (void)unused;
    return self->client.over.code ? refusal_of(&self->client.over) : Py_NewRef(Py_None);
}

static PyObject *get_epoch(PyObject *object, void *unused) {
    const struct connection *self = (struct connection *)object;
    const struct blockdex_header *header = self->client.segment.header;
    (void)unused;
    return PyLong_FromUnsignedLongLong(header ? header->epoch : 0);
}

static PyMethodDef methods[] = {
    {"submit", connection_submit_message, METH_VARARGS, "Sends a token request as protobuf; its ticket, or a refusal."},
    {"submit_sequences", connection_submit_sequences, METH_VARARGS, "Sends a request about sequences."},
    {"give_up", connection_give_up, METH_O, "Throws the answer of a ticket away."},
    {"wait", connection_wait, METH_VARARGS, "The answer to a ticket; None where it does not come in time."},
    {"poll", connection_poll, METH_NOARGS, "All answers that are there, by ticket; `fileno` tells of the next."},
    {"take_events", connection_take_events, METH_NOARGS, "What the server has told since the last call."},
    {"ask", connection_ask, METH_VARARGS, "Asks the server something beside the ring, and waits for its reply."},
    {"begin_question", connection_begin_question, METH_VARARGS, "The same, without waiting; a refusal, or None."},
    {"take_reply", connection_take_reply, METH_NOARGS, "The reply to it once `poll` has heard it, else None."},
    {"lend", connection_lend, METH_VARARGS, "Requests name a region where their tensors lie in it."},
    {"take_back", connection_take_back, METH_O, "They name it no more."},
    {"fileno", connection_fileno, METH_NOARGS, "Can be read when there is something to take."},
    {"hang_up", connection_hang_up, METH_NOARGS, "Ends the link, and all waits; from any thread."},
    {"close", connection_close, METH_NOARGS, "Gives everything back."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"over", get_over, NULL, "Why the link is over; None while it is not.", NULL},
    {"epoch", get_epoch, NULL, "The cache's when the link began.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "A client's link to a server on the same host; one thread at a time."},
    {Py_tp_new, connection_new},
    {Py_tp_dealloc, connection_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {0, NULL},
};

PyType_Spec blockdex_connection_spec = {
    .name = "blockdex._native.RingConnection",
    .basicsize = sizeof(struct connection),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};
