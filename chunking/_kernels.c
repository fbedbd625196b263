/* The inner loops over pages: fingerprints, classification at the source, rebuilding at the destination.
 *
 * chunking/fallback.py does the same in numpy, and both are held to the same results. Buffers come with their lengths
 * and every one is checked here against what it must hold; locations, slots and counts may be a hostile peer's, so each
 * is compared with its buffer before use. The interpreter lock is not held in the loops.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define PAGE 4096u
#define WORDS 512u
#define MASK_BYTES 64u
#define WAYS 4u
#define SKIPS_MAX 64u
#define BLOCK 16u /* pages looked at ahead: 64 KiB, which the second cache of a core holds */
#define COMMIT_SLOTS 512u
#define NONE 0xFFFFFFFFu

enum { ZERO, REF, DELTA, LITERAL, COPY };

static uint64_t multipliers[WORDS];

static uint64_t mix(uint64_t v) {
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
    v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
    return v ^ (v >> 31);
}

static uint64_t load64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint32_t load32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Loops that wider registers make quicker: the loader takes the version that the processor has. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif

/* Multilinear over the words, each folded so that its high half reaches the low bits. 0 says that a slot is empty. */
CLONES static uint64_t fingerprint(const uint8_t *page) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t w = load64(page + 8 * i);
        sum += (w ^ (w >> 32)) * multipliers[i];
    }
    sum = mix(sum);
    return sum ? sum : 1;
}

CLONES static int is_zero(const uint8_t *page) {
    for (unsigned at = 0; at < PAGE; at += 256) {
        uint64_t any = 0;
        for (unsigned i = 0; i < 256; i += 8)
            any |= load64(page + at + i);
        if (any)
            return 0;
    }
    return 1;
}

/* The arena's memory is committed when slots are first written: in pieces of 2 MiB, because a fault for each page costs
 * half as much again. Where the kernel cannot do that (before Linux 5.14) or need not, nothing is lost. */
static void commit(uint8_t *arena, size_t slots, uint32_t slot) {
#ifdef __linux__
    if (slot % COMMIT_SLOTS == 0) {
        size_t count = slots - slot < COMMIT_SLOTS ? slots - slot : COMMIT_SLOTS;
        (void)madvise(arena + (size_t)slot * PAGE, count * PAGE, 23 /* MADV_POPULATE_WRITE */);
    }
#else
    (void)arena, (void)slots, (void)slot;
#endif
}

