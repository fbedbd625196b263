/* Stops a process at one exact point of a migration, for the tests that cut there (LD_PRELOAD).
 *
 * The point that /run/rig/point names is a word that xl is about to write or has written, or a line of a relay's journal
 * that is about to be, or has been, put on the disk:
 *
 *     WHEN xl banner|ready|go|report           WHEN is before or after
 *     WHEN xl stream                           the first MiB of a machine's memory
 *     WHEN source|destination open|prepared|voted|committed|undoing|done|aborted|doubt
 *
 * Whoever comes there first removes that file, writes its process id into /run/rig/stopped, and stops itself as by
 * SIGSTOP: the tests then kill it, cut its network, or let it go on. System calls are made directly, so that this runs
 * with the C library of the host and not of the machine that compiled it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>

enum { TEXT_MAX = 128, PATH_BYTES_MAX = 512, LINE_BYTES_MAX = 4096, STREAM_BYTES = 1 << 20 };

static const char point_path[] = "/run/rig/point", stopped_path[] = "/run/rig/stopped";
static const char fresh_path[] = "/run/rig/stopped.new";

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}

extern int *__errno_location(void);

static long ended(long result)
{
    if (result >= 0)
        return result;
    *__errno_location() = (int)-result;
    return -1;
}

static size_t length(const char *text)
{
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

static int same(const char *a, const char *b, size_t size)
{
    while (size && *a == *b)
        a++, b++, size--;
    return !size;
}

static const char *find(const char *text, size_t size, const char *word)
{
    size_t wanted = length(word);
    for (; size >= wanted; text++, size--)
        if (same(text, word, wanted))
            return text;
    return NULL;
}

static size_t append(char *to, size_t at, const char *text)
{
    while (*text && at < TEXT_MAX - 1)
        to[at++] = *text++;
    to[at] = 0;
    return at;
}

static void reach(const char *when, const char *who, const char *what)
{
    char wanted[TEXT_MAX], here[TEXT_MAX], digits[16], *from = digits + sizeof digits;
    long fd = call(SYS_openat, AT_FDCWD, (long)point_path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return;
    long size = call(SYS_read, fd, (long)wanted, sizeof wanted - 1, 0);
    call(SYS_close, fd, 0, 0, 0);
    size_t at = append(here, append(here, append(here, 0, when), " "), who);
    at = append(here, append(here, at, " "), what);
    if (size != (long)at || !same(wanted, here, at) || call(SYS_unlink, (long)point_path, 0, 0, 0) < 0)
        return; /* not this one, or another process was there first */
    long pid = call(SYS_getpid, 0, 0, 0, 0), rest = pid;
    do
        *--from = (char)('0' + rest % 10);
    while (rest /= 10);
    fd = call(SYS_openat, AT_FDCWD, (long)fresh_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    call(SYS_write, fd, (long)from, digits + sizeof digits - from, 0);
    call(SYS_close, fd, 0, 0, 0);
    call(SYS_rename, (long)fresh_path, (long)stopped_path, 0, 0);
    call(SYS_kill, pid, SIGSTOP, 0, 0);
}

static const char *word_of(const void *data, size_t size)
{
    static const struct {
        const char *says, *name;
    } words[] = {
        {"xl migration receiver ready, send binary domain data.\n", "banner"},
        {"domain received, ready to unpause", "ready"},
        {"domain is yours, you are cleared to unpause", "go"},
        {"my copy unpause results are as follows", "report"},
    };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t wanted = length(words[i].says);
        if ((size == wanted || size == wanted + 1) && same(data, words[i].says, wanted))
            return words[i].name;
    }
    return NULL;
}

ssize_t write(int fd, const void *data, size_t size)
{
    const char *word = word_of(data, size);
    if (word)
        reach("before", "xl", word);
    long result = call(SYS_write, fd, (long)data, (long)size, 0);
    if (word && result == (long)size)
        reach("after", "xl", word);
    return ended(result);
}

/* libxl's helper writes memory with writev, and only memory. */
ssize_t writev(int fd, const struct iovec *parts, int count)
{
    static long written;
    long result = call(SYS_writev, fd, (long)parts, count, 0), before = written;
    if (result > 0)
        written += result;
    if (before < STREAM_BYTES && written >= STREAM_BYTES)
        reach("after", "xl", "stream");
    return ended(result);
}

/* Which side of a hand-over, and which state, a journal's last line tells; whether it is one. */
static int journal_line(int fd, const char **side, char *state)
{
    static const char key[] = "\"state\":\"";
    char path[PATH_BYTES_MAX], link[TEXT_MAX], content[LINE_BYTES_MAX], digits[16], *from = digits + sizeof digits - 1;
    *from = 0;
    for (int rest = fd; rest || !*from; rest /= 10)
        *--from = (char)('0' + rest % 10);
    append(link, append(link, 0, "/proc/self/fd/"), from);
    long size = call(SYS_readlink, (long)link, (long)path, sizeof path, 0);
    if (size <= 0 || !find(path, (size_t)size, "/handover/"))
        return 0;
    *side = find(path, (size_t)size, "-source.") ? "source" : "destination";
    if (*side[0] == 'd' && !find(path, (size_t)size, "-destination."))
        return 0;
    long end = call(SYS_lseek, fd, 0, SEEK_END, 0);
    long start = end > LINE_BYTES_MAX ? end - LINE_BYTES_MAX : 0;
    size = call(SYS_pread64, fd, (long)content, end - start, start);
    const char *found = NULL, *next = content;
    while (size > 0 && (next = find(next, (size_t)(content + size - next), key)) != NULL)
        found = next += length(key);
    if (!found)
        return 0;
    size_t at = 0;
    while (found < content + size && *found != '"' && at < TEXT_MAX - 1)
        state[at++] = *found++;
    state[at] = 0;
    return 1;
}

static int sync_file(long number, int fd)
{
    const char *side;
    char state[TEXT_MAX];
    int line = journal_line(fd, &side, state);
    if (line)
        reach("before", side, state);
    long result = call(number, fd, 0, 0, 0);
    if (line && result == 0)
        reach("after", side, state);
    return (int)ended(result);
}

int fsync(int fd)
{
    return sync_file(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    return sync_file(SYS_fdatasync, fd);
}
