// Channels whose weights lie in short runs (a channel axis that is not the first one): a few channels at a time are
// brought together in buffers that stay in the second-level cache, so that loops see rows.
#pragma once

#include <array>
#include <cstring>
#include <memory>

#include "cpu/parallel.h"

namespace amct_ext::cpu {

// A tensor to be gathered, or where results go; null where there is none.
struct Plain {
  const void* data;
  size_t size;  // bytes of an element
};

inline bool short_runs(const AxisView& view) { return view.size > 1 && view.outer > 1 && view.inner < 64; }

// Elements from one row to the next: rows whose distance is a power of two would share a few lines of the cache.
inline int64_t row_pitch(const AxisView& view) { return view.outer * view.inner + 72; }

// f(run in memory order, run in the order of rows) in bytes, for channels [first, last).
template <typename F>
void for_runs(const AxisView& view, int64_t first, int64_t last, size_t size, const F& f) {
  const int64_t bytes = view.inner * static_cast<int64_t>(size), row = row_pitch(view) * static_cast<int64_t>(size);
  for (int64_t o = 0; o < view.outer; ++o) {
    for (int64_t c = first; c < last; ++c) f((o * view.size + c) * bytes, (c - first) * row + o * bytes);
  }
}

// Runs of one element are moved by an instruction instead of a call.
template <typename F>
void with_run_size(size_t bytes, const F& f) {
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
// is a tensor of the layout of `view`. A channel stays on one thread.
template <size_t kInputs, typename F>
void for_gathered(const AxisView& view, const std::array<Plain, kInputs>& inputs, void* out, size_t out_size,
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
        with_run_size(view.inner * inputs[i].size, [&](auto bytes) {
          for_runs(view, first, last, inputs[i].size, [&](int64_t from, int64_t to) {
            std::memcpy(buffers[i].get() + to, static_cast<const char*>(inputs[i].data) + from, bytes);
          });
        });
      }
      for (int64_t c = first; c < last; ++c) {
        std::array<const char*, kInputs> rows;
        for (size_t i = 0; i < kInputs; ++i) {
          rows[i] = inputs[i].data ? at_element(buffers[i].get(), (c - first) * pitch, inputs[i].size) : nullptr;
        }
        f(c, rows, out ? at_element(results.get(), (c - first) * pitch, out_size) : nullptr, length);
      }
      if (!out) continue;
      with_run_size(view.inner * out_size, [&](auto bytes) {
        for_runs(view, first, last, out_size, [&](int64_t to, int64_t from) {
          std::memcpy(static_cast<char*>(out) + to, results.get() + from, bytes);
        });
      });
    }
  });
}

}  // namespace amct_ext::cpu
