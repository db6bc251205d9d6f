// glue.cpp: the one file that sees MLX. A primitive for the convolution and its derivatives, and its binding to Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>
#include <sstream>

#include "conv.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "pool.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace flashconv;
using std::optional;
using std::vector;

namespace {

constexpr int64_t LONGEST = INT32_MAX;  // an axis in MLX
constexpr int64_t LARGEST = int64_t(1) << 59;  // elements, so that bytes fit into 63 bits

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// What a layer fixes ---------------------------------------------------------------------------

using Lengths = vector<int64_t>;

struct Spec {
  int axes;
  int64_t groups;
  bool channels_last, transposed;
  std::array<int64_t, 3> stride, dilation, before, after, extra;  // extra: output padding

  Spec(const Lengths& strides, const vector<std::pair<int64_t, int64_t>>& padding,
       const Lengths& dilations, int64_t groups, bool channels_last,
       const optional<Lengths>& output_padding);
  int channel_axis() const { return channels_last ? axes + 1 : 1; }
  bool is_invertible() const {  // whether the length of y tells that of x
    return transposed || std::all_of(&stride[0], &stride[axes], [](int64_t s) { return s == 1; });
  }
  int first_axis() const { return channels_last ? 1 : 2; }
  bool operator==(const Spec&) const = default;
};

Spec::Spec(const Lengths& strides, const vector<std::pair<int64_t, int64_t>>& padding,
           const Lengths& dilations, int64_t groups, bool channels_last,
           const optional<Lengths>& output_padding)
    : axes(int(strides.size())), groups(groups), channels_last(channels_last),
      transposed(output_padding.has_value()), stride{}, dilation{}, before{}, after{}, extra{} {
  if (axes < 1 || axes > 3) refuse("there must be 1 to 3 axes, but stride has ", strides.size());
  if (padding.size() != strides.size() || dilations.size() != strides.size() ||
      (transposed && output_padding->size() != strides.size()))
    refuse("stride, padding, dilation and output_padding must be of one length");
  if (groups < 1 || groups > LONGEST) refuse("groups must be 1 to 2^31-1, but got ", groups);
  for (int i = 0; i < axes; i++) {
    auto [low, high] = padding[i];
    int64_t out = transposed ? (*output_padding)[i] : 0;
    if (strides[i] < 1) refuse("stride must be at least 1, but got ", strides[i]);
    if (dilations[i] < 1) refuse("dilation must be at least 1, but got ", dilations[i]);
    if (std::min({low, high, out}) < 0) refuse("padding must not be negative");
    if (std::max({low, high, out}) > LONGEST) refuse("padding must be below 2^31");
    // A step beyond the longest axis leaves it, however long it is: no product overflows.
    stride[i] = std::min(strides[i], LONGEST + 1);
    dilation[i] = std::min(dilations[i], LONGEST + 1);
    before[i] = low;
    after[i] = high;
    extra[i] = out;
  }
}

// Which shapes belong together -----------------------------------------------------------------

int64_t y_length(const Spec& spec, int i, int64_t x, int64_t taps) {
  int64_t padded = x + spec.before[i] + spec.after[i];
  int64_t span = spec.dilation[i] * (taps - 1) + 1 + spec.extra[i];
  if (padded > LONGEST) refuse("a padded length must be below 2^31, but got ", padded);
  if (span > padded) refuse("a kernel that spans ", span, " exceeds the padded input of ", padded);
  return (padded - span) / spec.stride[i] + 1;
}

int64_t x_length(const Spec& spec, int i, int64_t y, int64_t taps) {
  int64_t whole = spec.stride[i] * (y - 1) + spec.dilation[i] * (taps - 1) + 1 + spec.extra[i];
  if (whole > LONGEST) refuse("a result must be shorter than 2^31, but got ", whole);
  int64_t cut = spec.before[i] + spec.after[i];
  if (whole <= cut) refuse("padding of ", cut, " leaves nothing of a result of ", whole);
  return whole - cut;
}

void check_size(const mx::Shape& shape) {
  int64_t size = 1;
  for (int64_t length : shape)
    if (length < 0 || __builtin_mul_overflow(size, std::max<int64_t>(length, 1), &size) || size > LARGEST)
      refuse("there is no array of shape ", shape);
}

void check_rank(const Spec& spec, const mx::Shape& shape, const char* what) {
  if (int(shape.size()) != spec.axes + 2)
    refuse(what, " must have ", spec.axes + 2, " axes, but got the shape ", shape);
  check_size(shape);
}

mx::Shape y_shape(const Spec& spec, const mx::Shape& x, const mx::Shape& w) {
  check_rank(spec, x, "x");
  check_rank(spec, w, "w");
  mx::Shape y = x;
  y[spec.channel_axis()] = w[0];
  for (int i = 0; i < spec.axes; i++) {
    int at = spec.first_axis() + i;
    if (x[at] < 1 || w[2 + i] < 1) refuse("lengths must be at least 1, but got ", x, " and ", w);
    y[at] = mx::ShapeElem(y_length(spec, i, x[at], w[2 + i]));
  }
  return y;
}

mx::Shape x_shape(const Spec& spec, const mx::Shape& w, const mx::Shape& y) {
  check_rank(spec, w, "w");
  check_rank(spec, y, "y");
  mx::Shape x = y;
  int64_t channels = spec.groups * w[1];
  if (channels > LONGEST) refuse("groups * ", w[1], " channels are more than 2^31-1");
  x[spec.channel_axis()] = mx::ShapeElem(channels);
  for (int i = 0; i < spec.axes; i++) {
    int at = spec.first_axis() + i;
    if (y[at] < 1 || w[2 + i] < 1) refuse("lengths must be at least 1, but got ", y, " and ", w);
    x[at] = mx::ShapeElem(x_length(spec, i, y[at], w[2 + i]));
  }
  return x;
}

// The one place that decides what reaches a kernel. Every kind passes the three shapes of its form.
void check_form(const Spec& spec, const mx::Shape& x, const mx::Shape& w, const mx::Shape& y) {
  check_rank(spec, x, "x");
  check_rank(spec, w, "w");
  check_rank(spec, y, "y");
  int c = spec.channel_axis();
  bool fit = x[0] == y[0] && x[c] == spec.groups * w[1] && y[c] == w[0] && w[0] % spec.groups == 0;
  for (int i = 0; i < spec.axes && fit; i++) {
    int at = spec.first_axis() + i;
    if (x[at] < 1 || w[2 + i] < 1 || y[at] < 1)
      refuse("lengths must be at least 1, but got ", x, ", ", w, " and ", y);
    fit = spec.transposed ? x[at] == x_length(spec, i, y[at], w[2 + i])
                          : y[at] == y_length(spec, i, x[at], w[2 + i]);
  }
  if (!fit)
    refuse("x of shape ", x, ", w of shape ", w, " and y of shape ", y, " do not belong to one ",
           "convolution of ", spec.groups, spec.groups == 1 ? " group" : " groups");
}

// The primitive --------------------------------------------------------------------------------

enum Role { X, W, Y };  // in sum(y * conv(x, w))
enum Third { NOTHING, BIAS, LIKE };  // LIKE: an array of which only the shape is read

Role made_by(Kind kind) { return kind == FORWARD ? Y : kind == INPUT_GRADIENT ? X : W; }
Kind maker_of(Role role) { return role == Y ? FORWARD : role == X ? INPUT_GRADIENT : WEIGHT_GRADIENT; }

constexpr const char* NO_GPU =
    "flashconv's kernels are for CPUs: call them under mx.stream(mx.cpu), or pass stream=mx.cpu";

Dtype dtype_of(mx::Dtype dtype) {
  if (dtype == mx::float32) return FLOAT32;
  if (dtype == mx::float16) return FLOAT16;
  if (dtype == mx::bfloat16) return BFLOAT16;
  refuse("arrays must be float32, float16 or bfloat16, but got ", dtype);
}

using SpecPtr = std::shared_ptr<const Spec>;
using Run = decltype(&flashconv_run);
std::atomic<Run> kernels{nullptr};

class Convolve : public mx::Primitive {
 public:
  Convolve(mx::Stream stream, SpecPtr spec, Kind kind, Third third, mx::Shape shape)
      : Primitive(stream), spec(std::move(spec)), kind(kind), third(third), shape(std::move(shape)) {}

