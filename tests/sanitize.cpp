// sanitize.cpp: random layers against the loop that everybody writes. Arrays end where a page ends
// that nobody may touch (or start where one does), so whatever reaches past them is seen.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../flashconv/kernels/cpp/conv.h"
#include "../flashconv/kernels/cpp/vector.h"

extern "C" int flashconv_run(const flashconv::Convolution*, const void*, const void*, const void*,
                             void*, const flashconv::Threads*);

using namespace flashconv;

namespace {

std::mt19937_64 generator;

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

template <size_t count>
int64_t any(const int64_t (&values)[count]) {
  return values[draw(0, count - 1)];
}

// Memory of exactly `bytes`, with a page behind (or before) it that faults.
class Guarded {
 public:
  Guarded(int64_t bytes, bool at_end) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    size = (bytes + page - 1) / page * page + 2 * page;
    base = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base, page, PROT_NONE);
    mprotect(base + size - page, page, PROT_NONE);
    data = at_end ? base + size - page - bytes : base + page;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base, size); }

  char* data;

 private:
  char* base;
  int64_t size;
};

// An array of a dtype, and the same numbers as float64.
struct Array {
  Array(int64_t count, Dtype dtype)
      : dtype(dtype), values(count), memory(count * (dtype == FLOAT32 ? 4 : 2), draw(0, 1)) {}

  template <class T>
  double get(int64_t i) const {
    T value;
    memcpy(&value, memory.data + i * sizeof(T), sizeof(T));
    return widen(value);
  }

  template <class T>
  void put(int64_t i, float number) {
    T value;
    store_part(&value, Vector{} + number, 1);
    memcpy(memory.data + i * sizeof(T), &value, sizeof(T));
  }

  void put(int64_t i, float number) {
    if (dtype == FLOAT32) put<float>(i, number);
    if (dtype == FLOAT16) put<Float16>(i, number);
    if (dtype == BFLOAT16) put<BFloat16>(i, number);
  }

  void read() {
    for (int64_t i = 0; i < int64_t(values.size()); i++) {
      if (dtype == FLOAT32) values[i] = get<float>(i);
      if (dtype == FLOAT16) values[i] = get<Float16>(i);
      if (dtype == BFLOAT16) values[i] = get<BFloat16>(i);
    }
  }

  void fill() {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < int64_t(values.size()); i++) put(i, normal(generator));
    read();
  }

  Dtype dtype;
  std::vector<double> values;
  Guarded memory;
};

void run_on_threads(int64_t jobs, void (*job)(void*, int64_t), void* state, int count) {
  std::vector<std::thread> threads;
  for (int t = 0; t < count; t++)
    threads.emplace_back([=] {
      for (int64_t i = t; i < jobs; i += count) job(state, i);
    });
  for (std::thread& thread : threads) thread.join();
}

void run_on_three(int64_t jobs, void (*job)(void*, int64_t), void* state) {
  run_on_threads(jobs, job, state, 3);
}

void run_on_seven(int64_t jobs, void (*job)(void*, int64_t), void* state) {
  run_on_threads(jobs, job, state, 7);
}

// So many channels that sums are set aside.
Convolution deep_convolution() {
  Convolution c{};
  c.kind = int32_t(draw(FORWARD, INPUT_GRADIENT));
  c.channels_last = int32_t(draw(0, 1));
  c.batch = c.groups = 1;
  c.in_channels = c.kind == FORWARD ? draw(2000, 4000) : 3;
  c.out_channels = c.kind == FORWARD ? 3 : draw(2000, 4000);
  for (int i = 0; i < 3; i++) {
    c.kernel[i] = i ? 3 : 1;
    c.stride[i] = c.dilation[i] = 1;
    c.input[i] = i ? draw(3, 5) : 1;
    c.output[i] = c.input[i] - c.kernel[i] + 1;
  }
  return c;
}

