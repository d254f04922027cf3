// Runs one dispatch of a compiled shader on this CPU, one lane at a time, and watches it.
//
// A lane is a fiber. It runs until its next operation of the simdgroup or barrier; then the next lane of its
// simdgroup does. When all of them have stopped, they must have stopped at the same operation and the same place of
// the source, else the control flow diverges. Simdgroups run to their next threadgroup barrier in an order that the
// seed decides: 0 ascending, 1 descending, others at random, changing at every operation, lanes and threadgroups too.
//
//   buffers        copied between guard regions: flush with the end for even seeds, with the start for odd ones.
//                  What a const parameter points to is read-only. An access to a guard region ends the dispatch.
//   threadgroup    filled with 0xFF (NaN in every float type) before each threadgroup.
//   traced builds  (-fsanitize=thread without its library) call __tsan_read4 and so on at every access: these
//                  count bytes, check bounds to the byte, and look for reads of threadgroup memory that nothing
//                  wrote and for two lanes that touch one byte, one of them writing, with no barrier in between.
//
// A defect jumps out of all fibers back to msl_dispatch, which returns its kind. Not safe for several threads.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#if !defined(__x86_64__) || defined(MSL_UCONTEXT)
#include <ucontext.h>
#endif

#include <algorithm>
#include <vector>

typedef unsigned int uint;
typedef unsigned long ulong;

namespace {

constexpr uint max_lanes = 1024, max_simdgroups = max_lanes / 32, max_buffers = 31, max_operations = 64;
constexpr size_t stack_bytes = 256 << 10, page = 4096, guard_bytes = 1 << 20;
constexpr size_t threadgroup_limit = 32 << 10, arena_bytes = 256 << 10, red_zone = 64;

enum Kind : int {
  fine, out_of_bounds, divergent, threadgroup_too_large, uninitialised_read, race, misaligned, undefined, stack_overflow,
  time_limit, wild_access, red_zone_written
};

}  // namespace

// The first five types are shared with metal.h; the last two with harness.py.
struct Exchange {
  alignas(16) unsigned char slot[32][32];
  alignas(16) unsigned char result[256];
  uint lanes, ready;
};
struct Id { uint x, y, z; };
struct Lane { uint index, lane, simdgroup; Id position; };
struct Threadgroup { Id position, threads, groups; uint simdgroups; };
struct Site { const char* file; const char* function; uint line, column; };

struct Buffer {
  void* host;           // null: not bound
  uint64_t size;
  uint32_t alignment;   // of the first byte
  uint32_t writable;
  uint32_t same_as;     // index of the buffer bound to the same array, or its own
  uint32_t reserved;
  // Filled by traced builds. A lane's bytes, and the bytes that are new to the simdgroup, threadgroup, dispatch.
  uint64_t read, read_by_simdgroup, read_by_threadgroup, read_once, written, written_once;
};
struct Dispatch {
  void (*kernel)(void* const*);
  Buffer buffer[max_buffers];
  uint32_t grid[3], threads[3];
  uint64_t seed;
  double seconds;             // of CPU time; then the dispatch counts as hung
  uint32_t ignore;            // bit per Kind
  uint32_t traced;
  // Results.
  uint64_t operations[max_operations];  // by simdgroup; threadgroup barriers by threadgroup
  uint64_t threadgroup_bytes;
  int32_t defect_buffer;      // -1: none
  uint32_t reserved;
  uint64_t place, other_place;  // code addresses in this module, for addr2line; 0: none
  char message[512];
};

// ---- fibers --------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(MSL_UCONTEXT)
// Saves what a call preserves, and goes on where the other stack was left.
extern "C" void msl_switch(void** save, void* load);
asm(R"(
.text
.hidden msl_switch
.globl msl_switch
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
struct Fiber { void* stack_pointer; };
static void start_fiber(Fiber& f, char* stack, void (*function)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes) - 2;
  *top = reinterpret_cast<void*>(function);  // popped by ret, which leaves rsp 8 mod 16, as after a call
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
}
static inline void switch_fiber(Fiber& from, Fiber& to) { msl_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Fiber { ucontext_t context; };
static void start_fiber(Fiber& f, char* stack, void (*function)()) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = stack_bytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, function, 0);
}
static inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// ---- state of the dispatch -----------------------------------------------------------------------------------