/* Into the arena, past the caches: a new page is rarely read again soon, and fetching what it replaces costs as much. */
static void stream_page(uint8_t *to, const uint8_t *from) {
#ifdef __SSE2__
    if (((uintptr_t)to & 15) == 0) {
        for (unsigned i = 0; i < PAGE; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
        return;
    }
#endif
    memcpy(to, from, PAGE);
}

static void streamed(void) {
#ifdef __SSE2__
    _mm_sfence(); /* before another thread may look */
#endif
}
/* Changed words of a page: their mask and what they differ by. Returns their number, or max + 1 if there are more. */
static unsigned difference(const uint8_t *page, const uint8_t *base, unsigned max, uint8_t *mask, uint8_t *values) {
    unsigned count = 0;
    for (unsigned byte = 0; byte < MASK_BYTES; byte++) {
        const uint8_t *p = page + 64 * byte, *b = base + 64 * byte;
        unsigned bits = 0;
        uint64_t changed[8], any = 0;
        for (unsigned i = 0; i < 8; i++)
            any |= changed[i] = load64(p + 8 * i) ^ load64(b + 8 * i);
        if (any) {
            for (unsigned i = 0; i < 8; i++)
                if (changed[i]) {
                    if (count == max)
                        return max + 1;
                    bits |= 1u << i;
                    memcpy(values + 8 * (size_t)count++, &changed[i], 8);
                }
        }
        mask[byte] = (uint8_t)bits;
    }
    return count;
}

/* ---- buffers of a call */

#define BUFFERS_MAX 16

typedef struct {
    Py_buffer views[BUFFERS_MAX];
    int count;
} Buffers;

static void release(Buffers *held) {
    while (held->count)
        PyBuffer_Release(&held->views[--held->count]);
}

/* Takes the arguments as contiguous buffers: `how` has a letter each, r to read, w to write, - for no buffer. */
static int take(Buffers *held, PyObject *const *args, Py_ssize_t nargs, const char *how) {
    held->count = 0;
    if ((size_t)nargs != strlen(how)) {
        PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
        return -1;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        int flags = how[i] == 'w' ? PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE : PyBUF_C_CONTIGUOUS;
        if (how[i] == '-')
            continue;
        if (PyObject_GetBuffer(args[i], &held->views[held->count], flags) < 0) {
            release(held);
            return -1;
        }
        held->count++;
    }
    return 0;
}

static PyObject *refuse(Buffers *held, const char *what) {
    release(held);
    PyErr_SetString(PyExc_ValueError, what);
    return NULL;
}

static uint8_t *at(const Buffers *held, int i) { return (uint8_t *)held->views[i].buf; }
static size_t size(const Buffers *held, int i) { return (size_t)held->views[i].len; }

/* Whether every page of `n` offsets lies within `bytes`. */
static int pages_inside(const uint8_t *offsets, size_t n, size_t bytes) {
    for (size_t i = 0; i < n; i++)
        if ((size_t)load32(offsets + 4 * i) + PAGE > bytes)
            return 0;
    return 1;
}

/* ---- fingerprints(raw, offsets, out) */

static PyObject *py_fingerprints(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    Buffers b;
    (void)module;
    if (take(&b, args, nargs, "rrw") < 0)
        return NULL;
    size_t n = size(&b, 1) / 4;
    if (size(&b, 2) != 8 * n || !pages_inside(at(&b, 1), n, size(&b, 0)))
        return refuse(&b, "a page lies outside of its buffer");
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < n; i++) {
        uint64_t print = fingerprint(at(&b, 0) + load32(at(&b, 1) + 4 * i));
        memcpy(at(&b, 2) + 8 * i, &print, 8);
    }
    Py_END_ALLOW_THREADS
    release(&b);
    Py_RETURN_NONE;
}

/* ---- classify */

typedef struct {
    uint8_t *arena;
    uint32_t *buckets;
    uint64_t *prints;
    uint8_t *referenced;
    uint64_t *state; /* the hand of the ring, slots filled */
    size_t slots;
    uint64_t mask;
} Index;

static uint32_t find(const Index *x, uint64_t print, const uint8_t *page) {
    const uint32_t *bucket = x->buckets + WAYS * (print & x->mask);
    for (unsigned way = 0; way < WAYS; way++) {
        uint32_t slot = bucket[way];
        if (slot < x->slots && x->prints[slot] == print && !memcmp(x->arena + (size_t)slot * PAGE, page, PAGE))
            return slot;
    }
    return NONE;
}

static uint32_t take_slot(const Index *x) {
    size_t hand = (size_t)x->state[0];
    for (unsigned skips = 0; x->referenced[hand] && skips < SKIPS_MAX; skips++) {
        x->referenced[hand] = 0;
        hand = hand + 1 == x->slots ? 0 : hand + 1;
    }
    x->referenced[hand] = 0;
    x->state[0] = hand + 1 == x->slots ? 0 : hand + 1;
    x->state[1] += !x->prints[hand];
    return (uint32_t)hand;
}

static void insert(const Index *x, uint32_t slot, uint64_t print) {
    uint32_t *bucket = x->buckets + WAYS * (print & x->mask);
    unsigned chosen = (unsigned)(print >> 62);
    x->prints[slot] = print;
    for (unsigned way = 0; way < WAYS; way++) {
        uint32_t held = bucket[way];
        if (held == slot || held >= x->slots || (x->prints[held] & x->mask) != (print & x->mask)) {
            chosen = way;
            break;
        }
    }
    bucket[chosen] = slot;
}

