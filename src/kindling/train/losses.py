"""The loss of a batch: the net's outputs against the batch's targets, as one number with a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kindling.errors import KindlingError, TrainingError
from kindling.evaluate import aligned
from kindling.signature import Signature

LossFunction = Callable[[Tensor, Tensor], Tensor]


def compute_loss(
    module: nn.Module, signature: Signature, batch: Mapping[str, Tensor], loss: LossFunction, precision: str = "fp32"
) -> Tensor:
    """The mean loss of a batch, as one number with a gradient.

    One row alone has no variance; where batch normalisation refuses it, the statistics so far serve.

    Args:
        precision: `"bf16"` runs the net and the loss under torch's autocast.
    Raises: TrainingError, when the net or the loss function refuses the batch, or the loss is not one number.
    """
    try:
        return _compute_loss(module, signature, batch, loss, precision)
    except TrainingError as error:
        if "Expected more than 1 value per channel" not in str(error.__cause__):
            raise
        with _stored_statistics(module):
            return _compute_loss(module, signature, batch, loss, precision)


def _compute_loss(
    module: nn.Module, signature: Signature, batch: Mapping[str, Tensor], loss: LossFunction, precision: str
) -> Tensor:
    try:
        with autocast(batch, precision):
            outputs = next(iter(signature.call(module, batch).values()))
            (target_name,) = (name for name in batch if name not in signature.inputs)
            targets = batch[target_name]
            value = loss(outputs, aligned(loss, outputs, targets))
    except KindlingError:
        raise
    except Exception as error:  # whatever a user's net or loss function may raise
        shapes = {name: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in batch.items()}
        raise TrainingError(
            f"the net or its loss refused a batch: {type(error).__name__}: {error}. The batch was {shapes}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TrainingError(f"the loss of a batch is {shape}, not one number. Average it in the loss function.")
    if not value.requires_grad:
        raise TrainingError(
            "the loss depends on no trainable parameter. Is every layer frozen? Use unfreeze() or then()."
        )
    return value.reshape(())


def autocast(batch: Mapping[str, Tensor], precision: str) -> contextlib.AbstractContextManager[None]:
    """Where matrix products and convolutions run in bfloat16, if `precision` says so."""
    if precision == "fp32":
        return contextlib.nullcontext()
    device = next(iter(batch.values())).device.type
    return torch.autocast(device, torch.bfloat16)


@contextlib.contextmanager
def _stored_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisation in inference mode, for layers that keep statistics."""
    layers = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True