namespace {

enum State : uint { running, at_simdgroup, at_threadgroup, ended };

struct LaneState {
  Fiber fiber;
  State state;
  uint operation;
  uint flags;
  const Site* site;
  void* caller;
};
struct Simdgroup {
  Exchange exchange[2];
  uint phase, first, lanes;
  State state;
  const Site* site;
  uint epoch[2];  // of barriers that order threadgroup [0] and device [1] memory
};
struct Array { const char* name; uint line; size_t offset, size; };

// What is known of one byte: who wrote it last, and who has read it since the last barrier.
struct Shadow {
  uint32_t write_group, write_barrier, write_simd_barrier, write_place;
  uint32_t read_group, read_barrier, read_simd_barrier, read_simdgroups, read_place;
  uint16_t write_lane, read_lane;
};
struct Stamp { uint32_t simdgroup, threadgroup, written; };
constexpr uint16_t several_lanes = 0xffff;
constexpr uint32_t several_groups = 0xffffffff;

struct Placed {
  char *start, *end;            // the buffer's bytes
  char *guard_start, *guard_end;  // with half of the guard regions around
  Shadow* shadow;               // writable buffers
  Stamp* stamp;
  size_t region_bytes;
  char *page_start, *page_end;
};

Dispatch* job;
Placed placed[max_buffers];
char *region, *region_end;
LaneState lanes[max_lanes];
Lane lane_ids[max_lanes];
Simdgroup simdgroups[max_simdgroups];
char* stacks;
char* arena;
size_t arena_used, arena_declared;
std::vector<Array> arrays;
Shadow* arena_shadow;
Fiber scheduler;
uint lane_count, simdgroup_count, group_serial, simdgroup_serial_base;
uint barrier_epoch[2], epoch_counter;
void* addresses[max_buffers];
uint64_t random_state;
sigjmp_buf home;
volatile sig_atomic_t inside;
char* module_base;

uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

uint32_t place_of(const void* code) { return static_cast<uint32_t>(static_cast<const char*>(code) - module_base); }

bool ignored(Kind kind) { return job->ignore >> kind & 1; }

}  // namespace

extern "C" {
Lane* msl_self;
Threadgroup msl_group;
extern const char* const msl_operation_names[];
}

__attribute__((noreturn, format(printf, 3, 4))) static void fail(Kind kind, int buffer, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(job->message, sizeof job->message, format, arguments);
  va_end(arguments);
  if (msl_self && n >= 0 && n < int(sizeof job->message))
    snprintf(job->message + n, sizeof job->message - n, " (threadgroup %u,%u,%u thread %u: simdgroup %u lane %u)",
             msl_group.position.x, msl_group.position.y, msl_group.position.z, msl_self->index, msl_self->simdgroup,
             msl_self->lane);
  job->defect_buffer = buffer;
  siglongjmp(home, kind);
}

// ---- what a lane calls ---------------------------------------------------------------------------------------

static inline LaneState& self() { return lanes[msl_self->index]; }

static inline void stop(LaneState& me, State state, uint operation, uint flags, const Site* site) {
  me.state = state;
  me.operation = operation;
  me.flags = flags;
  me.site = site;
  switch_fiber(me.fiber, scheduler);
}

extern "C" Exchange* msl_exchange(uint operation, const void* value, uint bytes, const Site* site) {
  Simdgroup& group = simdgroups[msl_self->simdgroup];
  Exchange& e = group.exchange[group.phase];
  memcpy(e.slot[msl_self->lane], value, bytes);
  stop(self(), at_simdgroup, operation, 0, site);
  return &e;
}

enum { op_simdgroup_barrier = 0, op_threadgroup_barrier = 1 };
enum { flag_device = 1, flag_threadgroup = 2 };

extern "C" void msl_barrier(uint operation, uint flags, const Site* site) {
  stop(self(), operation == op_threadgroup_barrier ? at_threadgroup : at_simdgroup, operation, flags, site);
}

