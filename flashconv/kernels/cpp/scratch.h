// scratch.h: memory to work in, and work for several threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "conv.h"

namespace flashconv {

// A block of memory that grows and is kept: no page is fetched anew from one call to the next.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(memory); }

  template <class T>
  T* reserve(int64_t count) {
    const int64_t wanted = count * int64_t(sizeof(T)) + SLACK;
    if (wanted > size) grow(wanted);
    return static_cast<T*>(memory);
  }

 private:
  static constexpr int64_t ALIGNMENT = 64;  // a line of the cache
  static constexpr int64_t SLACK = 256;     // whole vectors may be written over the end

  void grow(int64_t wanted) {
    free(memory);
    memory = nullptr;
    size = 0;
    if (posix_memalign(&memory, ALIGNMENT, wanted)) throw std::bad_alloc();
    size = wanted;
  }

  void* memory = nullptr;
  int64_t size = 0;
};

// What a task holds at one time, each in a buffer of its own.
enum Slot { TILE, SECOND_TILE, SUMS, TOTALS, ROWS, LINE, WEIGHTS, SLOTS };

// This thread's memory for `count` numbers; what it held before is gone.
template <class T>
T* scratch(Slot slot, int64_t count) {
  static thread_local Buffer buffers[SLOTS];
  return buffers[slot].template reserve<T>(count);
}

// Calls job(0) ... job(jobs - 1), on all threads; throws bad_alloc here if one of them did.
template <class Job>
void run_all(const Threads& threads, int64_t jobs, const Job& job) {
  if (jobs <= 1 || threads.count <= 1) {
    for (int64_t i = 0; i < jobs; i++) job(i);
    return;
  }
  struct State {
    const Job& job;
    std::atomic<bool> failed;
  } state{job, {false}};
  auto call = [](void* pointer, int64_t index) {
    State& state = *static_cast<State*>(pointer);
    if (state.failed) return;
    try {
      state.job(index);
    } catch (const std::bad_alloc&) {
      state.failed = true;
    }
  };
  threads.run(jobs, call, &state);
  if (state.failed) throw std::bad_alloc();
}

#if !defined(FLASHCONV_SMALL_WORK)
#define FLASHCONV_SMALL_WORK 2e5  // a test sets it to 0, so that small layers use threads too
#endif

// Products that take less time than waking a thread.
constexpr double SMALL_WORK = FLASHCONV_SMALL_WORK;

// Tasks of a call of `work` products, several at a time where they are small; on this thread alone
// where all of them are.
template <class Job>
void run_in_portions(const Threads& threads, int64_t tasks, double work, const Job& job) {
  if (work < 2 * SMALL_WORK || threads.count <= 1) {
    for (int64_t i = 0; i < tasks; i++) job(i);
    return;
  }
  const double wanted = SMALL_WORK * double(tasks) / work;
  const int64_t most = tasks / (4 * threads.count);
  int64_t portion = wanted < double(most) ? int64_t(wanted) : most;
  if (portion < 1) portion = 1;
  run_all(threads, (tasks + portion - 1) / portion, [&](int64_t index) {
    for (int64_t i = index * portion; i < tasks && i < (index + 1) * portion; i++) job(i);
  });
}

}  // namespace flashconv
