// call.h: a convolution with the arguments that Python's functions get, checked where they are.
// Nothing here raises: None stands for whatever is unusual, wrong arguments among it. Python takes
// that apart, and says what is wrong or computes it in another way.

// Whole numbers of Python's own type only: True, 2.0 and NumPy's are for Python to judge.
optional<int64_t> as_int(nb::handle value) {
  if (!PyLong_CheckExact(value.ptr())) return std::nullopt;
  int overflows = 0;
  int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflows);
  if (overflows) return std::nullopt;
  return number;
}

// A number for all axes, or a tuple with one for each.
optional<Lengths> as_lengths(nb::handle value, int axes) {
  if (auto one = as_int(value)) return Lengths(axes, *one);
  if (!PyTuple_CheckExact(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != axes) return std::nullopt;
  Lengths lengths;
  for (int i = 0; i < axes; i++) {
    auto one = as_int(PyTuple_GET_ITEM(value.ptr(), i));
    if (!one) return std::nullopt;
    lengths.push_back(*one);
  }
  return lengths;
}

bool is_text(nb::handle value, const char* text) {
  return PyUnicode_CheckExact(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
}

using Pairs = vector<std::pair<int64_t, int64_t>>;

// Padding as pairs: 'same' puts the odd zero after, 'valid' has none.
optional<Pairs> as_pairs(nb::handle value, int axes, const Lengths& stride, const Lengths& dilation,
                         const mx::Shape& weight) {
  if (is_text(value, "valid")) return Pairs(axes, {0, 0});
  Pairs pairs;
  if (is_text(value, "same")) {
    for (int i = 0; i < axes; i++) {
      int64_t total = 0;
      if (stride[i] != 1 || __builtin_mul_overflow(dilation[i], weight[2 + i] - 1, &total))
        return std::nullopt;
      pairs.push_back({total / 2, total - total / 2});
    }
    return pairs;
  }
  auto lengths = as_lengths(value, axes);
  if (!lengths) return std::nullopt;
  for (int64_t length : *lengths) pairs.push_back({length, length});
  return pairs;
}

const mx::array* as_array(nb::handle value) {
  return nb::isinstance<mx::array>(value) ? nb::inst_ptr<mx::array>(value) : nullptr;
}

optional<mx::array> convolve(int axes, nb::handle input, nb::handle weight, nb::handle bias,
                             nb::handle stride, nb::handle padding, nb::handle dilation,
                             nb::handle groups, nb::handle data_format, nb::handle output_padding) {
  const mx::array* x = as_array(input);
  const mx::array* w = as_array(weight);
  const mx::array* b = as_array(bias);
  if (!x || !w || (!b && !bias.is_none()) || x->size() == 0 || w->size() == 0) return std::nullopt;
  if (int(x->ndim()) != axes + 2 || int(w->ndim()) != axes + 2) return std::nullopt;
  bool is_last = is_text(data_format, "channels_last");
  if (!is_last && !is_text(data_format, "channels_first")) return std::nullopt;
  auto steps = as_lengths(stride, axes);
  auto distances = as_lengths(dilation, axes);
  auto blocks = as_int(groups);
  if (!steps || !distances || !blocks) return std::nullopt;
  auto pairs = as_pairs(padding, axes, *steps, *distances, w->shape());
  optional<Lengths> extra;
  if (!output_padding.is_none() && !(extra = as_lengths(output_padding, axes))) return std::nullopt;
  for (int i = 0; i < axes && extra; i++)  // PyTorch's rule; no kernel needs it
    if ((*extra)[i] >= std::max((*steps)[i], (*distances)[i])) return std::nullopt;
  mx::Device device = mx::default_device();
  if (!pairs || device != mx::Device::cpu) return std::nullopt;
  try {
    Layer layer{std::make_shared<Spec>(*steps, *pairs, *distances, *blocks, is_last, extra)};
    if (extra) return call(layer, INPUT_GRADIENT, {*w, *x}, b, {}, device);
    return call(layer, FORWARD, {*x, *w}, b, {}, device);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}
