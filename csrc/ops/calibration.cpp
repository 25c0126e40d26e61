// Every schema of the library, once. Kernels and autograd rules register themselves where they are defined.
#include <torch/library.h>

TORCH_LIBRARY(amct_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  // activations
  m.def(
      "ulq_fake_quantize(Tensor x, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, "
      "int num_bits=8, bool fixed_min=False) "
      "-> (Tensor y, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def(
      "ulq_fake_quantize_(Tensor x, Tensor(a!) clip_max, Tensor(b!) clip_min, Tensor(c!) prev_clip_max, "
      "Tensor(d!) prev_clip_min, Tensor(e!) scale, Tensor(f!) offset, Tensor(g!) invalid, int num_bits=8, "
      "bool fixed_min=False) -> (Tensor y, Tensor used_max, Tensor used_min)",
      tags);
  m.def(
      "ulq_fake_quantize_backward(Tensor grad, Tensor x, Tensor clip_max, Tensor clip_min, int num_bits=8) "
      "-> (Tensor dx, Tensor d_clip_max, Tensor d_clip_min)",
      tags);
  m.def(
      "search_clip_range(Tensor x, int num_bits=8, bool with_offset=False) "
      "-> (Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min)",
      tags);
  m.def("range_histogram_(Tensor x, Tensor(a!) histogram, Tensor(b!) extremes) -> ()", tags);
  m.def(
      "search_clip_range_histogram(Tensor histogram, Tensor extremes, int num_bits=8) "
      "-> (Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor excess)",
      tags);

  // weights
  m.def("arq_fake_quantize(Tensor w, int num_bits=8, int? channel_axis=None) -> (Tensor y, Tensor scale)", tags);
  m.def(
      "lsq_fake_quantize(Tensor w, Tensor scale, int num_bits=8, int? channel_axis=None, float? grad_factor=None) "
      "-> Tensor",
      tags);
  m.def(
      "lsq_fake_quantize_backward(Tensor grad, Tensor w, Tensor scale, int num_bits=8, int? channel_axis=None, "
      "float? grad_factor=None) -> Tensor",
      tags);
  m.def("quantize_weight(Tensor w, Tensor scale, int num_bits=8, int? channel_axis=None) -> Tensor", tags);

  // axes: one per weight, -1 for a single scale
  m.def(
      "arq_fake_quantize_many(Tensor[] weights, int num_bits=8, int[] channel_axes=[]) -> (Tensor[] y, Tensor[] scale)",
      tags);

  // integer products: codes are unsigned (code + 128), weights packed in blocks of sixteen output channels
  m.def(
      "ulq_quantize(Tensor x, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, "
      "int num_bits=8, bool fixed_min=False) "
      "-> (Tensor codes, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def("pack_weight(Tensor w, Tensor scale, int num_bits=8) -> (Tensor packed, Tensor sums)", tags);
  m.def(
      "integer_conv2d(Tensor codes, Tensor x_scale, Tensor x_offset, Tensor packed, Tensor sums, Tensor w_scale, "
      "Tensor? bias, int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "bool channels_last=False, Tensor? addend=None, float? lowest=None, float? highest=None) -> Tensor",
      tags);
  m.def(
      "integer_conv2d_codes(Tensor codes, Tensor x_scale, Tensor x_offset, Tensor packed, Tensor sums, Tensor w_scale, "
      "Tensor? bias, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, float? lowest, "
      "float? highest, Tensor clip_max, Tensor clip_min, Tensor prev_clip_max, Tensor prev_clip_min, int num_bits=8, "
      "bool fixed_min=False) "
      "-> (Tensor codes, Tensor scale, Tensor offset, Tensor clip_max, Tensor clip_min, Tensor invalid)",
      tags);
  m.def(
      "integer_linear(Tensor codes, Tensor x_scale, Tensor x_offset, Tensor packed, Tensor sums, Tensor w_scale, "
      "Tensor? bias=None) -> Tensor",
      tags);
  m.def(
      "integer_conv2d_accumulators(Tensor codes, Tensor x_offset, Tensor packed, Tensor sums, int[2] kernel_size, "
      "int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor",
      tags);
  m.def("integer_linear_accumulators(Tensor codes, Tensor x_offset, Tensor packed, Tensor sums) -> Tensor", tags);

  // sparse weights
  m.def("apply_mask(Tensor w, Tensor mask) -> Tensor", tags);
  m.def("sparsify_2to4(Tensor w, int axis=1) -> (Tensor y, Tensor mask)", tags);
  m.def(
      "sparse_arq_fake_quantize(Tensor w, Tensor mask, int num_bits=8, int? channel_axis=None) "
      "-> (Tensor y, Tensor scale)",
      tags);
  m.def(
      "sparse_arq_fake_quantize_2to4(Tensor w, int axis=1, int num_bits=8, int? channel_axis=None) "
      "-> (Tensor y, Tensor scale, Tensor mask)",
      tags);

  // sparsity and pruning
  m.def("mask_2to4(Tensor w, int axis=1) -> Tensor", tags);
  m.def("refresh_mask_(Tensor w, Tensor(a!) mask, Tensor(b!) step, int update_freq, int axis=1) -> ()", tags);
  m.def("pack_mask(Tensor mask) -> Tensor", tags);
  m.def("unpack_mask(Tensor words, SymInt[] shape) -> Tensor", tags);
  m.def("filter_norms(Tensor w, int axis=0) -> Tensor", tags);

  // shift search
  m.def("shift_error_(Tensor x, Tensor deq_scale, Tensor(a!) errors, int channel_axis=1) -> ()", tags);
  m.def("best_shift(Tensor errors) -> Tensor", tags);
}
