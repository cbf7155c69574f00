// torch's CPU allocator, in front of the default one: while a thread runs a scripted kernel, the allocations that the
// script expects get their planned place in an arena; every other allocation goes to the default allocator.
//
// No two living blocks ever share a byte: a request whose planned bytes are still in use is refused and served by the
// default allocator. So a tensor that outlives its planned life (a gradient the user keeps, a retained graph) is safe.
//
// Tensors die late: after their thread's own variables, and while the process ends, after this library's. So nothing
// here has a destructor that runs by itself: what is thread_local or static is a plain pointer or is never destroyed.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

namespace {

struct Block {
  size_t end;
  bool kept;  // handed to the user: a gradient
};

struct Arena {
  char* base;
  size_t bytes;
  std::map<size_t, Block> live;  // offset -> block; disjoint
  size_t live_unkept = 0;
  int active = 0;       // scripts that run in it now
  bool closed = false;  // the pool has given it up; the last block to die frees it
  int64_t placed = 0;
  std::atomic<int64_t> refused = 0;
};

struct Request {
  int64_t size;     // bytes, as the kernel asks for them
  int64_t offset;   // -1: the default allocator's
  int64_t kept;
};

struct Step {
  std::vector<Request> requests;  // in the order in which the kernel makes them
};

struct Script {
  std::vector<Step> steps;
};

// One allocation of a recorded kernel. Births and deaths are counted on one clock.
struct Allocation {
  int64_t address, bytes, born, died;
};

struct Run {
  Arena* arena;  // null: record only
  const Script* script;
  Run* outer;  // a kernel may itself run a scripted function
  const Step* step = nullptr;
  size_t next = 0;  // the first request not made yet
  std::vector<Allocation> recorded;  // of the kernel that runs
  int64_t clock = 0;
};

std::mutex& guard = *new std::mutex;  // arenas and everything in them
auto& arenas = *new std::map<const char*, Arena*>;  // by base address
thread_local Run* running = nullptr;  // what this thread runs

c10::Allocator* fallback() {
  static c10::Allocator* const before = c10::GetCPUAllocator();
  return before;
}

// All arenas lie in [lowest, highest): most frees in a process lie outside and need no lock.
std::atomic<uintptr_t> lowest = UINTPTR_MAX, highest = 0;

void widen(const char* base, size_t bytes) {
  const auto from = reinterpret_cast<uintptr_t>(base);
  lowest = std::min(lowest.load(), from);
  highest = std::max(highest.load(), from + bytes);
}

Arena* holding(const void* pointer) {
  auto after = arenas.upper_bound(static_cast<const char*>(pointer));
  if (after == arenas.begin()) return nullptr;
  Arena* arena = std::prev(after)->second;
  return static_cast<const char*>(pointer) < arena->base + arena->bytes ? arena : nullptr;
}

void destroy(Arena* arena) {
  arenas.erase(arena->base);
  fallback()->raw_deallocate(arena->base);
  delete arena;
}

bool is_free(const Arena& arena, size_t offset, size_t end) {
  auto after = arena.live.lower_bound(end);
  return after == arena.live.begin() || std::prev(after)->second.end <= offset;
}

void* occupy(Arena& arena, size_t offset, size_t bytes, bool kept) {
  arena.live.emplace(offset, Block{offset + bytes, kept});
  arena.live_unkept += !kept;
  ++arena.placed;
  return arena.base + offset;
}

// A kernel may skip an allocation that it made when it was recorded, or make another: what it asks for is the next
// request of that size.
void* planned(Run& run, size_t bytes) {
  if (run.arena == nullptr || run.step == nullptr || bytes == 0) return nullptr;
  const auto& requests = run.step->requests;
  size_t k = run.next;
  while (k < requests.size() && static_cast<size_t>(requests[k].size) != bytes) ++k;
  if (k < requests.size()) {
    run.next = k + 1;
    const Request& wanted = requests[k];
    if (wanted.offset < 0) return nullptr;
    std::lock_guard<std::mutex> lock(guard);
    if (is_free(*run.arena, wanted.offset, wanted.offset + bytes))
      return occupy(*run.arena, wanted.offset, bytes, wanted.kept != 0);
  }
  ++run.arena->refused;
  return nullptr;
}

void record_birth(Run& run, const void* pointer, size_t bytes) {
  run.recorded.push_back({reinterpret_cast<int64_t>(pointer), static_cast<int64_t>(bytes), run.clock++,
                          std::numeric_limits<int64_t>::max()});
}

void record_death(Run& run, const void* pointer) {
  for (auto it = run.recorded.rbegin(); it != run.recorded.rend(); ++it)
    if (it->address == reinterpret_cast<int64_t>(pointer) && it->died == std::numeric_limits<int64_t>::max()) {
      it->died = run.clock++;
      return;
    }
}

void give_back(void* pointer) {
  if (running != nullptr && running->arena == nullptr) record_death(*running, pointer);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address >= lowest.load(std::memory_order_relaxed) && address < highest.load(std::memory_order_relaxed)) {
    std::lock_guard<std::mutex> lock(guard);
    if (Arena* arena = holding(pointer)) {
      auto block = arena->live.find(static_cast<char*>(pointer) - arena->base);
      arena->live_unkept -= !block->second.kept;
      arena->live.erase(block);
      if (arena->closed && arena->live.empty() && arena->active == 0) destroy(arena);
      return;
    }
  }
  fallback()->raw_deallocate(pointer);
}

