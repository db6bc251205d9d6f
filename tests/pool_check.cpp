// The pool under load, for ThreadSanitizer: test_kernels.py compiles and runs it.
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>

using namespace flashconv;

struct Sums {
  std::vector<int64_t> at;
  std::atomic<int64_t> calls{0};
};

void add(void* state, int64_t i) {  // each job writes a place of its own, without a lock
  auto& sums = *static_cast<Sums*>(state);
  sums.at[i] += i + 1;
  sums.calls++;
}

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

void each_job_once(int rounds) {
  for (int round = 0; round < rounds; round++) {
    int64_t count = round % 9;
    Sums sums;
    sums.at.assign(9, 0);
    pool()->run(count, add, &sums);
    expect(sums.calls == count, "every job runs once");
    for (int64_t i = 0; i < count; i++) expect(sums.at[i] == i + 1, "what a job wrote is seen by the caller");
  }
}

struct Meeting {
  std::atomic<int64_t> here{0};
  int64_t count;
};

void meet(void* state, int64_t) {  // ends when all are there
  auto& meeting = *static_cast<Meeting*>(state);
  meeting.here++;
  while (meeting.here < meeting.count) std::this_thread::yield();
}

void all_at_once(int rounds) {
  for (int round = 0; round < rounds; round++) {
    Meeting meeting{{0}, 1 + round % 6};
    pool()->run_together(meeting.count, meet, &meeting);
  }
}

void just_asleep(int rounds) {  // calls that come while helpers fall asleep, each of which needs one
  for (int round = 0; round < rounds; round++) {
    Meeting meeting{{0}, 2};
    pool()->run_together(2, meet, &meeting);
    timespec time{0, round * 7919 % 400 * 1000};  // 0 to 0.4 ms
    nanosleep(&time, nullptr);
  }
}

void rest() {  // until every helper sleeps
  timespec time{0, 20000000};
  nanosleep(&time, nullptr);
}

int main(int, char** argv) {
  survive_fork();
  for (int64_t size : {1, 2, 3, 7}) {
    set_threads(size);
    expect(pool()->size() == size, "the pool has the size asked for");
    rest();
    std::vector<std::thread> streams;
    for (int i = 0; i < 3; i++) streams.emplace_back(each_job_once, 2000);
    for (int i = 0; i < 2; i++) streams.emplace_back(all_at_once, 200);
    for (int64_t other : {2, 5, 3}) set_threads(other);  // while they run
    for (auto& stream : streams) stream.join();
    rest();
    each_job_once(100);
    set_threads(2);
    just_asleep(1000);
  }
  if (std::atoi(argv[1])) {  // ThreadSanitizer does not follow a child with threads
    pid_t child = fork();
    if (child == 0) {
      each_job_once(1000);
      all_at_once(100);
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    expect(status == 0, "a child of fork has a pool of its own");
    each_job_once(100);
  }
  std::puts("every job was done");
}
