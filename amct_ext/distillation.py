"""Training towards the outputs of the float model (knowledge distillation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.common.validation import check_types
from amct_ext.errors import InvalidDataError, StaleStateError
from amct_ext.graph.run import tensors_in

Distance = Callable[[Tensor, Tensor], Tensor]  # of the student's and the teacher's tensor, a scalar


class DistillationLoss(nn.Module):
    """A loss that also pulls the compressed model towards the outputs of its float model.

        distil = amct_ext.DistillationLoss(model, teacher)
        loss = distil(criterion(model(x), y))  # half of it from the teacher
        loss.backward()

    A call runs ``teacher`` on what the last training forward of ``model`` was given and returns
    ``(1 - weight) * task_loss + weight * distance``; without a task loss, the distance alone. The teacher runs without
    gradients, under the autocast of the call, and is put in eval mode; it is no part of this module's state dict. Only
    forwards in training mode with gradients are noted; the last one counts, and a call uses it up. Copies of the model
    (create, save, ``copy.deepcopy``) are not watched; `close` ends it for the model, too.

    model: what the training loop calls, in its DistributedDataParallel or torch.compile wrapper if it has one. teacher:
    the float model, on the same device; takes the same inputs. weight: 0 to 1. distance, of two float tensors:

    * "kl": Kullback-Leibler divergence of class scores, times ``temperature``**2, mean over all other positions; the
      classes lie along ``dim`` (None: axis 1; to be given for 3-D outputs, where language models have them last);
    * "bce": binary cross-entropy of single logits with the teacher's probabilities;
    * "mse": squared error, relative to the variance of the teacher's output;
    * a callable ``(student, teacher) -> scalar``.

    Of outputs that are containers the "logits" entry or attribute counts, else all floating tensors of one shape with
    the teacher's (scalars left out), added up. Errors: TypeError, ValueError (arguments); StaleStateError (a call
    before a training forward), InvalidDataError (outputs that do not fit together).
    Source: Hinton et al. 2015; for quantised students Mishra and Marr 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
        distance: Literal["kl", "bce", "mse"] | Distance = "kl",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        check_types(model=(model, nn.Module), teacher=(teacher, nn.Module))
        if teacher is model:
            raise ValueError("teacher must be another module than model: the float model, or a copy of it")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie between 0 and 1, not {weight}")
        if not temperature > 0:
            raise ValueError(f"temperature must be greater than 0, not {temperature}")
        if not callable(distance) and distance not in ("kl", "bce", "mse"):
            raise ValueError(f"distance must be 'kl', 'bce', 'mse' or a callable, not {distance!r}")
        self.weight, self.temperature, self.distance, self.dim = weight, temperature, distance, dim
        self._teacher = (teacher.eval(),)  # in a tuple: not a child
        self._last_forward = _LastForward()
        self._handle = model.register_forward_hook(self._last_forward, with_kwargs=True)

    def forward(self, task_loss: Tensor | None = None) -> Tensor:
        """The combined loss of the last training forward, a scalar."""
        if self._last_forward.last is None:
            raise StaleStateError(
                "no training forward of the model since the last call: call the model (in training mode, with "
                "gradients) before its distillation loss"
            )
        args, kwargs, output = self._last_forward.last
        self._last_forward.last = None
        with torch.no_grad():
            target = self._teacher[0](*args, **kwargs)
        pairs = _pairs(output, target)
        distance = torch.stack([self._between(*pair) for pair in pairs]).sum()
        return distance if task_loss is None else (1 - self.weight) * task_loss + self.weight * distance

    def close(self) -> None:
        """Stop watching the model's forwards."""
        self._handle.remove()
        self._last_forward.last = None

    def _between(self, student: Tensor, teacher: Tensor) -> Tensor:
        if callable(self.distance):
            return self.distance(student, teacher)
        student, teacher = student.float(), teacher.detach().float()
        if self.distance == "bce":
            return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
        if self.distance == "mse":
            return F.mse_loss(student, teacher) / teacher.var(correction=0).clamp_min(torch.finfo(torch.float32).eps)
        if self.dim is None and student.dim() == 3:
            raise InvalidDataError(
                f"distance 'kl': say by dim where the classes of an output of shape {tuple(student.shape)} lie: -1 for "
                "sequences of tokens, 1 as nn.CrossEntropyLoss has them"
            )
        dim = 1 if self.dim is None else self.dim
        if student.dim() < 2 or student.shape[dim] < 2:
            raise InvalidDataError(
                f"distance 'kl' compares class scores along axis {dim}, of which an output of shape "
                f"{tuple(student.shape)} has fewer than two; take 'bce' for single logits, 'mse' for other values"
            )
        log_p, log_q = ((x / self.temperature).log_softmax(dim) for x in (student, teacher))
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim)
        return divergence.mean() * self.temperature**2


class _LastForward:
    """The forward hook: inputs and output of the last training forward."""

    def __init__(self) -> None:
        self.last: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.last = args, kwargs, output

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        """What copies and pickles of the model carry instead: neither tensors of a graph nor the teacher."""
        return _NoHook, ()


class _NoHook:
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        pass


def _pairs(output: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors to compare: student's and teacher's."""
    students, targets = (_floating(_logits(one)) for one in (output, target))
    if students and [x.shape for x in students] == [x.shape for x in targets]:
        return list(zip(students, targets, strict=True))
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (students, targets)]
    raise InvalidDataError(
        f"the outputs of model and teacher cannot be compared: floating tensors of shapes {shapes[0]} and {shapes[1]}; "
        "the teacher must be the float model, called the same way"
    )


def _logits(output: Any) -> Any:
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if held is None else held


def _floating(output: Any) -> list[Tensor]:
    return [x for x in tensors_in(output) if x.is_floating_point() and x.dim()]
