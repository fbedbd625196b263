/* A PV guest of 4 MiB without a kernel, for the tests that migrate a machine a hundred times: Xen, libxl and xl treat it
 * as any other, and its memory is there in a second. It counts aloud and checks its memory as workload.c does, in the same
 * words, and suspends when libxl asks it to. One processor, no interrupts, the page tables that it was built with, in
 * which an address is the number of its page times 4096. (A PVH domain has its special pages below 4 GiB, and xl looks at
 * every number of a page up to there, in each round: that takes an emulated processor longer than all the rest.)
 *
 * Sources: Xen's public headers (xen.h, arch-x86/xen.h, elfnote.h, io/console.h, io/xs_wire.h, sched.h), and for what a
 * domain owes its toolstack at a suspension libxenguest (xg_sr_save_x86_pv.c, xg_sr_restore_x86_pv.c).
 */
#include <stdint.h>

enum {
    PAGE_WORDS = 1024, /* of 4 bytes */
    PAGES = 64,        /* under test */
    CHECKS = 4,        /* pages looked at in each beat; one more is changed */
    BEAT_NS = 100000000,
    ANSWER_NS = 1000000, /* from one look for xenstored's answer to the next */
};
enum { UPDATE_VA_MAPPING = 14, SCHED_OP = 29, EVENT_CHANNEL_OP = 32 };
enum { SCHED_SHUTDOWN = 2, SCHED_POLL = 3, EVTCHN_SEND = 4, INVALIDATE = 2 };
enum { PRESENT_WRITABLE_USER = 7 };
enum { POWEROFF = 0, REBOOT = 1, SUSPEND = 2 };
enum { XS_READ = 2, XS_WRITE = 11 };
enum { XENSTORE_RING = 1024, CONSOLE_RING = 2048, LINE_MAX = 128, NUMBER_MAX = 10 };

struct start_info {
    char magic[32];
    uint64_t pages, shared_info;
    uint32_t flags;
    uint64_t store_frame;
    uint32_t store_port;
    uint64_t console_frame;
    uint32_t console_port;
    uint64_t page_tables, page_table_frames, frames; /* the last: where the frame of each page is listed */
};
struct time_info {
    uint32_t version, pad;
    uint64_t tsc, system;
    uint32_t mul;
    int8_t shift;
};
struct console {
    char in[1024], out[CONSOLE_RING];
    uint32_t in_cons, in_prod, out_cons, out_prod;
};
struct store {
    char req[XENSTORE_RING], rsp[XENSTORE_RING];
    uint32_t req_cons, req_prod, rsp_cons, rsp_prod;
};
struct message {
    uint32_t type, id, transaction, len;
};

struct shared_info {
    uint8_t first_vcpu[32];
    struct time_info time;
    uint8_t others[3088 - 32 - sizeof(struct time_info)];
    uint64_t pages, frame_list_list;
};

uint8_t hypercalls[4096] __attribute__((aligned(4096)));
static uint8_t shared_page[4096] __attribute__((aligned(4096)));
static uint64_t frame_list[512] __attribute__((aligned(4096))), frame_list_list[512] __attribute__((aligned(4096)));
static uint32_t memory[PAGES][PAGE_WORDS] __attribute__((aligned(4096)));
static uint32_t generations[PAGES];
static volatile struct start_info *start;
static volatile struct shared_info *const shared = (volatile struct shared_info *)shared_page;
static volatile struct console *console;
static volatile struct store *store;

static const volatile uint64_t *const page_of = (const volatile uint64_t *)0xffff800000000000; /* of each frame: Xen's */

#define barrier() __sync_synchronize()

static long hypercall(uint64_t number, uint64_t first, uint64_t second, uint64_t third)
{
    uint64_t at = (uint64_t)hypercalls + number * 32;
    long result;
    __asm__ volatile("call *%%rax"
                     : "=a"(result), "+D"(first), "+S"(second), "+d"(third)
                     : "0"(at)
                     : "rcx", "r8", "r9", "r10", "r11", "memory", "cc");
    return result;
}