typedef struct {
    uint8_t *kinds, *masks, *values, *literals;
    uint32_t *locations, *slots;
    uint64_t *prints;
    size_t deltas, words, literal_count;
    unsigned words_max;
} Found;

static void classify_one(const Index *x, Found *f, size_t i, const uint8_t *page, uint32_t base) {
    uint64_t print = f->prints[i];
    f->locations[i] = f->slots[i] = NONE;
    if (!print) {
        f->kinds[i] = ZERO;
        return;
    }
    uint32_t slot = find(x, print, page);
    f->kinds[i] = LITERAL;
    if (slot != NONE) {
        f->kinds[i] = REF;
    } else if (f->words_max && base < x->slots) {
        /* The base is read before the new slot is written: they may be the same. */
        unsigned count = difference(page, x->arena + (size_t)base * PAGE, f->words_max, f->masks + MASK_BYTES * f->deltas,
                                    f->values + 8 * f->words);
        if (count == 0) {
            f->kinds[i] = REF;
            slot = base;
        } else if (count <= f->words_max) {
            f->kinds[i] = DELTA;
            f->locations[i] = base;
            f->deltas++;
            f->words += count;
        }
    }
    if (f->kinds[i] == REF) {
        f->locations[i] = slot;
        x->referenced[slot] = 1;
        return;
    }
    if (f->kinds[i] == LITERAL)
        memcpy(f->literals + PAGE * f->literal_count++, page, PAGE);
    slot = take_slot(x);
    f->slots[i] = slot;
    commit(x->arena, x->slots, slot);
    stream_page(x->arena + (size_t)slot * PAGE, page);
    insert(x, slot, print);
}

static void classify(const Index *x, Found *f, const uint8_t *raw, const uint8_t *offsets, const uint8_t *bases, size_t n) {
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t end = start + BLOCK < n ? start + BLOCK : n;
        for (size_t i = start; i < end; i++) {
            const uint8_t *page = raw + load32(offsets + 4 * i);
            f->prints[i] = is_zero(page) ? 0 : fingerprint(page);
            __builtin_prefetch(x->buckets + WAYS * (f->prints[i] & x->mask));
        }
        for (size_t i = start; i < end; i++)
            for (unsigned way = 0; f->prints[i] && way < WAYS; way++) {
                uint32_t slot = x->buckets[WAYS * (f->prints[i] & x->mask) + way];
                if (slot < x->slots)
                    __builtin_prefetch(x->prints + slot);
            }
        for (size_t i = start; i < end; i++)
            classify_one(x, f, i, raw + load32(offsets + 4 * i), load32(bases + 4 * i));
    }
}

/* classify(raw, offsets, bases, arena, buckets, prints, referenced, state, words_max,
 *          kinds, locations, slots, page_prints, masks, values, literals) -> (deltas, delta words, literals) */
