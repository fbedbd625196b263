/* A PVH guest of 8 MiB without a kernel, for the tests that migrate a machine a hundred times: Xen, libxl and xl treat
 * it as any other, and its memory is there in a second. It counts aloud and checks its memory as workload.c does, in
 * the same words, and suspends when libxl asks it to. One processor, no paging, no interrupts.
 *
 * Sources: Xen's public headers (xen.h, arch-x86/hvm/start_info.h, hvm/params.h, io/console.h, io/xs_wire.h, sched.h)
 * and docs/misc/pvh.pandoc for the state it is started in.
 */
#include <stdint.h>

enum {
    PAGE_WORDS = 1024, /* of 4 bytes */
    PAGES = 64,        /* under test */
    CHECKS = 4,        /* pages looked at in each beat; one more is changed */
    BEAT_NS = 100000000,
    ANSWER_NS = 1000000, /* from one look for xenstored's answer to the next */
};
enum { MEMORY_OP = 12, SCHED_OP = 29, EVENT_CHANNEL_OP = 32, HVM_OP = 34 };
enum { ADD_TO_PHYSMAP = 7, SCHED_SHUTDOWN = 2, SCHED_POLL = 3, EVTCHN_SEND = 4, HVM_GET_PARAM = 1 };
enum { STORE_PFN = 1, STORE_EVTCHN = 2, CONSOLE_PFN = 17, CONSOLE_EVTCHN = 18 };
enum { POWEROFF = 0, REBOOT = 1, SUSPEND = 2 };
enum { XS_READ = 2, XS_WRITE = 11 };
enum { SELF = 0x7ff0, XENSTORE_RING = 1024, CONSOLE_RING = 2048, LINE_MAX = 128, NUMBER_MAX = 10 };

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

static uint8_t hypercalls[4096] __attribute__((aligned(4096)));
static uint8_t shared[4096] __attribute__((aligned(4096)));
static uint32_t memory[PAGES][PAGE_WORDS] __attribute__((aligned(4096)));
static uint32_t generations[PAGES];
static volatile struct console *console;
static volatile struct store *store;
static uint32_t console_port, store_port;

#define barrier() __asm__ volatile("lock; addl $0, (%%esp)" ::: "memory")

static int hypercall(uint32_t number, uint32_t first, const volatile void *second)
{
    uint32_t at = (uint32_t)hypercalls + number * 32;
    int result;
    __asm__ volatile("call *%%eax"
                     : "=a"(result), "+b"(first), "+c"(second)
                     : "0"(at)
                     : "edx", "esi", "edi", "memory", "cc");
    return result;
}

static void make_hypercalls(void)
{
    uint32_t eax = 0x40000002, ebx, ecx, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
    __asm__ volatile("wrmsr" ::"c"(ebx), "a"((uint32_t)hypercalls), "d"(0));
}

static uint32_t parameter(uint32_t index)
{
    struct {
        uint16_t domain, pad;
        uint32_t index;
        uint64_t value;
    } order = {SELF, 0, index, 0};
    hypercall(HVM_OP, HVM_GET_PARAM, &order);
    return (uint32_t)order.value;
}

/* What a restored domain has anew: event channels, and the place of the page that Xen shares with it. */
static void attach(void)
{
    struct {
        uint16_t domain, size;
        uint32_t space, index, frame;
    } order = {SELF, 0, 0, 0, (uint32_t)shared >> 12};
    hypercall(MEMORY_OP, ADD_TO_PHYSMAP, &order);
    console = (volatile struct console *)(parameter(CONSOLE_PFN) << 12);
    store = (volatile struct store *)(parameter(STORE_PFN) << 12);
    console_port = parameter(CONSOLE_EVTCHN);
    store_port = parameter(STORE_EVTCHN);
}

static void notify(uint32_t port)
{
    barrier();
    hypercall(EVENT_CHANNEL_OP, EVTCHN_SEND, &port);
}

static uint64_t now_ns(void)
{
    const volatile struct time_info *time = (const volatile struct time_info *)(shared + 32);
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
        uint32_t ports, count;
        uint64_t until;
    } order = {0, 0, now_ns() + ns};
    hypercall(SCHED_OP, SCHED_POLL, &order);
}

static void say(const char *text)
{
    for (; *text; text++) {
        while (console->out_prod - console->out_cons >= CONSOLE_RING) {
            notify(console_port);
            rest(ANSWER_NS);
        }
        console->out[console->out_prod % CONSOLE_RING] = *text;
        barrier();
        console->out_prod++;
    }
    notify(console_port);
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
    notify(store_port);
    for (uint32_t i = 0; i < sizeof head; i++)
        at[i] = receive();
    for (uint32_t i = 0; i < head.len; i++) {
        char found = receive();
        if (head.type == type && kept < size - 1)
            answer[kept++] = found;
    }
    answer[kept] = 0;
    notify(store_port);
}

static void leave(uint32_t reason)
{
    while (console->out_cons != console->out_prod) /* the console's page does not move with the machine */
        rest(ANSWER_NS);
    hypercall(SCHED_OP, SCHED_SHUTDOWN, &reason);
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

__attribute__((used)) static void run(void)
{
    uint32_t beat, change = 0, look = 0, written = PAGES, checked = 0, bad = 0;
    make_hypercalls();
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

/* Xen starts it in 32-bit mode with flat segments, paging and interrupts off, and no stack. */
__asm__(".section .note.Xen, \"a\", @note\n"
        ".align 4\n"
        ".long 4, 4, 18\n" /* XEN_ELFNOTE_PHYS32_ENTRY */
        ".asciz \"Xen\"\n"
        ".long _start\n"
        ".text\n"
        ".globl _start\n"
        "_start:\n"
        "cld\n"
        "movl $stack_end, %esp\n"
        "call run\n"
        ".bss\n"
        ".align 16\n"
        ".skip 16384\n"
        "stack_end:\n"
        ".text\n");
