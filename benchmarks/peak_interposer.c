/* Counts the bytes a process holds from malloc: LD_PRELOAD this library, then read and reset the count through ctypes.
 *
 * Every block of at least COUNTED_FROM usable bytes counts with its malloc_usable_size; smaller ones (Python objects,
 * bookkeeping) are left out, tensors are not. Blocks of at least KEPT_FROM from posix_memalign count a second time
 * on their own: PyTorch's allocator takes all its memory there, Python and LLVM take theirs elsewhere, and a kernel
 * that oneDNN has compiled is smaller. They tell what a step keeps between its runs (an arena, a tensor) from what
 * libraries load.
 * mmap is not counted: no CPU kernel of PyTorch maps its tensors.
 * The next definition of each function is looked up with dlsym; what dlsym itself allocates meanwhile comes from a
 * small static area. Any thread may allocate and any thread may read.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define COUNTED_FROM 4096
#define KEPT_FROM (1 << 20)

static _Atomic long long live_bytes, peak_bytes, tensor_bytes;

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void (*next_free)(void *);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static void *(*next_memalign)(size_t, size_t);

static char early[65536];
static size_t early_used;

static int is_early(const void *block) { return (const char *)block >= early && (const char *)block < early + sizeof early; }

static void *early_alloc(size_t size) {
    size_t start = (early_used + 15) & ~(size_t)15;
    if (size > sizeof early - start) return NULL;
    early_used = start + size;
    return early + start;
}

static void look_up(void) {
    static _Thread_local int looking;
    if (next_free || looking) return;
    looking = 1;
    next_malloc = dlsym(RTLD_NEXT, "malloc");
    next_calloc = dlsym(RTLD_NEXT, "calloc");
    next_realloc = dlsym(RTLD_NEXT, "realloc");
    next_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    next_aligned_alloc = dlsym(RTLD_NEXT, "aligned_alloc");
    next_memalign = dlsym(RTLD_NEXT, "memalign");
    next_free = dlsym(RTLD_NEXT, "free");
    looking = 0;
}

static size_t counted(void *block) {
    size_t size = block && !is_early(block) ? malloc_usable_size(block) : 0;
    return size >= COUNTED_FROM ? size : 0;
}

static void add(size_t size) {
    if (!size) return;
    long long now = atomic_fetch_add_explicit(&live_bytes, (long long)size, memory_order_relaxed) + (long long)size;
    long long peak = atomic_load_explicit(&peak_bytes, memory_order_relaxed);
    while (now > peak && !atomic_compare_exchange_weak_explicit(&peak_bytes, &peak, now, memory_order_relaxed,
                                                                memory_order_relaxed)) {
    }
}

/* Such blocks, in a hash table with linear probing: free() is not told where a block came from. */
#define SLOTS ((size_t)1 << 14)

static void *slots[SLOTS];
static size_t taken;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static size_t home(const void *block) { return ((uintptr_t)block >> 6) * 0x9E3779B97F4A7C15u >> 50; }

static size_t after(size_t slot) { return (slot + 1) & (SLOTS - 1); }

static void remember(const void *block, size_t size) {
    if (size < KEPT_FROM) return;
    pthread_mutex_lock(&guard);
    if (taken < SLOTS / 2) { /* 8192 tensors of that size at once are more than any benchmark holds */
        size_t slot = home(block);
        while (slots[slot]) slot = after(slot);
        slots[slot] = (void *)block;
        taken++;
        atomic_fetch_add_explicit(&tensor_bytes, (long long)size, memory_order_relaxed);
    }
    pthread_mutex_unlock(&guard);
}

/* Take the block out of the table and move up what stood behind it for want of its own slot. */
static int forget(const void *block) {
    size_t slot = home(block);
    while (slots[slot] && slots[slot] != block) slot = after(slot);
    if (!slots[slot]) return 0;
    for (size_t next = after(slot); slots[next]; next = after(next)) {
        size_t wanted = home(slots[next]);
        if (((next - wanted) & (SLOTS - 1)) >= ((next - slot) & (SLOTS - 1))) {
            slots[slot] = slots[next];
            slot = next;
        }
    }
    slots[slot] = NULL;
    taken--;
    return 1;
}

static void subtract(void *block) {
    size_t size = counted(block);
    if (!size) return;
    atomic_fetch_sub_explicit(&live_bytes, (long long)size, memory_order_relaxed);
    if (size < KEPT_FROM) return;
    pthread_mutex_lock(&guard);
    if (forget(block)) atomic_fetch_sub_explicit(&tensor_bytes, (long long)size, memory_order_relaxed);
    pthread_mutex_unlock(&guard);
}

void *malloc(size_t size) {
    look_up();
    if (!next_malloc) return early_alloc(size);
    void *block = next_malloc(size);
    add(counted(block));
    return block;
}

void *calloc(size_t count, size_t size) {
    look_up();
    if (!next_calloc) return early_alloc(count * size); /* static memory is zero */
    void *block = next_calloc(count, size);
    add(counted(block));
    return block;
}

void *realloc(void *block, size_t size) {
    look_up();
    if (is_early(block)) {
        void *moved = malloc(size);
        size_t behind = (size_t)(early + sizeof early - (char *)block);
        if (moved) memcpy(moved, block, size < behind ? size : behind);
        return moved;
    }
    size_t before = counted(block);
    void *moved = next_realloc(block, size);
    if (moved || !size) {
        /* Both copies may exist for an instant, but only inside the allocator: the count follows what the caller holds.
         * No one reallocates an aligned block: it would lose its alignment. */
        atomic_fetch_sub_explicit(&live_bytes, (long long)before, memory_order_relaxed);
        add(counted(moved));
    }
    return moved;
}

void free(void *block) {
    if (!block || is_early(block)) return;
    look_up();
    subtract(block);
    next_free(block);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    look_up();
    int status = next_posix_memalign(out, alignment, size);
    if (!status) {
        add(counted(*out));
        remember(*out, counted(*out));
    }
    return status;
}

void *aligned_alloc(size_t alignment, size_t size) {
    look_up();
    void *block = next_aligned_alloc(alignment, size);
    add(counted(block));
    return block;
}

void *memalign(size_t alignment, size_t size) {
    look_up();
    void *block = next_memalign(alignment, size);
    add(counted(block));
    return block;
}

/* What the measuring program calls. */
long long peak_interposer_live(void) { return atomic_load(&live_bytes); }
long long peak_interposer_tensors(void) { return atomic_load(&tensor_bytes); }
long long peak_interposer_peak(void) { return atomic_load(&peak_bytes); }
void peak_interposer_reset(void) { atomic_store(&peak_bytes, atomic_load(&live_bytes)); }
