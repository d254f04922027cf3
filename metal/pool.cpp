// Workers stay awake for a moment after a job, since a decoder step is a chain of short jobs with the rest of the step in
// between, yielding their core to whoever wants it (Python, building the next step), then sleep. Tasks are claimed one by
// one from an atomic counter: a worker that comes late costs the caller nothing. One that loses its core in the middle
// of a task would: so the caller waits for it awake only briefly, then sleeps, and leaves its own core to that worker.
// Linux likes to wake a worker on the core of the thread that wakes it, where it waits for milliseconds while another core
// is idle: so workers are kept off the core that the caller runs on.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>
#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace mlxq {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto worker_awake = std::chrono::microseconds(400);
constexpr auto caller_awake = std::chrono::microseconds(20);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int allowed_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int threads) : owner_(getpid()) {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this] { work(); });
    }
  }

  // False when the caller must do the work: the pool is busy, belongs to the parent of a fork (whose threads do not
  // exist here), or is asleep and the job brief.
  bool run(int count, bool brief, const std::function<void(int)>& task) {
    if (brief && awake_.load(std::memory_order_relaxed) == 0) {
      return false;
    }
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || owner_ != getpid()) {
      return false;
    }
    keep_off_this_core();
    task_.store(&task, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    // The counter carries the generation in its high half, so that a worker late for the last job cannot claim from
    // this one with the last job's task.
    uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
    next_.store(uint64_t(generation) << 32, std::memory_order_release);
    generation_.store(generation, std::memory_order_release);
    if (!brief) {
      generation_.notify_all();
    }
    claim(generation);
    auto deadline = Clock::now() + caller_awake;
    for (int round = 1; done_.load(std::memory_order_acquire) != count; ++round) {
      relax();
      if (round % 64 == 0 && Clock::now() > deadline) {
        int done = done_.load(std::memory_order_acquire);
        if (done != count) {
          done_.wait(done, std::memory_order_acquire);
        }
      }
    }
    return true;
  }

 private:
  // With the lock held. Nothing to do while the caller stays where it was.
  void keep_off_this_core() {
#ifdef __linux__
    int core = sched_getcpu();
    cpu_set_t others;
    if (core == avoided_core_ || sched_getaffinity(0, sizeof(others), &others) != 0) {
      return;
    }
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) > 0) {
      for (auto& worker : workers_) {
        pthread_setaffinity_np(worker.native_handle(), sizeof(others), &others);
      }
    }
    avoided_core_ = core;
#endif
  }

  void claim(uint32_t generation) {
    uint64_t seen = next_.load(std::memory_order_acquire);
    while (uint32_t(seen >> 32) == generation && int(uint32_t(seen)) < count_.load(std::memory_order_relaxed)) {
      if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        (*task_.load(std::memory_order_relaxed))(int(uint32_t(seen)));
        done_.fetch_add(1, std::memory_order_acq_rel);
        done_.notify_one();
        seen = next_.load(std::memory_order_acquire);
      }
    }
  }

  void work() {
    uint32_t last = 0;
    awake_.fetch_add(1, std::memory_order_relaxed);
    while (true) {
      auto deadline = Clock::now() + worker_awake;
      uint32_t now;
      for (int round = 1; (now = generation_.load(std::memory_order_acquire)) == last; ++round) {
        relax();
        if (round % 64 == 0) {
          std::this_thread::yield();
          if (Clock::now() > deadline) {
            awake_.fetch_sub(1, std::memory_order_relaxed);
            generation_.wait(last, std::memory_order_acquire);
            awake_.fetch_add(1, std::memory_order_relaxed);
          }
        }
      }
      last = now;
      claim(now);
    }
  }

  std::mutex mutex_;
  std::vector<std::thread> workers_;
  int avoided_core_ = -1;
  pid_t owner_;
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<int> awake_{0};
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<int> count_{0};
  std::atomic<const std::function<void(int)>*> task_{nullptr};
};

}  // namespace

int pool_threads() {
  static const int threads = [] {
    const char* wanted = std::getenv("MLXQ_THREADS");
    return wanted ? std::clamp(std::atoi(wanted), 1, 256) : allowed_cores();
  }();
  return threads;
}

void parallel(int count, bool brief, const std::function<void(int)>& task) {
  if (count > 1 && pool_threads() > 1) {
    // Never destroyed: MLX's stream threads may still run when static objects go.
    static Pool* pool = new Pool(pool_threads());
    if (pool->run(count, brief, task)) {
      return;
    }
  }
  for (int i = 0; i < count; ++i) {
    task(i);
  }
}

}  // namespace mlxq