extern "C" void* msl_threadgroup_array(const char* name, ulong bytes, uint line) {
  for (const Array& a : arrays)
    if (a.line == line && a.size == bytes && !strcmp(a.name, name)) return arena + a.offset;
  const size_t size = (bytes + 15) & ~size_t(15);
  arena_declared += size;
  job->threadgroup_bytes = std::max<uint64_t>(job->threadgroup_bytes, arena_declared);
  if (arena_declared > threadgroup_limit)
    fail(threadgroup_too_large, -1, "threadgroup memory: %zu bytes with %s, the limit is %zu", arena_declared, name,
         threadgroup_limit);
  arrays.push_back({name, line, arena_used, bytes});
  arena_used += size + red_zone;
  return arena + arrays.back().offset;
}

// 8x8x8 over the 32 lanes' operands: a0 a1 b0 b1 c0 c1, laid out as metal.h says.
extern "C" void msl_multiply_accumulate(Exchange* e) {
  float a[8][8], b[8][8], c[8][8];
  for (uint lane = 0; lane < 32; lane++) {
    const uint row = ((lane >> 2) & 4) | ((lane >> 1) & 3), column = ((lane >> 1) & 4) | ((lane & 1) << 1);
    float v[6];
    memcpy(v, e->slot[lane], sizeof v);
    for (uint i = 0; i < 2; i++) {
      a[row][column + i] = v[i];
      b[row][column + i] = v[2 + i];
      c[row][column + i] = v[4 + i];
    }
  }
  for (uint i = 0; i < 8; i++)
    for (uint k = 0; k < 8; k++)
      for (uint j = 0; j < 8; j++) c[i][j] = __builtin_fmaf(a[i][k], b[k][j], c[i][j]);
  for (uint lane = 0; lane < 32; lane++) {
    const uint row = ((lane >> 2) & 4) | ((lane >> 1) & 3), column = ((lane >> 1) & 4) | ((lane & 1) << 1);
    memcpy(e->result + 8 * lane, &c[row][column], 8);
  }
  e->ready = 1;
}

// ---- tracing -------------------------------------------------------------------------------------------------

static void trace_race(const Shadow& s, const char* what, bool write, bool after_write, const char* where, int buffer,
                       void* caller) {
  job->place = place_of(caller);
  job->other_place = after_write ? s.write_place : s.read_place;
  const uint lane = after_write ? s.write_lane : s.read_lane;
  char other[48];
  if (lane == several_lanes) snprintf(other, sizeof other, "several threads");
  else snprintf(other, sizeof other, "thread %u", lane);
  fail(race, buffer, "%s %s: %s after a %s by %s%s, no barrier in between", what, where, write ? "write" : "read",
       after_write ? "write" : "read", other,
       (after_write ? s.write_group : s.read_group) != group_serial ? " of another threadgroup" : "");
}

// One access of the lane that runs; device: 1 for a device buffer, 0 for threadgroup memory.
static inline void trace_shadow(Shadow* shadow, size_t bytes, bool write, uint device, const char* what,
                                size_t offset, int buffer, void* caller) {
  const uint16_t lane = static_cast<uint16_t>(msl_self->index);
  const uint sg = msl_self->simdgroup;
  const uint tg_epoch = barrier_epoch[device], sg_epoch = simdgroups[sg].epoch[device];
  for (size_t i = 0; i < bytes; i++) {
    Shadow& s = shadow[i];
    bool conflict = false, after_write = false;
    if (s.write_group == group_serial) {
      if (s.write_lane != lane && s.write_barrier == tg_epoch)
        conflict = after_write = s.write_lane / 32 != sg || s.write_simd_barrier == sg_epoch;
    } else if (device && s.write_group) {
      conflict = after_write = true;
    } else if (!device && !write && !ignored(uninitialised_read)) {
      job->place = place_of(caller);
      fail(uninitialised_read, -1, "%s byte %zu is read and was never written", what, offset + i);
    }
    if (!conflict && write && s.read_group) {
      if (s.read_group != group_serial) conflict = device;
      else if (s.read_barrier == tg_epoch)
        conflict = (s.read_simdgroups & ~(1u << sg)) || (s.read_simd_barrier == sg_epoch && s.read_lane != lane);
    }
    if (conflict && !ignored(race)) {
      char where[32];
      snprintf(where, sizeof where, "byte %zu", offset + i);
      trace_race(s, what, write, after_write, where, buffer, caller);
    }
    if (write) {
      s.write_group = group_serial;
      s.write_barrier = tg_epoch;
      s.write_simd_barrier = sg_epoch;
      s.write_lane = lane;
      s.write_place = place_of(caller);
    } else {
      if (s.read_group == group_serial && s.read_barrier == tg_epoch) {
        s.read_simdgroups |= 1u << sg;
        s.read_lane = s.read_simd_barrier == sg_epoch && s.read_lane != lane ? several_lanes : lane;
      } else {
        s.read_group = device && s.read_group && s.read_group != group_serial ? several_groups : group_serial;
        s.read_simdgroups = 1u << sg;
        s.read_lane = lane;
      }
      s.read_barrier = tg_epoch;
      s.read_simd_barrier = sg_epoch;
      s.read_place = place_of(caller);
    }
  }
}

