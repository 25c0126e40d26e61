// Channels whose weights lie in short runs (the channel axis is not the first one): a few channels at a time are
// gathered into buffers that stay in the L2 cache, so that loops see contiguous rows; results are scattered back.
#pragma once

#include <array>
#include <cstring>
#include <memory>

#include "common/layout.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"

namespace amct_ext::cpu {

// A dense tensor to gather from.
struct GatherInput {
  const void* data;  // null: there is none
  size_t size;       // bytes of an element
};

constexpr int64_t kShortRun = 64;  // elements; a call for a shorter run takes longer than gathering it

inline bool has_short_runs(const AxisView& view) { return view.size > 1 && view.outer > 1 && view.inner < kShortRun; }

// Elements from one row to the next. Channels are often powers of two long, which would map all rows to the same cache
// sets; kRowSkew is more than a cache line of any element type and no multiple of one.
constexpr int64_t kRowSkew = 72;
inline int64_t row_pitch(const AxisView& view) { return view.outer * view.inner + kRowSkew; }

// f(offset of a run in the tensor, offset in the buffer) in bytes, for channels [first, last).
template <typename F>
void for_each_run(const AxisView& view, int64_t first, int64_t last, size_t size, const F& f) {
  const int64_t bytes = view.inner * static_cast<int64_t>(size), row = row_pitch(view) * static_cast<int64_t>(size);
  for (int64_t o = 0; o < view.outer; ++o) {
    for (int64_t c = first; c < last; ++c) f((o * view.size + c) * bytes, (c - first) * row + o * bytes);
  }
}

// f(run size), as a constant for runs of one element, so that an instruction moves them instead of a call.
template <typename F>
void dispatch_run_size(size_t bytes, const F& f) {
  switch (bytes) {
    case 1:
      return f(std::integral_constant<size_t, 1>());
    case 2:
      return f(std::integral_constant<size_t, 2>());
    case 4:
      return f(std::integral_constant<size_t, 4>());
    case 8:
      return f(std::integral_constant<size_t, 8>());
    default:
      return f(bytes);
  }
}

// f(channel, rows of the inputs, row of the output, length) for every channel; each input and the output (null: none)
// has the layout of `view`. A channel stays on one thread.
template <size_t kInputs, typename F>
void for_gathered_rows(const AxisView& view, const std::array<GatherInput, kInputs>& inputs, void* out, size_t out_size,
                       const F& f) {
  const int64_t length = view.outer * view.inner, pitch = row_pitch(view), narrowest = 16 / view.inner + 1;
  const int64_t step = std::max(narrowest, std::min<int64_t>(64, 4 * kBlock / length));
  const int64_t blocks = (view.size + step - 1) / step;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::array<std::unique_ptr<char[]>, kInputs> buffers;
    for (size_t i = 0; i < kInputs; ++i) {
      if (inputs[i].data) buffers[i].reset(new char[step * pitch * inputs[i].size]);
    }
    const std::unique_ptr<char[]> results(out ? new char[step * pitch * out_size] : nullptr);
    for (int64_t first = begin * step; first < std::min(view.size, end * step); first += step) {
      const int64_t last = std::min(view.size, first + step);
      for (size_t i = 0; i < kInputs; ++i) {
        if (!inputs[i].data) continue;
        dispatch_run_size(view.inner * inputs[i].size, [&](auto bytes) {
          for_each_run(view, first, last, inputs[i].size, [&](int64_t from, int64_t to) {
            std::memcpy(buffers[i].get() + to, static_cast<const char*>(inputs[i].data) + from, bytes);
          });
        });
      }
      for (int64_t c = first; c < last; ++c) {
        std::array<const char*, kInputs> rows;
        for (size_t i = 0; i < kInputs; ++i) {
          rows[i] = inputs[i].data ? element_ptr(buffers[i].get(), (c - first) * pitch, inputs[i].size) : nullptr;
        }
        f(c, rows, out ? element_ptr(results.get(), (c - first) * pitch, out_size) : nullptr, length);
      }
      if (!out) continue;
      dispatch_run_size(view.inner * out_size, [&](auto bytes) {
        for_each_run(view, first, last, out_size, [&](int64_t to, int64_t from) {
          std::memcpy(static_cast<char*>(out) + to, results.get() + from, bytes);
        });
      });
    }
  });
}

}  // namespace amct_ext::cpu