static PyObject *py_classify(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    Buffers b;
    (void)module;
    if (take(&b, args, nargs, "rrrwwwww-wwwwwww") < 0)
        return NULL;
    unsigned long words_max = PyLong_AsUnsignedLong(args[8]);
    if (PyErr_Occurred()) {
        release(&b);
        return NULL;
    }
    size_t n = size(&b, 1) / 4, slots = size(&b, 3) / PAGE, buckets = size(&b, 4) / (4 * WAYS);
    if (words_max > WORDS || !slots || slots >= NONE || size(&b, 3) % PAGE || !buckets || (buckets & (buckets - 1)))
        return refuse(&b, "a cache of impossible size");
    if (size(&b, 2) != 4 * n || size(&b, 4) % (4 * WAYS) || size(&b, 5) != 8 * slots || size(&b, 6) != slots ||
        size(&b, 7) != 16 || size(&b, 8) != n || size(&b, 9) != 4 * n || size(&b, 10) != 4 * n ||
        size(&b, 11) != 8 * n || size(&b, 12) < MASK_BYTES * (n + 1) || size(&b, 13) < 8 * words_max * (n + 1) ||
        size(&b, 14) < PAGE * n || ((uint64_t *)at(&b, 7))[0] >= slots)
        return refuse(&b, "buffers that do not fit together");
    if (!pages_inside(at(&b, 1), n, size(&b, 0)))
        return refuse(&b, "a page lies outside of its buffer");
    Index x = {at(&b, 3), (uint32_t *)at(&b, 4), (uint64_t *)at(&b, 5), at(&b, 6), (uint64_t *)at(&b, 7), slots, buckets - 1};
    Found f = {.kinds = at(&b, 8), .locations = (uint32_t *)at(&b, 9), .slots = (uint32_t *)at(&b, 10),
               .prints = (uint64_t *)at(&b, 11), .masks = at(&b, 12), .values = at(&b, 13), .literals = at(&b, 14),
               .words_max = (unsigned)words_max};
    Py_BEGIN_ALLOW_THREADS
    classify(&x, &f, at(&b, 0), at(&b, 1), at(&b, 2), n);
    streamed();
    Py_END_ALLOW_THREADS
    release(&b);
    return Py_BuildValue("nnn", (Py_ssize_t)f.deltas, (Py_ssize_t)f.words, (Py_ssize_t)f.literal_count);
}

/* ---- rebuild */

typedef struct {
    uint8_t *out, *arena;
    const uint8_t *stored, *masks, *values, *literals;
    size_t out_bytes, slots, stored_pages, deltas, words, literal_count; /* the last three: what is left */
} Rebuild;

static const char *apply_delta(Rebuild *r, uint8_t *page) {
    if (!r->deltas)
        return "fewer deltas than pages want";
    for (unsigned byte = 0; byte < MASK_BYTES; byte++)
        for (unsigned bits = r->masks[byte], i = 0; bits; bits >>= 1, i++)
            if (bits & 1) {
                uint8_t *word = page + 64 * byte + 8 * i;
                if (!r->words)
                    return "fewer changed words than pages want";
                uint64_t value = load64(word) ^ load64(r->values);
                memcpy(word, &value, 8);
                r->values += 8;
                r->words--;
            }
    r->masks += MASK_BYTES;
    r->deltas--;
    return NULL;
}

static const char *rebuild_one(Rebuild *r, uint8_t kind, uint32_t offset, uint32_t location, uint32_t slot, uint32_t row) {
    if ((size_t)offset + PAGE > r->out_bytes)
        return "a page lies outside of the frame";
    uint8_t *page = r->out + offset;
    const uint8_t *from = NULL;
    if (kind == ZERO) {
        memset(page, 0, PAGE);
        return NULL;
    }
    if (kind > COPY)
        return "an unknown kind of page";
    if (kind == LITERAL) {
        if (!r->literal_count)
            return "fewer literals than pages want";
        from = r->literals;
        r->literals += PAGE;
        r->literal_count--;
    } else if (row == NONE) {
        if (location >= r->slots)
            return "a location out of range";
        from = r->arena + (size_t)location * PAGE;
    } else {
        if (row >= r->stored_pages)
            return "a location out of range";
        from = r->stored + (size_t)row * PAGE;
    }
    memcpy(page, from, PAGE);
    if (kind == REF)
        return NULL;
    if (kind == DELTA) {
        const char *wrong = apply_delta(r, page);
        if (wrong)
            return wrong;
    }
    if (slot >= r->slots)
        return "a slot out of range";
    commit(r->arena, r->slots, slot);
    stream_page(r->arena + (size_t)slot * PAGE, page);
    return NULL;
}