static void count(int index, size_t offset, size_t bytes, bool write) {
  Buffer& b = job->buffer[index];
  Stamp* stamp = placed[index].stamp + offset;
  const uint simdgroup = simdgroup_serial_base + msl_self->simdgroup;
  if (write) {
    b.written += bytes;
    for (size_t i = 0; i < bytes; i++)
      if (!stamp[i].written) {
        stamp[i].written = 1;
        b.written_once++;
      }
    return;
  }
  b.read += bytes;
  for (size_t i = 0; i < bytes; i++) {
    Stamp& s = stamp[i];
    if (s.simdgroup == simdgroup) continue;
    b.read_by_simdgroup++;
    if (s.threadgroup != group_serial) b.read_by_threadgroup++;
    if (!s.threadgroup) b.read_once++;
    s.simdgroup = simdgroup;
    s.threadgroup = group_serial;
  }
}

// The buffer that holds an address or whose guard region does; -1: none.
static int buffer_near(const char* address) {
  for (uint i = 0; i < max_buffers; i++)
    if (placed[i].start && job->buffer[i].same_as == i && address >= placed[i].guard_start &&
        address < placed[i].guard_end)
      return int(i);
  return -1;
}

static void describe_buffer_access(int index, const char* address, bool known, bool write) {
  const long offset = address - placed[index].start;
  const char* access = known ? write ? "write" : "read" : "access";
  if (address >= placed[index].start && address < placed[index].end)
    fail(out_of_bounds, index, "buffer %d: write to a const buffer, byte %ld", index, offset);
  fail(out_of_bounds, index, "buffer %d: %s at byte %ld of %lu", index, access, offset,
       static_cast<ulong>(job->buffer[index].size));
}

static void trace_outside(const char* address, size_t bytes, bool write, void* caller) {
  if (address >= arena && address < arena + arena_bytes) {
    const size_t offset = size_t(address - arena);
    for (const Array& a : arrays)
      if (offset >= a.offset && offset + bytes <= a.offset + a.size) {
        trace_shadow(arena_shadow + offset, bytes, write, 0, a.name, offset - a.offset, -1, caller);
        return;
      }
    job->place = place_of(caller);
    const Array* nearest = nullptr;
    for (const Array& a : arrays)
      if (offset + bytes > a.offset) nearest = &a;
    if (nearest)
      fail(out_of_bounds, -1, "threadgroup array %s: %s at byte %zu of %zu", nearest->name, write ? "write" : "read",
           offset - nearest->offset, nearest->size);
    fail(out_of_bounds, -1, "threadgroup memory outside of every array");
  }
}