  static mx::array make(mx::Stream, SpecPtr, Kind, Third, mx::Shape, vector<mx::array>);

  void eval_cpu(const vector<mx::array>& inputs, vector<mx::array>& outputs) override;
  void eval_gpu(const vector<mx::array>&, vector<mx::array>&) override {
    throw std::runtime_error(NO_GPU);
  }
  vector<mx::array> vjp(const vector<mx::array>& primals, const vector<mx::array>& cotangents,
                        const vector<int>& argnums, const vector<mx::array>& outputs) override;
  vector<mx::array> jvp(const vector<mx::array>& primals, const vector<mx::array>& tangents,
                        const vector<int>& argnums) override;
  std::pair<vector<mx::array>, vector<int>> vmap(const vector<mx::array>& inputs,
                                                 const vector<int>& axes) override;
  vector<mx::Shape> output_shapes(const vector<mx::array>& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  const char* name() const override;

 private:
  Role role(int argument) const;
  mx::array derivative(int argument, const vector<mx::array>& primals, const mx::array& cotangent);
  mx::array spread(const mx::array& bias, const mx::array& like);
  mx::array mapped(const mx::array& a, int axis, int size, Role role, bool groups);
  Convolution geometry(const vector<mx::array>& inputs, const mx::array& output) const;

  SpecPtr spec;
  Kind kind;
  Third third;
  mx::Shape shape;  // of the result, when it was traced
};

// Inputs are in the order of roles, without the one that the kind makes, and the third comes last.
Role Convolve::role(int argument) const {
  if (kind == BIAS_GRADIENT) return Y;
  return Role(argument < made_by(kind) ? argument : argument + 1);
}

vector<mx::Shape> Convolve::output_shapes(const vector<mx::array>& inputs) {
  if (kind == BIAS_GRADIENT) {
    check_rank(*spec, inputs[0].shape(), "y");
    return {{inputs[0].shape(spec->channel_axis())}};
  }
  mx::Shape form[3];
  for (int i = 0; i < 2; i++) form[role(i)] = inputs[i].shape();
  mx::Shape& made = form[made_by(kind)];
  if (third == LIKE) made = inputs[2].shape();
  else if (kind == FORWARD) made = y_shape(*spec, form[X], form[W]);
  else if (kind == INPUT_GRADIENT && spec->is_invertible()) made = x_shape(*spec, form[W], form[Y]);
  else made = shape;
  check_form(*spec, form[X], form[W], form[Y]);
  if (third == BIAS && inputs[2].shape() != mx::Shape{made[spec->channel_axis()]})
    refuse("bias of shape ", inputs[2].shape(), " does not fit a result of shape ", made);
  return {made};
}

mx::array Convolve::make(mx::Stream stream, SpecPtr spec, Kind kind, Third third, mx::Shape shape,
                         vector<mx::array> inputs) {
  if (stream.device == mx::Device::gpu) refuse(NO_GPU);
  mx::Dtype dtype = inputs[0].dtype();
  dtype_of(dtype);
  for (auto& input : inputs)
    if (input.dtype() != dtype) refuse("dtypes must agree, but got ", dtype, " and ", input.dtype());
  auto primitive = std::make_shared<Convolve>(stream, std::move(spec), kind, third, std::move(shape));
  primitive->shape = primitive->output_shapes(inputs)[0];
  mx::Shape made = primitive->shape;
  return mx::array(std::move(made), dtype, std::move(primitive), std::move(inputs));
}

bool Convolve::is_equivalent(const mx::Primitive& other) const {
  auto& that = static_cast<const Convolve&>(other);
  return kind == that.kind && third == that.third && shape == that.shape && *spec == *that.spec;
}

const char* Convolve::name() const {
  static const char* const names[] = {"FlashconvForward", "FlashconvInputGradient",
                                      "FlashconvWeightGradient", "FlashconvBiasGradient"};
  return names[kind];
}

// Derivatives ----------------------------------------------------------------------------------

// A bias, or the gradient of one, at every place.
mx::array Convolve::spread(const mx::array& bias, const mx::array& like) {
  mx::Shape column(like.ndim(), 1);
  column[spec->channel_axis()] = bias.shape(0);
  return mx::broadcast_arrays({mx::reshape(bias, column, stream()), like}, stream())[0];
}

mx::array Convolve::derivative(int argument, const vector<mx::array>& primals,
                               const mx::array& cotangent) {
  if (kind == BIAS_GRADIENT) return spread(cotangent, primals[0]);
  if (argument == 2 && third == LIKE) return mx::zeros_like(primals[2], stream());
  if (argument == 2) return make(stream(), spec, BIAS_GRADIENT, NOTHING, {}, {cotangent});
  const mx::array& other = primals[1 - argument];
  vector<mx::array> inputs{cotangent, other};
  if (role(1 - argument) < made_by(kind)) std::swap(inputs[0], inputs[1]);
  Kind next = maker_of(role(argument));
  // A stride skips ends of x of which y tells nothing: x comes along and shows its shape.
  Third shown = next == INPUT_GRADIENT && !spec->is_invertible() ? LIKE : NOTHING;
  if (shown == LIKE) inputs.push_back(primals[argument]);
  return make(stream(), spec, next, shown, primals[argument].shape(), std::move(inputs));
}

vector<mx::array> Convolve::vjp(const vector<mx::array>& primals,
                                const vector<mx::array>& cotangents, const vector<int>& argnums,
                                const vector<mx::array>&) {
  vector<mx::array> result;
  for (int argument : argnums) result.push_back(derivative(argument, primals, cotangents[0]));
  return result;
}

vector<mx::array> Convolve::jvp(const vector<mx::array>& primals,
                                const vector<mx::array>& tangents, const vector<int>& argnums) {
  if (kind == BIAS_GRADIENT) return {make(stream(), spec, kind, NOTHING, {}, tangents)};
  optional<mx::array> moved[3], sum;
  for (size_t i = 0; i < argnums.size(); i++) moved[argnums[i]] = tangents[i];
  if (third == LIKE) moved[2] = primals[2];
  else if (moved[2] && !moved[0] && !moved[1]) moved[0] = mx::zeros_like(primals[0], stream());
  for (int i = 0; i < 2; i++) {
    if (!moved[i]) continue;
    vector<mx::array> inputs{primals[0], primals[1]};
    inputs[i] = *moved[i];
    bool more = moved[2] && (third == LIKE || !sum);  // a bias moves once
    if (more) inputs.push_back(*moved[2]);
    auto term = make(stream(), spec, kind, more ? third : NOTHING, shape, std::move(inputs));
    sum = sum ? mx::add(*sum, term, stream()) : term;
  }
  return {sum ? *sum : mx::zeros_like(primals[2], stream())};
}

// Vectorisation: mapped weights make more groups, mapped inputs alone a larger batch -----------

mx::array in_front(const mx::array& a, int axis, int size, mx::Stream stream) {
  if (axis >= 0) return mx::moveaxis(a, axis, 0, stream);
  mx::Shape shape = a.shape();
  shape.insert(shape.begin(), size);
  return mx::broadcast_to(mx::expand_dims(a, 0, stream), shape, stream);
}

mx::array Convolve::mapped(const mx::array& a, int axis, int size, Role role, bool groups) {
  mx::array front = in_front(a, axis, size, stream());
  if (role == W || !groups) return mx::flatten(front, 0, 1, stream());
  int c = spec->channel_axis();
  return mx::flatten(mx::moveaxis(front, 0, c, stream()), c, c + 1, stream());
}

std::pair<vector<mx::array>, vector<int>> Convolve::vmap(const vector<mx::array>& inputs,
                                                         const vector<int>& axes) {
  int size = 0;
  for (size_t i = 0; i < inputs.size(); i++)
    if (axes[i] >= 0) size = inputs[i].shape(axes[i]);
  bool groups = made_by(kind) == W || kind == BIAS_GRADIENT;
  for (size_t i = 0; i < inputs.size() && i < 2; i++) groups |= role(i) == W && axes[i] >= 0;
  bool outside = third == BIAS && axes[2] >= 0 && !groups;  // a bias of its own for each image

  vector<mx::array> joined;
  for (size_t i = 0; i < inputs.size() && i < 2; i++)
    joined.push_back(role(i) == W && !groups ? inputs[i]
                                             : mapped(inputs[i], axes[i], size, role(i), groups));
  if (third == LIKE) joined.push_back(mapped(inputs[2], axes[2], size, made_by(kind), groups));
  if (third == BIAS && !outside)
    joined.push_back(groups ? mapped(inputs[2], axes[2], size, W, groups) : inputs[2]);

  auto wider = std::make_shared<Spec>(*spec);
  if (groups && __builtin_mul_overflow(spec->groups, int64_t(size), &wider->groups))
    refuse("too many groups");
  int at = made_by(kind) == W || kind == BIAS_GRADIENT || !groups ? 0 : spec->channel_axis();
  mx::Shape wide = shape;
  wide[at] *= size;
  auto result = make(stream(), wider, kind, outside ? NOTHING : third, wide, std::move(joined));
  result = mx::unflatten(result, at, {size, shape[at]}, stream());
  if (outside) {
    mx::Shape column(result.ndim(), 1);
    column[0] = size;
    column[spec->channel_axis() + 1] = shape[spec->channel_axis()];
    auto bias = mx::reshape(in_front(inputs[2], axes[2], size, stream()), column, stream());
    result = mx::add(result, bias, stream());
  }
  return {{result}, {at}};
}

// Evaluation -----------------------------------------------------------------------------------

Convolution Convolve::geometry(const vector<mx::array>& inputs, const mx::array& output) const {
  Convolution g{};
  g.kind = kind;
  g.dtype = dtype_of(output.dtype());
  g.channels_last = spec->channels_last;
  std::fill_n(&g.input[0], 3, 1), std::fill_n(&g.kernel[0], 3, 1), std::fill_n(&g.output[0], 3, 1);
  std::fill_n(&g.stride[0], 3, 1), std::fill_n(&g.dilation[0], 3, 1);
  int c = spec->channel_axis();
  mx::Shape form[3];
  if (kind == BIAS_GRADIENT) {
    form[Y] = inputs[0].shape();
    g.groups = g.in_channels = 1;
    g.out_channels = form[Y][c];
  } else {
    for (int i = 0; i < 2; i++) form[role(i)] = inputs[i].shape();
    form[made_by(kind)] = output.shape();
    g.groups = spec->groups;
    g.in_channels = form[W][1];
    g.out_channels = form[W][0] / spec->groups;
  }
  g.batch = form[Y][0];
  for (int i = 0; i < spec->axes; i++) {
    int at = spec->first_axis() + i, to = 3 - spec->axes + i;
    g.output[to] = form[Y][at];
    if (kind == BIAS_GRADIENT) continue;
    g.input[to] = form[X][at];
    g.kernel[to] = form[W][2 + i];
    g.stride[to] = spec->stride[i];
    g.dilation[to] = spec->dilation[i];
    g.padding[to] = spec->before[i];
  }
  return g;
}

// MLX's own copy where an array is a view of another one; it lives until the stream has passed.
mx::array contiguous(const mx::array& a, mx::Stream stream) {
  if (a.flags().row_contiguous) return a;
  vector<mx::array> copy{mx::contiguous(a, false, stream)};
  copy[0].primitive().eval_cpu({a}, copy);
  mx::cpu::get_command_encoder(stream).add_temporary(copy[0]);
  return copy[0];
}

// Sums over nothing: zeros, and the bias.
void fill(const Convolution& g, const char* bias, int64_t item, char* result, int64_t size) {
  std::memset(result, 0, size * item);
  if (!bias) return;
  bool forward = g.kind == FORWARD;
  const int64_t* lengths = forward ? g.output : g.input;
  int64_t channels = g.groups * (forward ? g.out_channels : g.in_channels);
  int64_t inner = g.channels_last ? 1 : lengths[0] * lengths[1] * lengths[2];
  for (int64_t i = 0; i < size; i++)
    std::memcpy(result + i * item, bias + i / inner % channels * item, item);
}

void run_on_pool(int64_t jobs, Pool::Job job, void* state) { pool()->run(jobs, job, state); }

void Convolve::eval_cpu(const vector<mx::array>& inputs, vector<mx::array>& outputs) {
  mx::array& output = outputs[0];
  output.set_data(mx::allocator::malloc(output.nbytes()));
  if (output.size() == 0) return;
  Run run = kernels.load();
  if (!run) throw std::runtime_error("flashconv's glue has been given no kernels");

  const char* data[3] = {};
  bool empty = false;
  for (size_t i = 0; i < inputs.size() - (third == LIKE); i++) {
    empty |= inputs[i].size() == 0;
    data[i] = contiguous(inputs[i], stream()).data<char>();
  }
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& input : inputs) encoder.set_input_array(input);
  encoder.set_output_array(output);
  encoder.dispatch([=, g = geometry(inputs, output), result = output.data<char>(),
                    item = int64_t(output.itemsize()), size = int64_t(output.size())] {
    if (empty) return fill(g, data[2], item, result, size);
    Threads threads{thread_count(), run_on_pool};
    if (run(&g, data[0], data[1], data[2], result, &threads))
      throw std::runtime_error("flashconv: there is no memory left for a convolution");
  });
}

// OpenBLAS's jobs on the same threads ----------------------------------------------------------

struct BlasJobs {
  void (*job)(int index, void* data, int argument);
  char* data;
  size_t size;
  int argument;
};

void run_blas(int, void (*job)(int, void*, int), int count, size_t size, void* data, int argument) {
  BlasJobs jobs{job, static_cast<char*>(data), size, argument};
  pool()->run_together(count, [](void* state, int64_t i) {
    auto& jobs = *static_cast<BlasJobs*>(state);
    jobs.job(int(i), jobs.data + i * jobs.size, jobs.argument);
  }, &jobs);
}

// Python ---------------------------------------------------------------------------------------

struct Layer {  // no Python object may be freed by a stream's thread, so the primitive shares this
  SpecPtr spec;
};

mx::array call(const Layer& layer, Kind kind, vector<mx::array> inputs, const mx::array* bias,
               mx::Shape shape, mx::StreamOrDevice stream) {
  if (bias) inputs.push_back(*bias);
  return Convolve::make(mx::to_stream(stream), layer.spec, kind, bias ? BIAS : NOTHING,
                        std::move(shape), std::move(inputs));
}

mx::Shape as_shape(const Lengths& lengths) {
  mx::Shape shape;
  for (int64_t length : lengths) {
    if (length < 0 || length > LONGEST) refuse("a length must be 0 to 2^31-1, but got ", length);
    shape.push_back(mx::ShapeElem(length));
  }
  return shape;
}

#include "call.h"

}  // namespace

