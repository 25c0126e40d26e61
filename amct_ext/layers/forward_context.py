"""The context of the current forward: whether it may update state, and what separates parts of its graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TRACERS = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)
_thread = threading.local()


@contextlib.contextmanager
def no_state_updates() -> Iterator[None]:
    """Forwards in this thread change no state of compressed layers for a while."""
    before = getattr(_thread, "frozen", False)
    _thread.frozen = True
    try:
        yield
    finally:
        _thread.frozen = before


def state_updates_disabled() -> bool:
    """Whether the current forward must not change any state.

    True inside a backward (gradient checkpointing runs a part again, whose results must be those of the first run),
    under a transform of torch.func, in a tracer or an exporter, in `no_state_updates`.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return getattr(_thread, "frozen", False) or in_backward() or traced_or_transformed() or _in_tracer()


def traced_or_transformed() -> bool:
    """Whether a compiler, torch's tracer or a transform of torch.func runs the forward."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def host_can_read(x: torch.Tensor) -> bool:
    """Whether the host can read values of ``x`` now: not while a graph is traced, nor on the meta device."""
    return not (torch.compiler.is_compiling() or x.is_meta or _in_tracer())


def _in_tracer() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, _TRACERS) for mode in _get_current_dispatch_mode_stack()
    )


def in_backward() -> bool:
    """Whether this thread runs a backward."""
    return torch._C._current_graph_task_id() != -1


def autograd_context_key() -> tuple[bool, object]:
    """Equal within one checkpointed part of a forward and different between parts: grad mode, saved-tensor hooks.

    Checkpointed parts have hooks of their own, or no gradients in the first run. A result of one part must not be used
    in another: the autograd graph of each must be the same when it runs again.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled(), None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), None if hooks is None else hooks[0]