Convolution random_convolution() {
  if (draw(0, 29) == 0) return deep_convolution();
  Convolution c{};
  c.kind = int32_t(draw(0, 3));
  c.dtype = int32_t(draw(0, 2));
  c.channels_last = int32_t(draw(0, 1));
  c.batch = draw(1, 3);
  c.groups = any({1, 1, 1, 2, 3, 8, 19, 40});
  c.in_channels = any({1, 1, 2, 3, 4, 5, 16, 40});
  c.out_channels = any({1, 1, 2, 3, 5, 6, 7, 12, 17, 24, 33});
  if (c.groups > 3) c.in_channels = any({1, 1, 2, 4});
  if (c.groups > 3) c.out_channels = any({1, 1, 2, 4});
  const int axes = int(any({1, 1, 2, 2, 2, 3}));
  const int64_t longest = axes == 1 ? any({7, 7, 300}) : axes == 2 ? any({3, 5, 15}) : 3;
  const int64_t most = axes == 1 ? any({30, 400}) : axes == 2 ? any({9, 30}) : 8;
  if (longest > 7) c.in_channels = any({1, 2}), c.out_channels = any({1, 2});
  for (int i = 0; i < 3; i++) {
    const bool is_there = i >= 3 - axes;
    c.kernel[i] = is_there ? draw(1, longest) : 1;
    c.stride[i] = is_there ? any({1, 1, 1, 2, 3, 4, 7}) : 1;
    c.dilation[i] = is_there ? any({1, 1, 1, 2, 3, 9}) : 1;
    const int64_t span = (c.kernel[i] - 1) * c.dilation[i] + 1;
    c.padding[i] = is_there ? draw(0, 1) * draw(0, span + 2) : 0;
    const int64_t after = is_there ? draw(0, 1) * draw(0, span + 2) : 0;
    const int64_t least = std::max<int64_t>(1, span - c.padding[i] - after);
    c.input[i] = is_there ? least + draw(0, most) : 1;
    c.output[i] = (c.input[i] + c.padding[i] + after - span) / c.stride[i] + 1;
  }
  return c;
}

int64_t volume(const int64_t* lengths) { return lengths[0] * lengths[1] * lengths[2]; }

// Where (image, channel, place) of x or y lies.
int64_t index(const Convolution& c, int64_t image, int64_t channel, int64_t channels,
              int64_t place, int64_t places) {
  if (c.channels_last) return (image * places + place) * channels + channel;
  return (image * channels + channel) * places + place;
}

// Calls use(x's index, y's index, w's index) for every product of the layer.
template <class Use>
void for_each_product(const Convolution& c, const Use& use) {
  const int64_t inputs = c.groups * c.in_channels;
  const int64_t outputs = c.groups * c.out_channels;
  for (int64_t place = 0; place < volume(c.output); place++)
    for (int64_t tap = 0; tap < volume(c.kernel); tap++) {
      const int64_t at[] = {place / c.output[2] / c.output[1], place / c.output[2] % c.output[1],
                            place % c.output[2]};
      const int64_t k[] = {tap / c.kernel[2] / c.kernel[1], tap / c.kernel[2] % c.kernel[1],
                           tap % c.kernel[2]};
      int64_t from = 0;
      bool is_inside = true;
      for (int i = 0; i < 3; i++) {
        const int64_t z = at[i] * c.stride[i] - c.padding[i] + k[i] * c.dilation[i];
        is_inside = is_inside && z >= 0 && z < c.input[i];
        from = from * c.input[i] + z;
      }
      if (!is_inside) continue;
      for (int64_t n = 0; n < c.batch; n++)
        for (int64_t o = 0; o < outputs; o++)
          for (int64_t j = 0; j < c.in_channels; j++) {
            const int64_t channel = o / c.out_channels * c.in_channels + j;
            use(index(c, n, channel, inputs, from, volume(c.input)),
                index(c, n, o, outputs, place, volume(c.output)),
                (o * c.in_channels + j) * volume(c.kernel) + tap);
          }
    }
}

struct Case {
  Convolution c;
  Array x, y, w, bias;
  bool has_bias;

  explicit Case(const Convolution& c)
      : c(c),
        x(c.batch * c.groups * c.in_channels * volume(c.input), Dtype(c.dtype)),
        y(c.batch * c.groups * c.out_channels * volume(c.output), Dtype(c.dtype)),
        w(c.groups * c.out_channels * c.in_channels * volume(c.kernel), Dtype(c.dtype)),
        bias(c.groups * (c.kind == INPUT_GRADIENT ? c.in_channels : c.out_channels),
             Dtype(c.dtype)),
        has_bias(c.kind < WEIGHT_GRADIENT && draw(0, 1)) {}

  Array& result() {
    if (c.kind == FORWARD) return y;
    if (c.kind == INPUT_GRADIENT) return x;
    return c.kind == WEIGHT_GRADIENT ? w : bias;
  }

  bool run(const Threads& threads) {
    const char* bias_data = has_bias ? bias.memory.data : nullptr;
    const char* x_data = x.memory.data;
    const char* y_data = y.memory.data;
    const char* w_data = w.memory.data;
    const char* firsts[] = {x_data, w_data, x_data, y_data};
    const char* seconds[] = {w_data, y_data, y_data, nullptr};
    const char* first = firsts[c.kind];
    const char* second = seconds[c.kind];
    return flashconv_run(&c, first, second, bias_data, result().memory.data, &threads) == 0;
  }

