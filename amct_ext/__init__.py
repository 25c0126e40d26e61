"""amct_ext: compression retraining for INT8 devices on fused custom ops; a drop-in for AMCT's retraining flows."""

from amct_ext._library import build_info, release_memory
from amct_ext.auto_channel_prune_search import (
    GateTaylorSensitivity,
    GreedySearch,
    SearchChannelBase,
    SensitivityBase,
    TaylorLossSensitivity,
    auto_channel_prune_search,
)
from amct_ext.checkpoint.amct_names import from_amct_state_dict, to_amct_state_dict
from amct_ext.checkpoint.optimizer import from_amct_optimizer_state_dict
from amct_ext.distillation import DistillationLoss
from amct_ext.distributed import average_gradients, replicated_parameters
from amct_ext.errors import AmctError
from amct_ext.explain.report import Explanation, LayerReport
from amct_ext.explain.sensitivity_report import LayerSensitivity, Sensitivity
from amct_ext.explain.targets import TARGETS, Target, check_target
from amct_ext.flows.batchnorm import reestimate_batchnorm
from amct_ext.flows.calibrate import calibrate
from amct_ext.flows.compressed import (
    create_compressed_retrain_model,
    restore_compressed_retrain_model,
    save_compressed_retrain_model,
)
from amct_ext.flows.explain import explain
from amct_ext.flows.prune import (
    create_prune_retrain_model,
    restore_prune_retrain_model,
    save_prune_retrain_model,
)
from amct_ext.flows.quant import (
    create_quant_retrain_config,
    create_quant_retrain_model,
    restore_quant_retrain_model,
    save_quant_retrain_model,
)
from amct_ext.flows.record import shift_bits, update_record
from amct_ext.flows.sensitivity import sensitivity
from amct_ext.flows.settings import configure, forward_choices
from amct_ext.flows.verify import PruningComparison, verify_pruning

__all__ = [
    "TARGETS",
    "AmctError",
    "DistillationLoss",
    "Explanation",
    "GateTaylorSensitivity",
    "GreedySearch",
    "LayerReport",
    "LayerSensitivity",
    "PruningComparison",
    "SearchChannelBase",
    "Sensitivity",
    "SensitivityBase",
    "Target",
    "TaylorLossSensitivity",
    "auto_channel_prune_search",
    "average_gradients",
    "build_info",
    "calibrate",
    "check_target",
    "configure",
    "create_compressed_retrain_model",
    "create_prune_retrain_model",
    "create_quant_retrain_config",
    "create_quant_retrain_model",
    "explain",
    "forward_choices",
    "from_amct_optimizer_state_dict",
    "from_amct_state_dict",
    "reestimate_batchnorm",
    "release_memory",
    "replicated_parameters",
    "restore_compressed_retrain_model",
    "restore_prune_retrain_model",
    "restore_quant_retrain_model",
    "save_compressed_retrain_model",
    "save_prune_retrain_model",
    "save_quant_retrain_model",
    "sensitivity",
    "shift_bits",
    "to_amct_state_dict",
    "update_record",
    "verify_pruning",
]
