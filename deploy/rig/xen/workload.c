/* The guest of the Xen rig, whole: the kernel's /init. It fills memory, changes it at a rate, checks what it wrote, and
 * counts aloud on the console, in the words of the demo's guest (korora/demo/serial.py reads both).
 *
 * Settings are `NAME=value` words of the kernel's command line, which the kernel hands to init as environment:
 *   MIB      memory under test, in MiB               (default 4)
 *   RATE     pages changed a second                  (default 0: an idle guest)
 *   BEAT_MS  milliseconds between two heartbeats     (default 100)
 *
 * Every page holds words that follow from its number and its generation. The generations lie apart, so a page that is
 * lost, stale or of another place is found when its turn comes: CHECKS pages a beat, and each page before it is changed.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE_WORDS = 512,   /* of 8 bytes: 4096 bytes */
    PAGES_PER_MIB = 256,
    CHECKS = 32,        /* pages looked at in each beat */
    TICK_MS = 10,       /* the rest between two portions of changes */
    PORTION_MAX = 4096, /* pages changed in one go, so that a guest that lay suspended does not storm */
};

static long setting(const char *name, long usual)
{
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : usual;
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* splitmix64: incompressible, and different in every word */
static uint64_t word(uint64_t page, uint64_t generation, uint64_t index)
{
    uint64_t z = (page * PAGE_WORDS + index) * 0x9e3779b97f4a7c15ull + generation * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void fill(uint64_t *at, uint64_t page, uint64_t generation)
{
    for (uint64_t i = 0; i < PAGE_WORDS; i++)
        at[i] = word(page, generation, i);
}

static int sound(const uint64_t *at, uint64_t page, uint64_t generation)
{
    for (uint64_t i = 0; i < PAGE_WORDS; i++)
        if (at[i] != word(page, generation, i))
            return 0;
    return 1;
}

static void wait_for_ever(const char *why)
{
    printf("GUEST %s: %s\n", why, strerror(errno));
    for (;;)
        pause();
}

int main(void)
{
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) {
        dup2(console, 0);
        dup2(console, 1);
        dup2(console, 2);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);

    uint64_t pages = (uint64_t)setting("MIB", 4) * PAGES_PER_MIB;
    uint64_t rate = (uint64_t)setting("RATE", 0);
    uint64_t pause_ms = (uint64_t)setting("BEAT_MS", 100);
    uint64_t *memory = mmap(NULL, pages * PAGE_WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *generations = calloc(pages, sizeof *generations);
    if (!pages || memory == MAP_FAILED || !generations)
        wait_for_ever("has no memory to test");
    for (uint64_t page = 0; page < pages; page++)
        fill(memory + page * PAGE_WORDS, page, 0);

    uint64_t written = pages, checked = 0, bad = 0, beat = 0;
    uint64_t change = 0, look = 0; /* whose turn it is */
    uint64_t owed = 0;             /* changes due, in thousandths */
    uint64_t start = now_ms(), last = start, next = start;
    for (;;) {
        uint64_t now = now_ms();
        owed += (now - last) * rate;
        last = now;
        if (owed > PORTION_MAX * 1000)
            owed = PORTION_MAX * 1000;
        for (; owed >= 1000; owed -= 1000) {
            uint64_t *at = memory + change * PAGE_WORDS;
            bad += !sound(at, change, generations[change]);
            fill(at, change, ++generations[change]);
            change = (change + 1) % pages;
            checked++;
            written++;
        }
        if (now >= next) {
            for (int i = 0; i < CHECKS; i++) {
                bad += !sound(memory + look * PAGE_WORDS, look, generations[look]);
                look = (look + 1) % pages;
                checked++;
            }
            printf("HB %llu t=%.2f written=%llu checked=%llu bad=%llu\n", (unsigned long long)beat++,
                   (double)(now - start) / 1000, (unsigned long long)written, (unsigned long long)checked,
                   (unsigned long long)bad);
            next = now + pause_ms;
        }
        struct timespec rest = {0, TICK_MS * 1000000};
        nanosleep(&rest, NULL);
    }
}