static inline void trace(void* pointer, size_t bytes, bool write, void* caller, bool aligned = true) {
  if (!inside || !msl_self) return;
  const char* address = static_cast<const char*>(pointer);
  if (aligned && reinterpret_cast<uintptr_t>(pointer) % bytes && !ignored(misaligned)) {
    job->place = place_of(caller);
    fail(misaligned, buffer_near(address), "%s of %zu bytes at address %p", write ? "write" : "read", bytes, pointer);
  }
  if (address < region || address >= region_end) {
    trace_outside(address, bytes, write, caller);
    return;
  }
  const int index = buffer_near(address);
  if (index < 0) return;  // faults
  if (address < placed[index].start || address + bytes > placed[index].end) {
    job->place = place_of(caller);
    describe_buffer_access(index, address < placed[index].start ? address : std::max(address, (const char*)placed[index].end), true, write);
  }
  const size_t offset = size_t(address - placed[index].start);
  count(index, offset, bytes, write);
  if (placed[index].shadow) {
    char what[24];
    snprintf(what, sizeof what, "buffer %d", index);
    trace_shadow(placed[index].shadow + offset, bytes, write, 1, what, offset, index, caller);
  }
}

extern "C" void msl_atomic(const void* pointer, uint bytes) {
  const char* address = static_cast<const char*>(pointer);
  if (address < region || address >= region_end) {
    if (address >= arena && address < arena + arena_bytes)  // from now on written
      for (uint i = 0; i < bytes; i++) {
        Shadow& s = arena_shadow[address - arena + i];
        s = Shadow();
        s.write_group = group_serial;
      }
    return;
  }
  const int index = buffer_near(address);
  if (index < 0 || !placed[index].stamp || address < placed[index].start || address + bytes > placed[index].end) return;
  count(index, size_t(address - placed[index].start), bytes, false);
  count(index, size_t(address - placed[index].start), bytes, true);
}

#define CALLER __builtin_return_address(0)
#define HOOKS(n)                                                               \
  extern "C" void __tsan_read##n(void* p) { trace(p, n, false, CALLER); }      \
  extern "C" void __tsan_write##n(void* p) { trace(p, n, true, CALLER); }      \
  extern "C" void __tsan_unaligned_read##n(void* p) { trace(p, n, false, CALLER, false); } \
  extern "C" void __tsan_unaligned_write##n(void* p) { trace(p, n, true, CALLER, false); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" void __tsan_read_range(void* p, ulong n) { trace(p, n, false, CALLER, false); }
extern "C" void __tsan_write_range(void* p, ulong n) { trace(p, n, true, CALLER, false); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// Undefined behaviour, as gcc's and clang's -fsanitize=... report it: the first argument begins with the place.
struct UndefinedPlace { const char* file; uint line, column; };
#define UNDEFINED(name, kind, text, ...)                                                      \
  extern "C" void __ubsan_handle_##name(UndefinedPlace* p __VA_ARGS__) {                      \
    if (!inside || !msl_self || ignored(kind)) return;                                        \
    fail(kind, -1, "%s at %s:%u:%u", text, p->file, p->line, p->column);                      \
  }
UNDEFINED(out_of_bounds, out_of_bounds, "array index out of bounds", , void*)
UNDEFINED(shift_out_of_bounds, undefined, "shift by the width of the type or more", , void*, void*)
UNDEFINED(add_overflow, undefined, "signed addition overflows", , void*, void*)
UNDEFINED(sub_overflow, undefined, "signed subtraction overflows", , void*, void*)
UNDEFINED(mul_overflow, undefined, "signed multiplication overflows", , void*, void*)
UNDEFINED(negate_overflow, undefined, "signed negation overflows", , void*)
UNDEFINED(divrem_overflow, undefined, "division by zero or overflow", , void*, void*)

// ---- the scheduler -------------------------------------------------------------------------------------------

static void lane_main() {
  job->kernel(addresses);
  LaneState& me = self();
  me.state = ended;
  switch_fiber(me.fiber, scheduler);
  abort();  // an ended lane is never resumed
}

static bool same_place(const Site* a, const Site* b) {
  return a == b || (a && b && a->line == b->line && a->column == b->column && !strcmp(a->file, b->file));
}

static void describe_stop(char* text, size_t size, const LaneState& lane) {
  if (lane.state == ended) snprintf(text, size, "has returned");
  else
    snprintf(text, size, "is at %s, %s:%u:%u", msl_operation_names[lane.operation], lane.site->file, lane.site->line,
             lane.site->column);
}