  // The loop's sums, and those of magnitudes.
  void expect(std::vector<double>& sums, std::vector<double>& magnitudes) {
    const int64_t channels = bias.values.size();
    const int64_t count = result().values.size();
    const int64_t places = count / c.batch / channels;
    sums.assign(count, 0.0);
    magnitudes.assign(count, 0.0);
    auto add = [&](int64_t to, double value) {
      sums[to] += value;
      magnitudes[to] += std::fabs(value);
    };
    for (int64_t i = 0; has_bias && i < count; i++)
      add(i, bias.values[c.channels_last ? i % channels : i / places % channels]);
    if (c.kind == BIAS_GRADIENT) {
      const int64_t size = volume(c.output);
      for (int64_t i = 0; i < int64_t(y.values.size()); i++)
        add(c.channels_last ? i % channels : i / size % channels, y.values[i]);
      return;
    }
    for_each_product(c, [&](int64_t i, int64_t o, int64_t k) {
      if (c.kind == FORWARD) add(o, x.values[i] * w.values[k]);
      if (c.kind == INPUT_GRADIENT) add(i, y.values[o] * w.values[k]);
      if (c.kind == WEIGHT_GRADIENT) add(k, x.values[i] * y.values[o]);
    });
  }

  std::string describe() const {
    char text[512];
    auto list = [](const int64_t* a) {
      return std::to_string(a[0]) + "," + std::to_string(a[1]) + "," + std::to_string(a[2]);
    };
    snprintf(text, sizeof text, "kind %d dtype %d last %d batch %ld groups %ld channels %ld->%ld",
             c.kind, c.dtype, c.channels_last, long(c.batch), long(c.groups), long(c.in_channels),
             long(c.out_channels));
    return std::string(text) + " input " + list(c.input) + " kernel " + list(c.kernel) +
           " output " + list(c.output) + " stride " + list(c.stride) + " dilation " +
           list(c.dilation) + " padding " + list(c.padding);
  }
};

// Whether exactly those results are infinite or no numbers that see an infinity.
bool check_infinity(Case& test) {
  if (test.c.kind == BIAS_GRADIENT) return true;
  Array& source = test.c.kind == INPUT_GRADIENT ? test.y : test.x;
  const int64_t at = draw(0, int64_t(source.values.size()) - 1);
  source.put(at, INFINITY);
  source.read();
  std::vector<double> sums, magnitudes;
  test.expect(sums, magnitudes);
  if (!test.run({1, nullptr})) return false;
  Array& result = test.result();
  result.read();
  for (int64_t i = 0; i < int64_t(sums.size()); i++) {
    if (std::isfinite(sums[i]) == std::isfinite(result.values[i])) continue;
    printf("%g instead of %g at %ld beside an infinity at %ld: %s\n", result.values[i], sums[i],
           long(i), long(at), test.describe().c_str());
    return false;
  }
  return true;
}

bool check(Case& test) {
  test.x.fill();
  test.y.fill();
  test.w.fill();
  test.bias.fill();
  std::vector<double> sums, magnitudes;
  test.expect(sums, magnitudes);
  Array& result = test.result();
  if (!test.run({1, nullptr})) return false;
  result.read();
  const std::vector<double> alone = result.values;
  for (int64_t i = 0; i < int64_t(sums.size()); i++) {
    const double rounding = std::vector<double>{0, 0x1p-11, 0x1p-8}[result.dtype];
    const double limit = 0x1p-18 * magnitudes[i] + rounding * std::fabs(sums[i]) + 0x1p-24;
    if (std::fabs(alone[i] - sums[i]) <= limit) continue;
    printf("%g instead of %g at %ld: %s\n", alone[i], sums[i], long(i), test.describe().c_str());
    return false;
  }
  for (const Threads& threads : {Threads{3, run_on_three}, Threads{7, run_on_seven}}) {
    if (!test.run(threads)) return false;
    result.read();
    if (memcmp(alone.data(), result.values.data(), alone.size() * sizeof(double)) == 0) continue;
    printf("other bits on %ld threads: %s\n", long(threads.count), test.describe().c_str());
    return false;
  }
  return check_infinity(test);
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t cases = count > 1 ? atoll(arguments[1]) : 2000;
  const int64_t seed = count > 2 ? atoll(arguments[2]) : 0;
  for (int64_t i = 0; i < cases; i++) {
    generator.seed(seed * 1000000 + i);
    Case test(random_convolution());
    if (getenv("VERBOSE")) printf("%ld: %s\n", long(i), test.describe().c_str()), fflush(stdout);
    if (!check(test)) return 1;
  }
  printf("%ld layers as the loop computes them\n", long(cases));
  return 0;
}