struct PlannedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (running == nullptr) return other(bytes);
    if (void* place = planned(*running, bytes)) return {place, place, &give_back, c10::Device(c10::DeviceType::CPU)};
    c10::DataPtr data = other(bytes);
    if (running->arena == nullptr) record_birth(*running, data.get(), bytes);
    return data;
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

 private:
  static c10::DataPtr other(size_t bytes) {
    c10::DataPtr data = fallback()->allocate(bytes);
    (void)data.compare_exchange_deleter(fallback()->raw_deleter(), &give_back);  // refused for zero bytes
    return data;
  }
};

// Gives the pages that no living block touches back to the system; they read as zero when touched again.
void give_pages_back(const Arena& arena) {
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  uintptr_t from = reinterpret_cast<uintptr_t>(arena.base);
  const auto drop = [&](uintptr_t until) {
    const uintptr_t first = (from + page - 1) / page * page, last = until / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  };
  for (const auto& [offset, block] : arena.live) {
    drop(reinterpret_cast<uintptr_t>(arena.base) + offset);
    from = reinterpret_cast<uintptr_t>(arena.base) + block.end;
  }
  drop(reinterpret_cast<uintptr_t>(arena.base) + arena.bytes);
}

}  // namespace

extern "C" {

// Once a process, whoever else calls it: handlers of fork that lock twice would never return.
void memplan_install() {
  static const bool once = [] {
    fallback();
    pthread_atfork([] { guard.lock(); }, [] { guard.unlock(); }, [] { guard.unlock(); });
    c10::SetCPUAllocator(new PlannedAllocator);
    return true;
  }();
  (void)once;
}

// Null when the memory cannot be had.
void* memplan_arena_new(int64_t bytes) {
  char* base = nullptr;
  try {
    base = static_cast<char*>(fallback()->raw_allocate(bytes));
  } catch (const std::exception&) {
    return nullptr;
  }
  auto* arena = new Arena{base, static_cast<size_t>(bytes)};
  std::lock_guard<std::mutex> lock(guard);
  arenas[base] = arena;
  widen(base, bytes);
  return arena;
}

// The pool gives the arena up; blocks that live keep it.
void memplan_arena_close(void* handle) {
  std::lock_guard<std::mutex> lock(guard);
  auto* arena = static_cast<Arena*>(handle);
  arena->closed = true;
  if (arena->live.empty() && arena->active == 0) destroy(arena);
}

void memplan_arena_trim(void* handle) {
  std::lock_guard<std::mutex> lock(guard);
  give_pages_back(*static_cast<Arena*>(handle));
}

// 0: nothing lives in it; 1: only blocks that the user keeps; 2: blocks of a step; 3: a kernel's thread is in it.
int memplan_arena_state(void* handle) {
  std::lock_guard<std::mutex> lock(guard);
  const auto* arena = static_cast<Arena*>(handle);
  if (arena->active > 0) return 3;
  if (arena->live_unkept > 0) return 2;
  return arena->live.empty() ? 0 : 1;
}

int64_t memplan_arena_placed(void* handle) {
  std::lock_guard<std::mutex> lock(guard);
  return static_cast<Arena*>(handle)->placed;
}

int64_t memplan_arena_refused(void* handle) {
  std::lock_guard<std::mutex> lock(guard);
  return static_cast<Arena*>(handle)->refused;
}

void* memplan_arena_of(void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  return holding(pointer);
}

void* memplan_script_new(int64_t steps) {
  auto* script = new Script;
  script->steps.resize(steps);
  return script;
}

void memplan_script_free(void* script) {
  delete static_cast<Script*>(script);
}

// Requests of one step come in the order in which its kernel makes them; ``kept``: the user may hold the block later.
void memplan_script_request(void* script, int64_t step, int64_t size, int64_t offset, int64_t kept) {
  static_cast<Script*>(script)->steps[step].requests.push_back({size, offset, kept});
}

// This thread runs ``script`` in ``arena`` until it unwinds; a null arena records instead.
void memplan_begin(void* script, void* arena) {
  running = new Run{static_cast<Arena*>(arena), static_cast<Script*>(script), running};
  if (arena == nullptr) return;
  std::lock_guard<std::mutex> lock(guard);
  ++running->arena->active;
}

void memplan_step(int64_t step) {
  running->step = running->script == nullptr ? nullptr : &running->script->steps[step];
  running->next = 0;
  running->recorded.clear();
}

// What this thread runs now, to go back to.
void* memplan_running() {
  return running;
}

// End what this thread began since ``outer`` was what it ran.
void memplan_unwind(void* outer) {
  while (running != outer && running != nullptr) {
    Run* ended = running;
    running = ended->outer;
    if (Arena* arena = ended->arena) {
      std::lock_guard<std::mutex> lock(guard);
      if (--arena->active == 0 && arena->closed && arena->live.empty()) destroy(arena);
    }
    delete ended;
  }
}

// The allocations of the kernel that this thread records: address, bytes, born, died. Fills at most ``capacity`` of them
// and returns how many there are.
int64_t memplan_recorded(int64_t* found, int64_t capacity) {
  const int64_t count = static_cast<int64_t>(running->recorded.size());
  for (int64_t k = 0; k < std::min(count, capacity); ++k) {
    const Allocation& a = running->recorded[k];
    found[4 * k] = a.address, found[4 * k + 1] = a.bytes, found[4 * k + 2] = a.born, found[4 * k + 3] = a.died;
  }
  return count;
}
}