static void diverged(const LaneState& a, const LaneState& b) {
  char left[160], right[160];
  describe_stop(left, sizeof left, a);
  describe_stop(right, sizeof right, b);
  msl_self = nullptr;
  fail(divergent, -1, "threadgroup %u,%u,%u: thread %u %s, thread %u %s", msl_group.position.x, msl_group.position.y,
       msl_group.position.z, uint(&a - lanes), left, uint(&b - lanes), right);
}

static void run_simdgroup(Simdgroup& group) {
  // For seeds above 1: lanes in the order start, start + step, ... with an odd step.
  uint start = 0, step = 1;
  if (job->seed == 1) {
    start = group.lanes - 1;
    step = group.lanes - 1;  // -1
  } else if (job->seed > 1 && group.lanes == 32) {
    const uint64_t r = next_random();
    start = r & 31;
    step = (r >> 5 & 31) | 1;
  }
  for (uint i = 0, lane = start; i < group.lanes; i++, lane = (lane + step) % group.lanes) {
    LaneState& state = lanes[group.first + lane];
    state.state = running;
    msl_self = &lane_ids[group.first + lane];
    switch_fiber(scheduler, state.fiber);
  }
  const LaneState& first = lanes[group.first];
  for (uint i = 1; i < group.lanes; i++) {
    const LaneState& other = lanes[group.first + i];
    if (other.state != first.state ||
        (first.state != ended && (other.operation != first.operation || other.flags != first.flags ||
                                  !same_place(first.site, other.site))))
      diverged(first, other);
  }
  group.state = first.state;
  group.site = first.site;
  if (group.state != at_simdgroup) return;
  job->operations[first.operation]++;
  if (first.operation == op_simdgroup_barrier) {
    if (first.flags & flag_threadgroup) group.epoch[0] = ++epoch_counter;
    if (first.flags & flag_device) group.epoch[1] = ++epoch_counter;
  } else {
    group.phase ^= 1;
    group.exchange[group.phase].ready = 0;  // of the next operation: nobody reads what this one held any more
  }
}

static void run_threadgroup() {
  memset(arena, 0xff, arena_used ? arena_used : threadgroup_limit + 32 * red_zone);
  group_serial++;
  for (uint i = 0; i < 2; i++) barrier_epoch[i] = ++epoch_counter;
  for (uint s = 0; s < simdgroup_count; s++) {
    Simdgroup& group = simdgroups[s];
    group.phase = 0;
    group.first = 32 * s;
    group.lanes = std::min(32u, lane_count - group.first);
    group.state = running;
    group.epoch[0] = group.epoch[1] = ++epoch_counter;
    for (Exchange& e : group.exchange) {
      e.lanes = group.lanes;
      e.ready = 0;
    }
  }
  // Stacks that all began at one offset in their page would share a few sets of the cache.
  for (uint i = 0; i < lane_count; i++)
    start_fiber(lanes[i].fiber, stacks + i * (stack_bytes + page) + page - i * 17 % 64 * 64, lane_main);
  for (;;) {
    uint waiting = 0, done = 0, ready[max_simdgroups], ready_count = 0;
    for (uint s = 0; s < simdgroup_count; s++) {
      if (simdgroups[s].state == ended) done++;
      else if (simdgroups[s].state == at_threadgroup) waiting++;
      else ready[ready_count++] = s;
    }
    if (ready_count) {
      const uint pick = job->seed == 0 ? 0 : job->seed == 1 ? ready_count - 1 : next_random() % ready_count;
      run_simdgroup(simdgroups[ready[pick]]);
      continue;
    }
    if (done == simdgroup_count) break;
    const LaneState& first = lanes[0];
    for (uint s = 1; s < simdgroup_count; s++) {
      const LaneState& other = lanes[32 * s];
      if (other.state != first.state || other.flags != first.flags || !same_place(first.site, other.site))
        diverged(first, other);
    }
    job->operations[op_threadgroup_barrier]++;
    for (uint kind = 0; kind < 2; kind++)
      if (first.flags & (kind ? flag_device : flag_threadgroup)) {
        barrier_epoch[kind] = ++epoch_counter;
        for (uint s = 0; s < simdgroup_count; s++) simdgroups[s].epoch[kind] = ++epoch_counter;
      }
    for (uint s = 0; s < simdgroup_count; s++) simdgroups[s].state = running;
  }
  for (const Array& a : arrays)
    for (size_t i = (a.size + 15) & ~size_t(15); i < ((a.size + 15) & ~size_t(15)) + red_zone; i++)
      if (static_cast<unsigned char>(arena[a.offset + i]) != 0xff && !ignored(red_zone_written)) {
        msl_self = nullptr;
        fail(red_zone_written, -1, "threadgroup array %s: something wrote byte %zu of %zu", a.name, i, a.size);
      }
}

