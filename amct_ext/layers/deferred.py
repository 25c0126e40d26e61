"""The result of an integer convolution that waits for what follows it, so that both take one pass.

In an evaluation the steps behind a convolution (a normalisation by fixed statistics, an activation function, the
addition of a branch, the quantisation for the next layer) each read and write a whole activation, which takes about as
long as the integer product itself. A `Pending` is a tensor without memory that knows how its values are computed. Steps
that can be part of that computation give another `Pending`; a quantising layer takes codes; whatever else reads it gets
floats, computed then. Any use is therefore right, and only a second one computes twice.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_any, tree_map_only

from amct_ext import ops
from amct_ext.layers.bn_fold import folded
from amct_ext.layers.forward_context import in_backward

logger = logging.getLogger("amct_ext")

_aten = torch.ops.aten
_CPU = torch.device("cpu")


@dataclass
class Patience:
    """Of one layer: whether its results may wait. They may not once one had to be computed twice."""

    left: bool = True


class Running:
    """The forwards of a whole model, numbered: only within one may a result wait for what follows.

    A forward is under way while the frame that began it is on the stack of the present thread. A count would stay
    where an interrupt leaves the model, for which torch calls no hook. Copies and pickles know of none.
    """

    def __init__(self, first: int = 1) -> None:
        self.calibrating = False  # evaluations calibrate, too: `calibrate` asked for it
        self.warned = False
        self._last_training = False
        self._numbers = itertools.count(first)
        self._here = threading.local()

    def enter(self, frame: FrameType, training: bool = False) -> None:
        """Note that ``frame`` runs the model, in training mode or not; one within another belongs to it."""
        outer = self._present()
        number, training = (next(self._numbers), training) if outer is None else outer[1:]
        self._last_training = training
        self._begun().append((frame, number, training))

    def leave(self, frame: FrameType) -> None:
        """Note that ``frame``, or one that it called, has run the model."""
        begun = self._begun()
        while begun and (begun[-1][0] is frame or not _on_stack(begun[-1][0])):
            begun.pop()

    @property
    def forward(self) -> int | None:
        """Which forward of the model is under way here; None where there is none, or in a compiled graph."""
        present = self._present()
        return None if present is None else present[1]

    @property
    def training(self) -> bool:
        """Whether a training forward of the model is under way here, in which parts of it may be in eval mode.

        A part that gradient checkpointing runs again belongs to the last forward.
        """
        present = self._present()
        if present is None:
            return self._last_training and not torch.compiler.is_compiling() and in_backward()
        return present[2]

    def warn_uncalibrated(self, layer: str) -> None:
        """Say, once for a model, that it is evaluated before its calibration."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "layer '%s' and maybe others are evaluated before their activation ranges were calibrated: each input "
                "is quantised by a range of its own and nothing is kept. Forwards in training mode calibrate; "
                "amct_ext.calibrate(model, batches) does so without training",
                layer,
            )

    def _present(self) -> tuple[FrameType, int, bool] | None:
        if torch.compiler.is_compiling():
            return None
        begun = self._begun()
        while begun and not _on_stack(begun[-1][0]):
            begun.pop()
        return begun[-1] if begun else None

    def _begun(self) -> list[tuple[FrameType, int, bool]]:
        try:
            found: list[tuple[FrameType, int, bool]] = self._here.begun
        except AttributeError:
            found = self._here.begun = []
        return found

    def __reduce__(self) -> tuple[type[Running], tuple[int]]:
        return Running, (next(self._numbers) + 1,)  # no forward of a copy has the number of one before