/* rebuild(out, offsets, kinds, locations, slots, arena, stored, rows, masks, values, literals) */
static PyObject *py_rebuild(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    Buffers b;
    (void)module;
    if (take(&b, args, nargs, "wrrrrwrrrrr") < 0)
        return NULL;
    size_t n = size(&b, 1) / 4;
    if (size(&b, 2) != n || size(&b, 3) != 4 * n || size(&b, 4) != 4 * n || size(&b, 7) != 4 * n)
        return refuse(&b, "buffers that do not fit together");
    Rebuild r = {.out = at(&b, 0), .arena = at(&b, 5), .stored = at(&b, 6), .masks = at(&b, 8), .values = at(&b, 9),
                 .literals = at(&b, 10), .out_bytes = size(&b, 0), .slots = size(&b, 5) / PAGE,
                 .stored_pages = size(&b, 6) / PAGE, .deltas = size(&b, 8) / MASK_BYTES, .words = size(&b, 9) / 8,
                 .literal_count = size(&b, 10) / PAGE};
    const char *wrong = NULL;
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < n && !wrong; i++)
        wrong = rebuild_one(&r, at(&b, 2)[i], load32(at(&b, 1) + 4 * i), load32(at(&b, 3) + 4 * i),
                            load32(at(&b, 4) + 4 * i), load32(at(&b, 7) + 4 * i));
    streamed();
    Py_END_ALLOW_THREADS
    if (!wrong && (r.deltas || r.words || r.literal_count))
        wrong = "more changed words or literals than pages want";
    if (wrong)
        return refuse(&b, wrong);
    release(&b);
    Py_RETURN_NONE;
}

/* ---- gather_runs(raw, runs, other, words), scatter_runs(out, runs, other, words) */

static const char *move_runs(const Buffers *b, int gather) {
    uint8_t *whole = at(b, 0), *runs = at(b, 1), *other = at(b, 2), *words = at(b, 3);
    size_t left = size(b, 0), other_left = size(b, 2), words_left = size(b, 3), n = size(b, 1) / 12;
    for (size_t i = 0; i < n; i++) {
        size_t o = load32(runs + 12 * i), w = 8 * (size_t)load32(runs + 12 * i + 4), p = (size_t)load32(runs + 12 * i + 8) * PAGE;
        if (o > other_left || w > words_left || o + w + p > left)
            return "runs do not cover their buffers";
        if (gather) {
            memcpy(other, whole, o);
            memcpy(words, whole + o, w);
        } else {
            memcpy(whole, other, o);
            memcpy(whole + o, words, w);
        }
        whole += o + w + p;
        other += o;
        words += w;
        left -= o + w + p;
        other_left -= o;
        words_left -= w;
    }
    return left || other_left || words_left ? "runs do not cover their buffers" : NULL;
}

static PyObject *py_runs(PyObject *const *args, Py_ssize_t nargs, const char *how, int gather) {
    Buffers b;
    if (take(&b, args, nargs, how) < 0)
        return NULL;
    const char *wrong;
    Py_BEGIN_ALLOW_THREADS
    wrong = move_runs(&b, gather);
    Py_END_ALLOW_THREADS
    if (wrong)
        return refuse(&b, wrong);
    release(&b);
    Py_RETURN_NONE;
}

static PyObject *py_gather_runs(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return py_runs(args, nargs, "rrww", 1);
}

static PyObject *py_scatter_runs(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return py_runs(args, nargs, "wrrr", 0);
}

/* ---- the module */

static PyMethodDef methods[] = {
    {"fingerprints", (PyCFunction)(void (*)(void))py_fingerprints, METH_FASTCALL, NULL},
    {"classify", (PyCFunction)(void (*)(void))py_classify, METH_FASTCALL, NULL},
    {"rebuild", (PyCFunction)(void (*)(void))py_rebuild, METH_FASTCALL, NULL},
    {"gather_runs", (PyCFunction)(void (*)(void))py_gather_runs, METH_FASTCALL, NULL},
    {"scatter_runs", (PyCFunction)(void (*)(void))py_scatter_runs, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static int start(PyObject *module) {
    uint64_t state = 0x4B6F726F7261u;
    (void)module;
    for (unsigned i = 0; i < WORDS; i++)
        multipliers[i] = mix(state += 0x9E3779B97F4A7C15u) | 1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)start}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_doc = "The inner loops over pages.", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
