// shift_error_ and best_shift.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "common/layout.h"
#include "common/quant_math.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"
#include "ops/calibration_check.h"

namespace amct_ext::cpu {
namespace {

using at::Tensor;
using math::kShifts;

// Squared errors of every shift, for some neighbouring channels.
struct ShiftErrors {
  explicit ShiftErrors(int64_t channels) : of_shift(channels * kShifts), nan(channels) {}

  void clear() {
    std::fill(of_shift.begin(), of_shift.end(), 0);
    std::fill(nan.begin(), nan.end(), 0);
  }

  // Add the sums of the channels from `first` on.
  void add(const ShiftErrors& part, int64_t first, int64_t channels) {
    for (int64_t i = 0; i < channels * kShifts; ++i) of_shift[first * kShifts + i] += part.of_shift[i];
    for (int64_t i = 0; i < channels; ++i) nan[first + i] |= part.nan[i];
  }

  std::vector<WideSum> of_shift;
  std::vector<char> nan;
};

// Reduces the data seen along the channel axis. A work item is some outer steps of a channel or, where runs are short,
// of several neighbouring channels, whose values are gathered by channel first, so that each loop is long enough.
class ShiftErrorReduction {
 public:
  ShiftErrorReduction(const Tensor& x, int64_t axis, const std::vector<double>& scales)
      : x_(static_cast<const char*>(x.const_data_ptr())),
        size_(x.element_size()),
        numel_(x.numel()),
        view_(axis_view(x, axis)),
        scales_(scales),
        loop_(loops().shift_errors[element_of(x)]) {
    if (numel_ == 0) return;
    if (view_.size == 1) view_ = {(numel_ + kBlock - 1) / kBlock, 1, kBlock};
    gather_ = view_.inner < kGatherLength;
    channels_ = gather_ ? std::min(view_.size, kMaxChannels) : 1;
    steps_ = std::max<int64_t>(1, (gather_ ? kGatherLength : 4 * kBlock) / view_.inner);
  }

  ShiftErrors sums() const {
    ShiftErrors result(view_.size);
    if (numel_ == 0) return result;
    const int64_t groups = (view_.size + channels_ - 1) / channels_, chunks = (view_.outer + steps_ - 1) / steps_;
    std::mutex mutex;
    at::parallel_for(0, chunks * groups, 1, [&](int64_t first, int64_t last) {
      std::vector<char> buffer(gather_ ? channels_ * kStride * size_ : 0);
      ShiftErrors part(channels_);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t from = chunk / groups * steps_, to = std::min(view_.outer, from + steps_);
        const int64_t channel = chunk % groups * channels_, channels = std::min(channels_, view_.size - channel);
        part.clear();
        if (gather_) {
          add_gathered(channel, channels, from, to, buffer.data(), part);
        } else {
          add_runs(channel, from, to, part);
        }
        const std::lock_guard<std::mutex> lock(mutex);
        result.add(part, channel, channels);
      }
    });
    return result;
  }

 private:
  // Values gathered of a channel; runs at least as long are read in place.
  static constexpr int64_t kGatherLength = 512;
  // Between the buffers of two channels; a power of two would map all of them to the same cache sets.
  static constexpr int64_t kStride = kGatherLength + 64;
  static constexpr int64_t kMaxChannels = 64;

  void add(const void* data, int64_t n, int64_t channel, int64_t place, ShiftErrors& to) const {
    const double scale = scales_[scales_.size() == 1 ? 0 : channel + place];
    if (loop_(data, n, scale, &to.of_shift[place * kShifts])) to.nan[place] = 1;
  }

  void add_runs(int64_t channel, int64_t from, int64_t to, ShiftErrors& part) const {
    for (int64_t o = from; o < to; ++o) {
      const int64_t at = (o * view_.size + channel) * view_.inner;
      add(element_ptr(x_, at, size_), std::min(view_.inner, numel_ - at), channel, 0, part);
    }
  }