static uint64_t frame_of(const volatile void *at)
{
    return ((const volatile uint64_t *)start->frames)[(uint64_t)at >> 12];
}

static void map_shared(uint64_t entry)
{
    hypercall(UPDATE_VA_MAPPING, (uint64_t)shared_page, entry, INVALIDATE);
}

/* What a restored domain has anew: event channels, every frame, and with them the lists of frames that libxenguest reads. */
static void attach(void)
{
    map_shared(start->shared_info | PRESENT_WRITABLE_USER);
    console = (volatile struct console *)(page_of[start->console_frame] << 12);
    store = (volatile struct store *)(page_of[start->store_frame] << 12);
    for (uint64_t i = 0; i < (start->pages + 511) / 512; i++)
        frame_list[i] = frame_of((const char *)start->frames + i * 4096);
    frame_list_list[0] = frame_of(frame_list);
    shared->frame_list_list = frame_of(frame_list_list);
    shared->pages = start->pages;
}

static void notify(uint32_t port)
{
    barrier();
    hypercall(EVENT_CHANNEL_OP, EVTCHN_SEND, (uint64_t)&port, 0);
}

static uint64_t now_ns(void)
{
    const volatile struct time_info *time = &shared->time;
    uint32_t version, low, high;
    uint64_t then, delta;
    do {
        version = time->version;
        barrier();
        __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
        delta = ((uint64_t)high << 32 | low) - time->tsc;
        delta = time->shift < 0 ? delta >> -time->shift : delta << time->shift;
        then = time->system + (delta >> 32) * time->mul + (((delta & 0xffffffff) * time->mul) >> 32);
        barrier();
    } while ((version & 1) || version != time->version);
    return then;
}

static void rest(uint64_t ns)
{
    struct {
        uint64_t ports;
        uint32_t count;
        uint64_t until;
    } order = {0, 0, now_ns() + ns};
    hypercall(SCHED_OP, SCHED_POLL, (uint64_t)&order, 0);
}

static void say(const char *text)
{
    for (; *text; text++) {
        while (console->out_prod - console->out_cons >= CONSOLE_RING) {
            notify(start->console_port);
            rest(ANSWER_NS);
        }
        console->out[console->out_prod % CONSOLE_RING] = *text;
        barrier();
        console->out_prod++;
    }
    notify(start->console_port);
}

static char *put(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    *at = 0;
    return at;
}

static char *put_number(char *at, uint32_t number)
{
    char digits[NUMBER_MAX + 1], *from = digits + NUMBER_MAX;
    *from = 0;
    do
        *--from = (char)('0' + number % 10);
    while (number /= 10);
    return put(at, from);
}

static void send(const void *data, uint32_t size)
{
    const char *from = data;
    for (; size; size--) {
        store->req[store->req_prod % XENSTORE_RING] = *from++;
        barrier();
        store->req_prod++;
    }
}

static char receive(void)
{
    while (store->rsp_cons == store->rsp_prod)
        rest(ANSWER_NS);
    char found = store->rsp[store->rsp_cons % XENSTORE_RING];
    barrier();
    store->rsp_cons++;
    return found;
}

/* Ask xenstored, one thing at a time; the first `size` - 1 bytes of its answer, as a string. */
static void ask(uint32_t type, const char *data, uint32_t len, char *answer, uint32_t size)
{
    struct message head = {type, 0, 0, len};
    char *at = (char *)&head;
    uint32_t kept = 0;
    send(&head, sizeof head);
    send(data, len);
    notify(start->store_port);
    for (uint32_t i = 0; i < sizeof head; i++)
        at[i] = receive();
    for (uint32_t i = 0; i < head.len; i++) {
        char found = receive();
        if (head.type == type && kept < size - 1)
            answer[kept++] = found;
    }
    answer[kept] = 0;
    notify(start->store_port);
}

