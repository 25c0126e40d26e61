"""Where a golden case may differ from AMCT's numbers: documented deviations, and numbers that noise decides.

Each deviation stands in docs/differences.md. `quirks.json` of the golden data names the numbers that do not bind.
"""

from __future__ import annotations

from support.golden.run import Case

from amct_ext.record.text import parse_record
from amct_ext.record.types import Record

# AMCT rejects these, rightly.
REJECTED = ("cnn_a4w4", "cnn_a4w8_error")
# AMCT rejects a global channel_wise for a model with a Linear; the user meant the convolutions.
ACCEPTED = "cnn_linear_cw_error"
# AMCT's learned weight scales turn negative there; ours stay positive, so the runs part at that step.
NEGATIVE_SCALES = ("cnn_override_types", "cnn_ulqw_lr05", "cnn_skips")
# AMCT trains only the biases of a recurrent layer; with the weights trained too the runs part after one step.
RECURRENT = ("gru_cwfalse", "gru_quant", "lstm_quant")
# We prune more there: channels pass a flatten (each is H*W features), a sigmoid, a transposed convolution, which loses
# its own too; a convolution with one input channel is not taken for depthwise.
PRUNED_FURTHER = ("group_filter_asc", "group_filter_noasc", "odd_filter_quant", "deconv_filter")
# AMCT raises at create.
WITHOUT_MODEL = (*REJECTED, ACCEPTED, "reused_filter")
# AMCT left nothing that restores: it raises before the end of the training, or loses filter records in it.
NOT_RESTORABLE = (
    "cnn_mixed_prune_quant", "conv1d_ulqw", "conv3d_ulqw", "deconv_ulqw", "deconv_ulqw_cwfalse", "lstm_ulqw",
    "reused_filter", "shared_rev_pool_quant",
)  # fmt: skip
# Counters that AMCT only compares with zero; ours are written as 0 or 1, and only training forwards count.
COUNTERS = ("cur_batch", "prune_cur_batch", "quant_layer_num")


def binds(case: Case, letter: str) -> bool:
    """Whether AMCT's numbers of this stage bind; where not, the summary learns why."""
    if case.name in RECURRENT and letter != "Y":
        case.deviates("recurrent weights are trained")
    elif case.name in NEGATIVE_SCALES:
        case.deviates("learned scales stay positive")
    elif "losses" not in case.golden_results:
        case.deviates("works where AMCT raises")
    elif other_channels(case):
        case.deviates("other channels are kept")
    elif letter in case.unbound:
        case.notes.append(("unbound", case.unbound[letter]))
    else:
        return True
    return False


def other_channels(case: Case) -> bool:
    """Deviation: coupled producers decide together, so other channels may be kept and all that follows differs."""
    if not case.stored("record_after_create.txt"):
        return False
    record = parse_record(case.load.record(case.name, "after_create"))
    coupled = any(len(c.producers) > 1 for c in record.channel)
    return coupled or case.name in PRUNED_FURTHER


def channel_counts(record: Record) -> list[list[tuple[str, int, int, int]]]:
    """The channel groups without the choice of channels."""
    return [[(n.name, n.begin, n.end, len(n.prune_index)) for n in c.producers + c.consumers] for c in record.channel]
