/* ppoll */
#define _GNU_SOURCE
#include "core/core.h"
#include "cpu_relax.h"
#include "faults.h"

#include <time.h>

/* Nanoseconds after a request of a channel, whose GPU wakes nobody, and naps from then on; longer ones after a second. A
 * nap costs some 14 us of a processor, nearly all of it in the kernel, and lasts 50 us longer than asked: of 600 us the
 * core takes 2 % of a processor (3 is the bound), and a first call still ends within 1 ms. */
static const int64_t CHANNEL_SPIN = 100000000, CHANNEL_NAP = 200000, LONG_AFTER = 1000000000, LONG_NAP = 600000;
static const int64_t LATE_AFTER = 1000000; /* nanoseconds; then the device is asked whether it has failed */

int64_t core_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    const int64_t now = (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
    return __builtin_expect(faults_armed, false) ? faults_time(now) : now;
}

/* Until a frontend or another thread rings, or until then. */
static void sleep_until(struct core *core, int64_t now, int64_t until) {
    nfds_t bells = 1;
    uint64_t rung;
    bool idle = !core_anything_came(core);
    core->bells[0] = (struct pollfd){core->nudge, POLLIN, 0};
    for (size_t number = 0; number < core->num_links; number++) {
        struct server_link *link = core->links[number];
        if (link->gone) continue;
        idle &= server_link_lie_down(link);
        core->bells[bells++] = (struct pollfd){link->own_bell, POLLIN, 0};
    }
    if (idle && !atomic_load_explicit(&core->noticed, memory_order_acquire)) {
        const int64_t left = until > now ? until - now : 0;
        const struct timespec timeout = {left / 1000000000, left % 1000000000};
        ppoll(core->bells, bells, until == INT64_MAX ? NULL : &timeout, NULL);
        if (core->bells[0].revents) (void)!read(core->nudge, &rung, sizeof rung);
        for (nfds_t bell = 1; bell < bells; bell++)
            if (core->bells[bell].revents) blockdex_silence(core->bells[bell].fd);
    }
    for (size_t number = 0; number < core->num_links; number++)
        if (!core->links[number]->gone) server_link_get_up(core->links[number]);
}

static bool is_late(struct core *core, int64_t now) {
    int64_t since = core->steps[core->first].launched;
    if (core->looked > since) since = core->looked;
    if (now - since < LATE_AFTER) return false;
    core->looked = now;
    return true;
}

/* One look at everything; -1: it failed. */
static int pass(struct core *core, int64_t now) {
    int why = 0;
    core->passed = now;
    if (!core_land(core, now)) return -1;
    core_drop_gone(core, now);
    if (core->in_flight < CORE_STEPS) {
        if (!core_gather(core, now)) return -1;
        if (core->gathered.runs && !core_begin(core, now)) return -1;
        /* A step that Python ran is done already: its answers do not wait for what Python does next. */
        if (core->run_step && !core_land(core, core_now())) return -1;
    }
    core_publish(core);
    if (core->num_for_python || core->num_to_trim) why |= CORE_FOR_PYTHON;
    if (core->num_set_cells) why |= CORE_SET_CELLS;
    if (core->broken) why |= CORE_BROKEN;
    if (core->in_flight && is_late(core, now)) why |= CORE_LATE;
    if (atomic_exchange_explicit(&core->noticed, 0, memory_order_acq_rel)) why |= CORE_NOTICED;
    return core->no_memory || core->driver_error ? -1 : why;
}

static void wait(struct core *core, int64_t now, int64_t until) {
    const bool any_left = core->turns.count || core->backlog.count || core->waiting.count;
    const bool rung = core->num_channels && now < core->rung + CHANNEL_SPIN;
    if (core->in_flight || rung || now < core->active + core->spin) {
        cpu_relax();
        return;
    }
    if (core_check_integrity(core)) return;
    if (any_left && core->next_deadline < until) until = core->next_deadline;
    const int64_t nap = now < core->rung + LONG_AFTER ? CHANNEL_NAP : LONG_NAP;
    if (core->num_channels && now + nap < until) until = now + nap;
    sleep_until(core, now, until);
}

int core_run(struct core *core, int64_t until) {
    for (;;) {
        int64_t now = core_now();
        int why = pass(core, now);
        if (why || now >= until) return why;
        wait(core, now, until);
    }
}