NB_MODULE(flashconv_glue, m) {
  using namespace nb::literals;
  using Stream = mx::StreamOrDevice;
  survive_fork();
  m.def("use", [](uintptr_t run) { kernels.store(reinterpret_cast<Run>(run)); }, "flashconv_run"_a);
  m.def("threads", thread_count);
  m.def("set_threads", [](int64_t count) {
    if (count < 1 || count > 4096) refuse("threads must be 1 to 4096, but got ", count);
    set_threads(count);
  }, "count"_a);
  m.def("blas_callback", [] { return reinterpret_cast<uintptr_t>(&run_blas); });

  m.def("convolve", &convolve, "axes"_a, "input"_a, "weight"_a, "bias"_a.none(), "stride"_a,
        "padding"_a.none(), "dilation"_a, "groups"_a, "data_format"_a, "output_padding"_a.none());

  nb::class_<Layer>(m, "Spec")
      .def("__init__", [](Layer* self, const Lengths& stride,
                          const vector<std::pair<int64_t, int64_t>>& padding, const Lengths& dilation,
                          int64_t groups, bool channels_last, const optional<Lengths>& output_padding) {
        new (self) Layer{std::make_shared<Spec>(stride, padding, dilation, groups, channels_last,
                                                output_padding)};
      }, "stride"_a, "padding"_a, "dilation"_a, "groups"_a = 1, "channels_last"_a = false,
         "output_padding"_a = nb::none())
      .def("__call__", [](const Layer& self, const mx::array& x, const mx::array& w,
                          const mx::array* bias, Stream stream) {
        if (self.spec->transposed) return call(self, INPUT_GRADIENT, {w, x}, bias, {}, stream);
        return call(self, FORWARD, {x, w}, bias, {}, stream);
      }, "x"_a, "w"_a, "bias"_a.none() = nb::none(), "stream"_a = nb::none())
      .def("forward", [](const Layer& self, const mx::array& x, const mx::array& w,
                         const mx::array* bias, Stream stream) {
        return call(self, FORWARD, {x, w}, bias, {}, stream);
      }, "x"_a, "w"_a, "bias"_a.none() = nb::none(), "stream"_a = nb::none())
      .def("input_gradient", [](const Layer& self, const mx::array& w, const mx::array& y,
                                const Lengths& shape, const mx::array* bias, Stream stream) {
        auto x = call(self, INPUT_GRADIENT, {w, y}, bias, as_shape(shape), stream);
        if (x.shape() != as_shape(shape)) refuse("shape must be ", x.shape(), " here");
        return x;
      }, "w"_a, "y"_a, "shape"_a, "bias"_a.none() = nb::none(), "stream"_a = nb::none())
      .def("weight_gradient", [](const Layer& self, const mx::array& x, const mx::array& y,
                                 const Lengths& shape, Stream stream) {
        return call(self, WEIGHT_GRADIENT, {x, y}, nullptr, as_shape(shape), stream);
      }, "x"_a, "y"_a, "shape"_a, "stream"_a = nb::none())
      .def("bias_gradient", [](const Layer& self, const mx::array& y, Stream stream) {
        return call(self, BIAS_GRADIENT, {y}, nullptr, {}, stream);
      }, "y"_a, "stream"_a = nb::none());
}
