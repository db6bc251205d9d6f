// pool.h: threads that share the jobs of one call. Plain C++, no MLX.
#pragma once
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace flashconv {

// A sleeping thread takes 0.1 to 0.3 ms to wake, so it looks for new jobs this often before it
// falls asleep: some 0.1 ms, which is longer than the gap between two layers of a network.
constexpr int SPINS = 4000;

inline void pause() {  // tell the processor that this thread only waits
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  using Job = void (*)(void* state, int64_t index);

  explicit Pool(int64_t size) {  // threads that work, the caller's own among them
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are for Python's main thread
    try {
      for (int64_t i = 1; i < size; i++) helpers.emplace_back([this] { help(); });
    } catch (const std::system_error&) {  // as many as the system gives
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Pool() {
    stopped.store(true);
    gate.fetch_add(CALL);
    wake(size());
    for (auto& helper : helpers) helper.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int64_t size() const { return int64_t(helpers.size()) + 1; }

  // Does all jobs, with the helpers if no other caller has them. Jobs don't call this themselves.
  void run(int64_t count, Job work, void* data) {
    if (count > 1 && size() > 1 && turn.try_lock()) {
      share(count, work, data);
      turn.unlock();
    } else {
      for (int64_t i = 0; i < count; i++) work(data, i);
    }
  }

  // The same for jobs that wait for each other: each has a thread to itself.
  void run_together(int64_t count, Job work, void* data) {
    if (count <= size()) {
      std::lock_guard<std::mutex> lock(turn);
      share(count, work, data);
    } else {
      std::vector<std::thread> own;
      for (int64_t i = 1; i < count; i++) own.emplace_back(work, data, i);
      work(data, 0);
      for (auto& thread : own) thread.join();
    }
  }

 private:
  // The gate is one number: how many calls there were, whether the last one is open to helpers,
  // and how many of them are inside. Nobody waits for a helper that has not entered.
  static constexpr uint64_t OPEN = uint64_t(1) << 31, CALL = uint64_t(1) << 32;
  static uint64_t call(uint64_t gate) { return gate / CALL; }
  static uint64_t inside(uint64_t gate) { return gate % OPEN; }

  void share(int64_t count, Job work, void* data) {
    jobs = count;
    job = work;
    state = data;
    next.store(0, std::memory_order_relaxed);
    gate.fetch_add(CALL + OPEN);
    wake(count - 1);
    take();
    gate.fetch_sub(OPEN);
    for (int spins = 0; inside(gate.load(std::memory_order_acquire)); spins++) {
      if (spins < SPINS) pause();
      else std::this_thread::yield();
    }
  }

  void take() {  // jobs, one after the other, until none is left
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) job(state, i);
  }

  void help() {
    uint64_t seen = 0;
    while (!stopped.load()) {
      await(seen);
      uint64_t now = gate.load();
      while ((now & OPEN) && !gate.compare_exchange_weak(now, now + 1)) {}
      seen = call(now);
      if (!(now & OPEN)) continue;  // come too late
      take();
      gate.fetch_sub(1);
    }
  }

  void await(uint64_t seen) {  // a call after the one that was seen
    for (int spins = 0; spins < SPINS; spins++) {
      if (call(gate.load()) != seen) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(bed);
    sleepers.fetch_add(1);
    bell.wait(lock, [&] { return call(gate.load()) != seen; });
    sleepers.fetch_sub(1);
  }

  // The gate has changed before the sleepers are counted, and a helper counts itself before it
  // looks at the gate: one of the two sees the other.
  void wake(int64_t wanted) {
    int64_t count = std::min(wanted, sleepers.load());
    if (count <= 0) return;
    { std::lock_guard<std::mutex> lock(bed); }  // whoever counted itself now waits for the bell
    for (int64_t i = 0; i < count; i++) bell.notify_one();
  }

  std::vector<std::thread> helpers;
  std::mutex turn, bed;  // whose jobs are shared; falling asleep
  std::condition_variable bell;
  std::atomic<uint64_t> gate{0};
  std::atomic<int64_t> sleepers{0}, next{0};
  std::atomic<bool> stopped{false};
  int64_t jobs = 0;
  Job job = nullptr;
  void* state = nullptr;
};

// The pool of the process, made at its first use. It is never destroyed: when the process ends,
// jobs may still be under way.
struct Shared {
  std::mutex mutex;
  int64_t size = 1;
  std::shared_ptr<Pool> pool;
};

inline Shared& shared() {
  static Shared* only = new Shared;
  return *only;
}

inline std::shared_ptr<Pool> pool() {
  std::lock_guard<std::mutex> lock(shared().mutex);
  if (!shared().pool) shared().pool = std::make_shared<Pool>(shared().size);
  return shared().pool;
}

inline int64_t thread_count() {
  std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().size;
}

// Calls under way keep the pool they started with, and the last of them ends its threads.
inline void set_threads(int64_t size) {
  std::shared_ptr<Pool> before;
  std::lock_guard<std::mutex> lock(shared().mutex);
  shared().size = size;
  before.swap(shared().pool);
}

// A child of fork has none of its parent's threads: it forgets the pool, without joining them.
inline void survive_fork() {
  pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                 [] {
                   new (&shared().pool) std::shared_ptr<Pool>();
                   shared().mutex.unlock();
                 });
}

}  // namespace flashconv