  void add_gathered(int64_t channel, int64_t channels, int64_t from, int64_t to, char* buffer,
                    ShiftErrors& part) const {
    for (int64_t o = from; o < to; ++o) {
      const char* source = element_ptr(x_, (o * view_.size + channel) * view_.inner, size_);
      gather(source, channels, element_ptr(buffer, (o - from) * view_.inner, size_));
    }
    for (int64_t c = 0; c < channels; ++c) {
      add(element_ptr(buffer, c * kStride, size_), (to - from) * view_.inner, channel, c, part);
    }
  }

  // One step: a run of each channel to that channel's buffer.
  void gather(const char* source, int64_t channels, char* target) const {
    switch (view_.inner == 1 ? size_ : 0) {
      case 2:
        return scatter<uint16_t>(source, channels, target);
      case 4:
        return scatter<uint32_t>(source, channels, target);
      case 8:
        return scatter<uint64_t>(source, channels, target);
      default:
        for (int64_t c = 0; c < channels; ++c) {
          std::memcpy(target + c * kStride * size_, source + c * view_.inner * size_, view_.inner * size_);
        }
    }
  }

  template <typename Word>
  static void scatter(const char* source_, int64_t channels, char* target_) {
    const Word* source = reinterpret_cast<const Word*>(source_);
    Word* target = reinterpret_cast<Word*>(target_);
    for (int64_t c = 0; c < channels; ++c) target[c * kStride] = source[c];
  }

  const char* x_;
  int64_t size_, numel_;
  AxisView view_;
  const std::vector<double>& scales_;
  bool (*loop_)(const void*, int64_t, double, WideSum*);
  bool gather_ = false;
  int64_t channels_ = 1, steps_ = 1;
};

void shift_error_(const Tensor& x, const Tensor& deq_scale, const Tensor& errors, int64_t channel_axis) {
  channel_axis = check_shift_error("shift_error_", x, deq_scale, errors, channel_axis);
  const int64_t channels = x.size(channel_axis);
  const Tensor source = dense(x), given = deq_scale.contiguous();
  std::vector<double> scales(given.numel());
  for (size_t i = 0; i < scales.size(); ++i) {
    const double v = value_at(given, static_cast<int64_t>(i));
    scales[i] = math::is_finite(v) && v > 0 ? v : std::nan("");
  }
  ShiftErrors sums = ShiftErrorReduction(source, channel_axis, scales).sums();
  const int64_t rows = errors.size(0);
  if (rows != channels) {
    ShiftErrors whole(1);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t s = 0; s < kShifts; ++s) whole.of_shift[s] += sums.of_shift[c * kShifts + s];
      whole.nan[0] |= sums.nan[c];
    }
    sums = std::move(whole);
  }
  double* out = static_cast<double*>(errors.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t s = 0; s < kShifts; ++s) {
      const double batch = sums.nan[row] ? std::nan("") : static_cast<double>(sums.of_shift[row * kShifts + s]);
      out[row * errors.stride(0) + s * errors.stride(1)] += batch;
    }
  }
}

Tensor best_shift(const Tensor& errors) {
  check_shift_errors("best_shift", errors);
  const Tensor rows = errors.contiguous();
  Tensor best = at::empty({rows.size(0)}, rows.options().dtype(at::kInt));
  const double* in = static_cast<const double*>(rows.const_data_ptr());
  int32_t* out = static_cast<int32_t*>(best.mutable_data_ptr());
  for (int64_t row = 0; row < rows.size(0); ++row, in += kShifts) {
    int32_t winner = 0;
    bool nan = in[0] != in[0];
    for (int32_t s = 1; s < kShifts; ++s) {
      nan = nan || in[s] != in[s];
      if (in[s] < in[winner]) winner = s;
    }
    out[row] = nan ? kShifts : winner + 1;
  }
  return best;
}

}  // namespace

TORCH_LIBRARY_IMPL(amct_ext, CPU, m) {
  m.impl("shift_error_", shift_error_);
  m.impl("best_shift", best_shift);
}

}  // namespace amct_ext::cpu