static void run_grid() {
  const uint64_t x = job->grid[0], y = job->grid[1], z = job->grid[2], total = x * y * z;
  uint64_t start = 0, step = 1;
  if (job->seed == 1 && total) {
    start = total - 1;
    step = total - 1;
  } else if (job->seed > 1 && total) {
    start = next_random() % total;
    do step = next_random() % total | 1;
    while (std::__gcd(step, total) != 1);
  }
  uint64_t at = start;
  for (uint64_t i = 0; i < total; i++, at = (at + step) % total) {
    msl_group.position = {uint(at % x), uint(at / x % y), uint(at / x / y)};
    simdgroup_serial_base = 1 + uint(i) * simdgroup_count;
    run_threadgroup();
  }
}

// ---- buffers, faults, and the way in -------------------------------------------------------------------------

static size_t up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static void* map(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("mlxq msl harness: mmap");
    abort();
  }
  return p;
}

static void place_buffers() {
  size_t total = guard_bytes;
  for (uint i = 0; i < max_buffers; i++)
    if (job->buffer[i].host && job->buffer[i].same_as == i) total += up(job->buffer[i].size + 64, page) + guard_bytes;
  region = static_cast<char*>(map(total, PROT_NONE));
  region_end = region + total;
  char* at = region + guard_bytes;
  for (uint i = 0; i < max_buffers; i++) {
    Buffer& b = job->buffer[i];
    Placed& p = placed[i];
    if (!b.host || b.same_as != i) continue;
    p.region_bytes = up(b.size + 64, page);
    p.page_start = at;
    p.page_end = at + p.region_bytes;
    if (mprotect(at, p.region_bytes, PROT_READ | PROT_WRITE)) abort();
    memset(at, 0xff, p.region_bytes);
    const size_t slack = p.region_bytes - b.size;
    p.start = job->seed & 1 ? at : at + slack / b.alignment * b.alignment;
    p.end = p.start + b.size;
    p.guard_start = at - guard_bytes / 2;
    p.guard_end = at + p.region_bytes + guard_bytes / 2;
    memcpy(p.start, b.host, b.size);
    if (!b.writable && mprotect(at, p.region_bytes, PROT_READ)) abort();
    if (job->traced) {
      p.stamp = static_cast<Stamp*>(map(up((b.size + 1) * sizeof(Stamp), page), PROT_READ | PROT_WRITE));
      if (b.writable)
        p.shadow = static_cast<Shadow*>(map(up((b.size + 1) * sizeof(Shadow), page), PROT_READ | PROT_WRITE));
    }
    at += p.region_bytes + guard_bytes;
  }
  for (uint i = 0; i < max_buffers; i++)
    addresses[i] = job->buffer[i].host ? placed[job->buffer[i].same_as].start : nullptr;
}

static void take_back_buffers(bool copy) {
  for (uint i = 0; i < max_buffers; i++) {
    Placed& p = placed[i];
    Buffer& b = job->buffer[i];
    if (p.start) {
      if (copy && b.writable) memcpy(b.host, p.start, b.size);
      if (p.stamp) munmap(p.stamp, up((b.size + 1) * sizeof(Stamp), page));
      if (p.shadow) munmap(p.shadow, up((b.size + 1) * sizeof(Shadow), page));
    }
    p = Placed();
  }
  munmap(region, size_t(region_end - region));
  region = region_end = nullptr;
}

