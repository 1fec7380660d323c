"""Modules that are not plain: in a wrapper, compiled, with a computed weight. Knows torch, no model's layers."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..config import InputError

CHECKPOINTED = "_checkpoint_wrapped_module"  # the name of a module inside FSDP's wrapper for checkpointing
UNCOMPILED = "Pass the model uncompiled, and train without torch.compile"
UNDONE_BY = {
    BasePruningMethod: "prune.remove({}, 'weight')",
    SpectralNorm: "remove_spectral_norm({})",
    WeightNorm: "remove_weight_norm({})",
}


def refuse_wrapper(model: object) -> None:
    """Raise InputError for a model that is wrapped for several devices."""
    if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        raise InputError(f"The model is wrapped in {type(model).__name__}. Pass the model inside: `model.module`.")


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the one that FSDP2 derives from it."""
    own = type(module)
    return own.__bases__[-1] if isinstance(module, FSDPModule) else own


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled a module."""
    return type(module).__name__ == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None


def makes_its_weight_plain(module: nn.Module) -> str | None:
    """The code that makes a weight a plain parameter, with {} for the module.

    None for a weight that is one already, or that the module does not have.
    """
    if parametrize.is_parametrized(module, "weight"):
        if any(each.requires_grad for each in module.parameters()):
            return "torch.nn.utils.parametrize.remove_parametrizations({}, 'weight')"
        return "torch.nn.utils.parametrize.remove_parametrizations({}.requires_grad_(), 'weight').requires_grad_(False)"
    for hook in module._forward_pre_hooks.values():
        for kind, code in UNDONE_BY.items():
            if isinstance(hook, kind) and getattr(hook, "name", getattr(hook, "_tensor_name", None)) == "weight":
                return f"torch.nn.utils.{code}"
    return None
