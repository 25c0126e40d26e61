"""The ops, each a documented function over `torch.ops.amct_ext`.

Schemas stand in `csrc/ops`. Every op has a plain-torch reference here, registered for all devices: it specifies the
op, serves devices without a kernel and checks the kernels. A file holds all of an op's Python: the function, what it
checks, the reference, and the result for tensors without values.
"""

# ruff: noqa: F403 (each file names its public functions in __all__)
from amct_ext import backends
from amct_ext.ops._registration import OPS
from amct_ext.ops.activation_batch_norm import *
from amct_ext.ops.activation_batch_norm_ulq import *
from amct_ext.ops.activation_ulq import *
from amct_ext.ops.activation_ulq_relu import *
from amct_ext.ops.calibration_histogram import *
from amct_ext.ops.calibration_search import *
from amct_ext.ops.calibration_shift import *
from amct_ext.ops.calibration_wide import *
from amct_ext.ops.integer_accumulators import *
from amct_ext.ops.integer_codes import *
from amct_ext.ops.integer_product import *
from amct_ext.ops.sparsity_mask import *
from amct_ext.ops.sparsity_sr_ste import *
from amct_ext.ops.sparsity_weight import *
from amct_ext.ops.weight_arq import *
from amct_ext.ops.weight_lsq import *
from amct_ext.ops.weight_norms import *
from amct_ext.ops.weight_quantize import *
from amct_ext.ops.weight_scale_repair import *
from amct_ext.ops.weight_scale_search import *

__all__ = sorted(OPS)

backends.load()  # after the schemas and references, which other packages' kernels build on