static void check_slack() {
  msl_self = nullptr;
  for (uint i = 0; i < max_buffers; i++) {
    const Placed& p = placed[i];
    if (!p.start) continue;
    for (const char* c = p.page_start; c < p.page_end; c++) {
      if (c == p.start) c = p.end;
      if (c < p.page_end && static_cast<unsigned char>(*c) != 0xff)
        fail(out_of_bounds, int(i), "buffer %u: write at byte %ld of %lu", i, long(c - p.start),
             static_cast<ulong>(job->buffer[i].size));
    }
  }
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  if (!inside) {  // not ours: the handler that was there before gets it when the instruction runs again
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
    return;
  }
  if (signal == SIGVTALRM) fail(time_limit, -1, "still running after %g seconds of CPU time", job->seconds);
  void* code = nullptr;
  bool write = false;
  bool known = false;
#if defined(__x86_64__)
  const greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  code = reinterpret_cast<void*>(registers[REG_RIP]);
  write = registers[REG_ERR] & 2;
  known = true;
#endif
  if (code) job->place = uint64_t(static_cast<char*>(code) - module_base) + 1;  // addr2line gets a return address
  char* address = static_cast<char*>(info->si_addr);
  const int index = buffer_near(address);
  if (index >= 0) describe_buffer_access(index, address, known, write);
  if (address >= stacks && address < stacks + lane_count * (stack_bytes + page))
    fail(stack_overflow, -1, "a lane's stack of %zu KiB overflows", stack_bytes >> 10);
  fail(wild_access, -1, "access to no buffer, address %p", static_cast<void*>(address));
}

// Runs a dispatch; 0 or the kind of its first defect, described in its message.
extern "C" __attribute__((visibility("default"))) int msl_dispatch(Dispatch* dispatch) {
  job = dispatch;
  if (!arena) {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&msl_dispatch), &info);
    module_base = static_cast<char*>(info.dli_fbase);
    arena = static_cast<char*>(map(arena_bytes, PROT_READ | PROT_WRITE));
    arena_shadow = static_cast<Shadow*>(map(up(arena_bytes * sizeof(Shadow), page), PROT_READ | PROT_WRITE));
  }
  arrays.clear();
  arena_used = arena_declared = 0;
  memset(arena_shadow, 0, arena_bytes * sizeof(Shadow));
  group_serial = 0;
  epoch_counter = 0;
  random_state = 0x9e3779b97f4a7c15ull * (job->seed + 1);
  lane_count = job->threads[0] * job->threads[1] * job->threads[2];
  // Stacks do not outlive a dispatch: each guard page splits a mapping, and a process may have 65,530 of them.
  stacks = static_cast<char*>(map(lane_count * (stack_bytes + page), PROT_READ | PROT_WRITE));
  for (uint i = 0; i < lane_count; i++)
    if (mprotect(stacks + i * (stack_bytes + page), page, PROT_NONE)) abort();
  simdgroup_count = (lane_count + 31) / 32;
  msl_group.threads = {job->threads[0], job->threads[1], job->threads[2]};
  msl_group.groups = {job->grid[0], job->grid[1], job->grid[2]};
  msl_group.simdgroups = simdgroup_count;
  for (uint i = 0; i < lane_count; i++)
    lane_ids[i] = {i, i % 32, i / 32,
                   {i % job->threads[0], i / job->threads[0] % job->threads[1], i / job->threads[0] / job->threads[1]}};
  place_buffers();

  static char signal_stack[64 << 10];
  stack_t alternative = {}, previous_stack;
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, &previous_stack);
  struct sigaction action = {}, previous[4];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int signals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
  for (int i = 0; i < 4; i++) sigaction(signals[i], &action, &previous[i]);
  const itimerval limit = {{0, 0}, {long(job->seconds), long((job->seconds - long(job->seconds)) * 1e6) + 1}};
  setitimer(ITIMER_VIRTUAL, &limit, nullptr);

  const int kind = sigsetjmp(home, 1);
  if (!kind) {
    inside = 1;
    run_grid();
    check_slack();
  }
  inside = 0;
  msl_self = nullptr;
  const itimerval off = {};
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  for (int i = 0; i < 4; i++) sigaction(signals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
  munmap(stacks, lane_count * (stack_bytes + page));
  stacks = nullptr;
  take_back_buffers(!kind);
  return kind;
}