static void leave(uint32_t reason)
{
    while (console->out_cons != console->out_prod) /* what has not been read would be lost */
        rest(ANSWER_NS);
    uint64_t console_frame = start->console_frame, store_frame = start->store_frame;
    start->console_frame = page_of[console_frame]; /* frames mean nothing elsewhere: the restorer wants pages */
    start->store_frame = page_of[store_frame];
    map_shared(0);
    if (hypercall(SCHED_OP, SCHED_SHUTDOWN, (uint64_t)&reason, frame_of(start)) == 1) { /* called off: it is still here */
        start->console_frame = console_frame;
        start->store_frame = store_frame;
    }
    attach();
}

/* libxl asks for a suspension by a node, and waits until that is emptied. */
static void obey(void)
{
    static const char node[] = "control/shutdown";
    char wish[16], done[16];
    ask(XS_READ, node, sizeof node, wish, sizeof wish);
    if (!wish[0])
        return;
    ask(XS_WRITE, node, sizeof node, done, sizeof done);
    leave(wish[0] == 's' ? SUSPEND : wish[0] == 'r' ? REBOOT : POWEROFF);
}

static uint32_t word(uint32_t page, uint32_t index)
{
    uint32_t z = (page * PAGE_WORDS + index) * 0x9e3779b9u + generations[page] * 0x85ebca6bu;
    z = (z ^ (z >> 16)) * 0x7feb352du;
    return z ^ (z >> 15);
}

static void fill(uint32_t page)
{
    for (uint32_t i = 0; i < PAGE_WORDS; i++)
        memory[page][i] = word(page, i);
}

static int sound(uint32_t page)
{
    for (uint32_t i = 0; i < PAGE_WORDS; i++)
        if (memory[page][i] != word(page, i))
            return 0;
    return 1;
}

__attribute__((used)) static void run(struct start_info *given)
{
    uint32_t beat, change = 0, look = 0, written = PAGES, checked = 0, bad = 0;
    start = given;
    attach();
    for (uint32_t page = 0; page < PAGES; page++)
        fill(page);
    for (beat = 0;; beat++) {
        char line[LINE_MAX], *end;
        bad += !sound(change);
        generations[change]++;
        fill(change);
        change = (change + 1) % PAGES;
        written++;
        for (int i = 0; i < CHECKS; i++, look = (look + 1) % PAGES)
            bad += !sound(look);
        checked += CHECKS + 1;
        end = put_number(put(line, "HB "), beat);
        end = put_number(put(end, " t="), beat / 10);
        end = put_number(put(end, "."), beat % 10);
        end = put_number(put(end, " written="), written);
        end = put_number(put(end, " checked="), checked);
        end = put_number(put(end, " bad="), bad);
        put(end, "\r\n");
        say(line);
        obey();
        rest(BEAT_NS);
    }
}

#define NOTE(type, size, value) \
    ".long 4, " #size ", " #type "\n.asciz \"Xen\"\n" value "\n.align 4\n"

__asm__(".section .note.Xen, \"a\", @note\n"
        ".align 4\n" /* */
        NOTE(1, 8, ".quad _start")
        NOTE(2, 8, ".quad hypercalls")
        NOTE(3, 8, ".quad 0")                      /* virtual addresses begin at 0 ... */
        NOTE(4, 8, ".quad 0")                      /* ... and so do those in the file */
        NOTE(5, 8, ".asciz \"xen-3.0\"")
        NOTE(6, 5, ".asciz \"beat\"")
        NOTE(8, 8, ".asciz \"generic\"")
        ".text\n"
        ".globl _start\n"
        "_start:\n"
        "cld\n"
        "leaq stack_end(%rip), %rsp\n"
        "movq %rsi, %rdi\n"
        "call run\n"
        ".bss\n"
        ".align 16\n"
        ".skip 16384\n"
        "stack_end:\n"
        ".text\n");
