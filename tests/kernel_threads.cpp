// kernel_threads.cpp: threads for the kernels' harness. They spin for a moment, then sleep.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "../flashconv/kernels/cpp/conv.h"

namespace {

using Job = void (*)(void*, int64_t);

struct Pool {
  std::mutex mutex;
  std::condition_variable wakes;
  std::atomic<int64_t> round{0}, next{0}, running{0};
  int64_t jobs = 0;
  Job job = nullptr;
  void* state = nullptr;
  std::atomic<bool> stops{false};
  std::vector<std::thread> workers;

  void take() {
    for (int64_t i = next++; i < jobs; i = next++) job(state, i);
  }

  void work() {
    int64_t seen = 0;
    while (true) {
      for (int spin = 0; spin < 20000 && round == seen && !stops; spin++) std::this_thread::yield();
      std::unique_lock<std::mutex> lock(mutex);
      wakes.wait(lock, [&] { return round != seen || stops; });
      if (stops) return;
      seen = round;
      lock.unlock();
      take();
      running--;
    }
  }

  void run(int64_t count, Job call, void* with) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      jobs = count;
      job = call;
      state = with;
      next = 0;
      running = workers.size();
      round++;
    }
    wakes.notify_all();
    take();
    while (running > 0) std::this_thread::yield();
  }

  void resize(int64_t count) {
    stops = true;
    wakes.notify_all();
    for (std::thread& worker : workers) worker.join();
    workers.clear();
    stops = false;
    round = 0;
    for (int64_t i = 1; i < count; i++) workers.emplace_back([this] { work(); });
  }

  ~Pool() { resize(1); }
};

Pool pool;

void run(int64_t jobs, Job job, void* state) { pool.run(jobs, job, state); }

}  // namespace

extern "C" void threads_start(flashconv::Threads* threads, int64_t count) {
  pool.resize(count);
  threads->count = count;
  threads->run = run;
}