def _on_stack(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


@dataclass(frozen=True)
class Convolution:
    """All that the values depend on; nothing that a step of the model could modify."""

    codes: tuple[Tensor, Tensor, Tensor]  # with scale and offset
    packed: tuple[Tensor, Tensor]  # with sums
    scale: Tensor  # of the weight, or of weight and normalisation
    bias: Tensor | None
    geometry: tuple[Any, Any, Any, Any]  # kernel_size, stride, padding, dilation
    channels_last: bool
    lowest: float | None = None
    highest: float | None = None
    patience: Patience = field(default_factory=Patience)
    computed: list[None] = field(default_factory=list)  # one entry for each time; shared with what was made of it

    def floats(self, addend: Tensor | None = None) -> Tensor:
        self._count()
        return ops.integer_conv2d(
            *self.codes,
            *self.packed,
            self.scale,
            self.bias,
            *self.geometry,
            self.channels_last,
            addend,
            self.lowest,
            self.highest,
        )

    def requantized(self, *quantizer: Any) -> tuple[Tensor, ...]:
        self._count()
        return ops.integer_conv2d_codes(
            *self.codes, *self.packed, self.scale, self.bias, *self.geometry, self.lowest, self.highest, *quantizer
        )

    def normalized(
        self, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Convolution:
        """With a normalisation by these statistics behind it, in float64."""
        factor, term = folded(self.bias, weight, bias, mean, variance, eps)
        return replace(self, scale=factor * self.scale, bias=term)

    def bounded(self, lowest: float, highest: float | None) -> Convolution:
        """Limited to these bounds; there is no upper one yet."""
        return replace(self, lowest=lowest if self.lowest is None else max(lowest, self.lowest), highest=highest)

    @property
    def plain(self) -> bool:
        """Whether values are not bounded yet."""
        return self.lowest is None and self.highest is None

    def _count(self) -> None:
        self.computed.append(None)
        if len(self.computed) > 1:
            self.patience.left = False


class Pending(Tensor):
    """A tensor whose values are those of ``made``, computed when they are needed (module docstring)."""

    made: Convolution | None  # None once the values are there
    kept: Tensor

    @staticmethod
    def __new__(cls, made: Convolution, shape: torch.Size) -> Self:
        _, channels, height, width = shape
        strides = (channels * height * width, height * width, width, 1)
        if made.channels_last:
            strides = (channels * height * width, 1, width * channels, channels)
        new: Self = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=torch.float32, device=_CPU)
        new.made = made
        return new

    # Autograd does not know of what waits; nothing waits where it records.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        step = None if torch.is_grad_enabled() else _STEPS.get(func)
        result = NotImplemented if step is None else step(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **(kwargs or {}))  # what the wrapper says of its shape
        return func(*plain(args), **plain(kwargs or {}))

    def computed(self) -> Tensor:
        """The plain tensor of the values."""
        if self.made is not None:
            self.kept, self.made = self.made.floats(), None
        return self.kept

    # What reaches memory without a dispatch.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.computed().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.computed().tolist()

    def data_ptr(self) -> int:
        return self.computed().data_ptr()

    def untyped_storage(self) -> Any:
        return self.computed().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.computed().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.computed().__deepcopy__(memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return self.computed().__repr__(*args, **kwargs)


def plain(value: Any) -> Any:
    """``value`` with every tensor that waits computed, in whatever containers torch looks into."""
    if type(value) is Tensor or not tree_any(lambda leaf: type(leaf) is Pending, value):
        return value
    return tree_map_only(Pending, Pending.computed, value)


def _waiting(x: Any) -> Convolution | None:
    return x.made if type(x) is Pending else None


def _batch_norm(
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    made = _waiting(x)
    if made is None or not made.plain or training or mean is None or variance is None:
        return NotImplemented
    if any(type(t) is Pending for t in (weight, bias, mean, variance)):
        return NotImplemented
    none = torch.empty(0)
    return Pending(made.normalized(weight, bias, mean, variance, eps), x.shape), none, none.clone()


def _bounded(in_place: bool, lowest: float = 0.0, highest: float | None = None) -> Callable[..., Any]:
    def step(x: Any, low: Any = lowest, high: Any = highest) -> Any:
        made = _waiting(x)
        # Bounds on top of an upper one would have to be applied in turn; a wrong pair is an error of the op.
        if made is None or made.highest is not None or (high is not None and low > high):
            return NotImplemented
        if in_place:
            x.made = made.bounded(low, high)
            return x
        return Pending(made.bounded(low, high), x.shape)

    return step


def _add(in_place: bool) -> Callable[..., Any]:
    def step(x: Any, other: Any, *, alpha: Any = 1) -> Any:
        if not in_place and _waiting(x) is None:
            x, other = other, x
        made = _waiting(x)
        if made is None or not made.plain or alpha != 1 or other is x:
            return NotImplemented
        if type(other) not in (Tensor, Pending):
            return NotImplemented
        addend = plain(other)
        if addend.shape != x.shape or addend.dtype != torch.float32 or addend.stride() != x.stride():
            return NotImplemented
        # Now, for the addend may be modified next.
        y = made.floats(addend)
        if not in_place:
            return y
        x.kept, x.made = y, None
        return x

    return step


def _max_pool(x: Any, *window: Any) -> Any:
    made = _waiting(x)
    if made is None or made.channels_last:
        return NotImplemented
    # Torch takes many times as long for planes, much longer than writing the smaller result once more.
    results = _aten.max_pool2d_with_indices.default(replace(made, channels_last=True).floats(), *window)
    return tuple(t.contiguous() for t in results)


_STEPS: dict[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.relu.default: _bounded(False),
    _aten.relu_.default: _bounded(True),
    _aten.hardtanh.default: _bounded(False, -1.0, 1.0),
    _aten.hardtanh_.default: _bounded(True, -1.0, 1.0),
    _aten.add.Tensor: _add(False),
    _aten.add_.Tensor: _add(True),
    _aten.max_pool2d_with_indices.default: _max_pool,
}
