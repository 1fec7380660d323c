"""Where each decoder layer's up-projection is, in any causal language model of transformers.

Knows names and layouts only: runs no forward, changes nothing, and reads no weight until asked. It decides by the names
below, not by what a layer computes: a new feed-forward that uses a known name for something else is resolved wrongly,
one with an unknown name is refused. It does not know how often a layer runs in one forward: twice in hrm_text.

In a gated feed-forward, `down(act(gate(x)) * up(x))`, the up-projection is the branch without the activation; otherwise
it is the only branch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from ..config import InputError, ResonanceConfig
from .adapters import refuse_adapters
from .losses import unwrapped
from .plain import CHECKPOINTED, UNCOMPILED, class_of, is_compiled, makes_its_weight_plain, refuse_wrapper
from .quantised import REMEDY, bits_of, matrix_shape, plain_matrix
from .zero3 import whole_shape

Kind = Literal["linear", "conv1d", "experts"]

# The end of the dotted name -> the output features that are the up-projection. A new family is one line here.
NAMES: dict[str, Literal["all", "second half"]] = {
    "up_proj": "all",  # llama, qwen, gemma and most; 3-D in inkling's shared experts and nemotron_h's experts
    "gate_up_proj": "second half",  # phi3, glm, glm4; 3-D in most mixtures of experts
    "c_fc": "all",  # gpt2, gpt_neo, gpt_bigcode, starcoder2
    "dense_h_to_4h": "all",  # gpt_neox, falcon, bloom, persimmon
    "fc_in": "all",  # gptj, codegen
    "fc1": "all",  # opt, phi, bart, nanochat
    "w3": "all",  # lfm2
    "v1": "all",  # dbrx: all experts stacked in a 2-D parameter
    "w_1": "all",  # cpmant
    "Wi": "second half",  # modernbert-decoder: its "gate" has no activation
    "input_linear": "second half",  # granitemoeshared, granitemoehybrid; 3-D in jetmoe
    "intermediate.dense": "all",  # bert, roberta and similar models as decoders
    "feed_forward.key": "all",  # rwkv
    "ffn.proj_up": "all",  # xlstm
    "ffn.0": "all",  # ctrl
    "lin1": "all",  # xlm
}
# Their first map has both branches, the up-projection second; aria's up to transformers 5.17.
GATED_CLASSES = {"MoshiGatingMLP", "AriaGroupedExpertsMLP", "AriaExperts"}
# Their weight is (I, O) or (E, I, O); most experts since transformers 5.0 say so themselves, by `is_transposed`.
TRANSPOSED_CLASSES = {
    "Conv1D",
    "Llama4TextExperts",
    "AriaGroupedExpertsGemm",
    "GptOssExperts",
    "Qwen3VLMoeTextExperts",
}
# The gate and the up-projection alternate; the newest say so themselves, by `is_concatenated`.
INTERLEAVED_CLASSES = {"GptOssExperts"}

OTHER_STACKS = re.compile("attn|attention|vision|visual|image|audio|speech")  # not layers of the text decoder
OTHER_MODULES = re.compile("attn|attention|norm|router|mamba")  # modules of a layer that are not a feed-forward
ROUTED = re.compile(r"(^|\.)experts\.\d+\.")  # one expert of a ModuleList sees only the tokens routed to it


@dataclass(frozen=True)
class UpProjection:
    """One up-projection: what to hook, and what to read.

    Attributes:
        name: the dotted path of the linear map, or of the parameter of all experts.
        layer: the index of its decoder layer.
        module: the module to hook. The linear map itself (under PEFT the outermost wrapper around it). For experts the
            block around them, which maps each token by itself from hidden states (B, T, H) to as many, or to a tuple
            that begins with them; llama4 returns (B * T, H), and gemma4's experts, which have no block, take (B * T, H)
            and the routes of each token.
        block: the child of the decoder layer that contains it, often the whole feed-forward.
        owner: the module that owns the parameter.
        outer: the outermost wrapper around the owner, such as a layer of PEFT; without one the owner itself.
        leaf: the name of the parameter in its owner.
        shape: the shape of the matrix that it represents: (O, I), (I, O) for conv1d, (E, O, I) or (E, I, O) for most
            experts.
        kind: how tokens reach it; `"experts"` must be run again, because not every token passes through it.
        outputs: the output features of the map that are the up-projection.
        index: `outputs` as an index into a tensor of `shape`.
    """

    name: str
    layer: int
    module: nn.Module
    block: nn.Module
    owner: nn.Module
    outer: nn.Module
    leaf: str
    shape: torch.Size
    kind: Kind
    outputs: slice
    index: tuple[slice, ...]

    def up(self, tensor: Tensor) -> Tensor:
        """The entries of the up-projection in a tensor of `shape`, as a view."""
        return tensor[self.index]

    @property
    def parameter(self) -> nn.Parameter:
        """The whole parameter as it is stored now: packed if the model is quantised, a DTensor while it is sharded."""
        return cast(nn.Parameter, self.owner._parameters[self.leaf])

    @property
    def entries(self) -> int:
        """The number of weights in the up-projection."""
        return math.prod(len(range(*each.indices(size))) for each, size in zip(self.index, self.shape, strict=True))

    @property
    def adapted(self) -> bool:
        """Whether an adapter is around the parameter, so that the forward may use another weight."""
        return self.outer is not self.owner

    def plain_weight(self) -> Tensor:
        """The stored weights without adapters, detached: a view of the parameter, or a copy if it is quantised."""
        return self.up(plain_matrix(self.owner, self.parameter))


def find_up_projections(model: nn.Module, n_layers: int = 3, pattern: str | None = None) -> tuple[UpProjection, ...]:
    """The up-projections of the last decoder layers, lowest layer first; a mixture of experts may have several.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or not, on any device, also meta.
        n_layers: the number of layers, counted from the last. The default is all layers of a model that has fewer.
        pattern: a regex that is searched in the dotted names of modules, and of parameters that are not a module's
            `weight`. It replaces the known names. A match is the up-projection as a whole, unless its name is known to
            contain the gate too.

    Raises:
        InputError: one of these layers has no known up-projection, or one that is computed from other parameters or
            compiled; an adapter cannot be scored; or an argument is invalid.
    """
    refuse_wrapper(model)
    refuse_adapters(model)
    path, layers = decoder_layers(model)
    depth = len(layers)
    if n_layers == ResonanceConfig.n_layers:  # the default, which nobody chose for this model
        n_layers = min(n_layers, depth)
    if not 1 <= n_layers <= depth:
        raise InputError(f"n_layers must be between 1 and {depth}, the depth of '{_label(model)}'; got {n_layers}.")
    regex = None if pattern is None else _compiled(pattern)
    measured = range(depth - n_layers, depth)
    found = [each for index in measured for each in _in_layer(layers[index], index, f"{path}.{index}", regex)]
    missing = sorted(set(measured) - {each.layer for each in found})
    if missing:
        layer = layers[missing[-1]]
        _refuse_without_weight(layer, f"{path}.{missing[-1]}")
        where = f"the last {n_layers} of {depth} layers"
        if len(missing) < n_layers:
            where += f"; missing in layer {', '.join(map(str, missing))}"
        weights = sorted(_weights(layer, layer), key=_unlikeliness)
        raise InputError(_nothing_found(_label(model), where, f"{path}.{missing[-1]}", weights, pattern))
    return tuple(found)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The text decoder's layers: the longest outermost module list; one named decoder first, of equals the last."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in _in_use(model):
        if not isinstance(module, nn.ModuleList) or OTHER_STACKS.search(name):
            continue
        inside_another = any(name.startswith(f"{outer}.") for outer in stacks)
        if not inside_another and len(module) and all(list(layer.children()) for layer in module):
            stacks[name] = module
    if not stacks:
        raise InputError(f"'{_label(model)}' has no decoder layers: no list of blocks outside vision and audio.")
    path = max(reversed(stacks), key=lambda name: ("decoder" in name, len(stacks[name])))
    return path, stacks[path]


def _in_use(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the language model by name, without what PEFT puts beside them."""
    inner = unwrapped(model)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    stack = [(prefix, inner)]
    while stack:
        name, module = stack.pop()
        yield name, module
        children = list(_active(module)[0].named_children())
        stack += [(f"{name}.{child}" if name else child, each) for child, each in reversed(children)]


def _active(module: nn.Module) -> tuple[nn.Module, str]:
    """The module in a wrapper, as the one that PEFT's `modules_to_save` runs, and its path there; else the module."""
    if isinstance(module, ActivationWrapper):  # FSDP's checkpointing
        inner, path = _active(module._checkpoint_wrapped_module)
        return inner, f".{CHECKPOINTED}{path}"
    if not isinstance(module, ModulesToSaveWrapper):
        return module, ""
    names = module.active_adapters
    if module.disable_adapters or not names or any(name not in module.modules_to_save for name in names):
        return cast(nn.Module, module.original_module), ".original_module"
    return module.modules_to_save[names[0]], f".modules_to_save.{names[0]}"


@dataclass(frozen=True)
class _Weight:
    """A parameter of two or more dimensions.

    `name` is the name of its linear map or its own, inside the layer and without PEFT's wrappers, and `path` the same
    with the copies of `modules_to_save`; `leaf` is its name in `owner`, the module that owns it, `outer` the outermost
    wrapper around that module, `parent` the module around the linear map.
    """

    name: str
    path: str
    leaf: str
    owner: nn.Module
    outer: nn.Module
    parent: nn.Module
    parameter: nn.Parameter


def _weights(
    module: nn.Module, parent: nn.Module, name: str = "", path: str = "", outer: nn.Module | None = None
) -> Iterator[_Weight]:
    """All weights in a module, without adapters."""
    module, inside = _active(module)
    path += inside
    children = dict(module.named_children())
    if "base_layer" in children:
        yield from _weights(children["base_layer"], parent, name, path, outer or module)
        return
    if makes_its_weight_plain(module):
        yield _Weight(name, path, "weight", module, outer or module, parent, next(module.parameters()))
        return
    for own, parameter in module.named_parameters(recurse=False):
        if len(whole_shape(parameter)) < 2 or isinstance(module, nn.Embedding):
            continue
        end, around = ("", parent) if own == "weight" else (f".{own}", module)
        found, whole = f"{name}{end}".lstrip("."), f"{path}{end}".lstrip(".")
        yield _Weight(found, whole, own, module, outer or module, around, parameter)
    for own, child in children.items():
        yield from _weights(child, module, f"{name}.{own}".lstrip("."), f"{path}.{own}")


def _known(name: str) -> str | None:
    """The entry of NAMES that a dotted name in a layer ends with; None for a name outside the feed-forward."""
    if OTHER_MODULES.search(name.rpartition(".")[0]):
        return None
    return next((known for known in NAMES if f".{name}".endswith(f".{known}")), None)


def _in_layer(layer: nn.Module, index: int, path: str, regex: re.Pattern[str] | None) -> Iterator[UpProjection]:
    for weight in _weights(layer, layer):
        name, parameter = f"{path}.{weight.name}", weight.parameter
        if not (_known(weight.name) if regex is None else regex.search(name) or regex.search(f"{path}.{weight.path}")):
            continue
        _refuse_computed(layer, path, weight)
        shape = matrix_shape(name, weight.owner, parameter)
        transposed = vars(weight.owner).get("is_transposed", class_of(weight.owner).__name__ in TRANSPOSED_CLASSES)
        axis = len(shape) - (1 if transposed else 2)  # of the output features
        outputs = _outputs(weight, shape[axis])
        entries = tuple(outputs if each == axis else slice(None) for each in range(len(shape)))
        block = layer.get_submodule(weight.name.split(".")[0])
        module, kind = _what_to_hook(block, weight, transposed)
        if kind == "experts" and bits_of(parameter):
            raise InputError(f"'{name}' is quantised and sees only tokens routed to it. Leave experts unquantised.")
        yield UpProjection(
            name, index, module, block, weight.owner, weight.outer, weight.leaf, shape, kind, outputs, entries
        )


def _refuse_computed(layer: nn.Module, path: str, weight: _Weight) -> None:
    code = makes_its_weight_plain(weight.owner)
    if code is not None:
        name = next(name for name, module in layer.named_modules() if module is weight.owner)
        code = code.format(f"model.get_submodule('{path}.{name}')")
        raise InputError(
            f"The weight of '{path}.{weight.name}' is computed from other parameters in every forward, so no step "
            f"moves it by itself. Make it plain, in every layer: `{code}`."
        )


def _refuse_without_weight(layer: nn.Module, path: str) -> None:
    """Raise InputError for a known name that is compiled, or has a weight in its own format, as GPTQ and AWQ do."""
    for name, module in layer.named_modules():
        if _known(name) and is_compiled(module):
            raise InputError(f"'{path}.{name}' is compiled, which drops hooks. {UNCOMPILED}.")
        if _known(name) and not list(module.parameters()) and list(module.buffers()):
            raise InputError(f"'{path}.{name}' is a {type(module).__name__}, which has no weight to read. {REMEDY}")


def _outputs(weight: _Weight, size: int) -> slice:
    known = _known(weight.name)
    gated = class_of(weight.parent).__name__ in GATED_CLASSES or (known is not None and NAMES[known] == "second half")
    if not gated:
        return slice(None)
    concatenated = vars(weight.owner).get("is_concatenated", class_of(weight.owner).__name__ not in INTERLEAVED_CLASSES)
    return slice(size // 2, None) if concatenated else slice(1, None, 2)


def _what_to_hook(block: nn.Module, weight: _Weight, transposed: bool) -> tuple[nn.Module, Kind]:
    if is_map(weight) and not ROUTED.search(weight.name):
        return weight.outer, "conv1d" if transposed else "linear"
    return block, "experts"


def is_map(weight: _Weight | UpProjection) -> bool:
    """Whether the parameter is the matrix of a linear map of its own, not one of a stack."""
    return weight.owner._parameters.get("weight") is weight.parameter and len(whole_shape(weight.parameter)) == 2


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"up_projection={pattern!r} is not a regular expression: {error}.") from None


def _unlikeliness(weight: _Weight) -> tuple[bool, ...]:
    """The likeliest up-projections sort first: what is inside a module of a known name, then maps of a feed-forward."""
    inside = any(f".{known}." in f".{weight.name}" for known in NAMES)
    return not inside, bool(OTHER_MODULES.search(weight.name)), not is_map(weight)


def _nothing_found(label: str, where: str, layer: str, weights: Sequence[_Weight], pattern: str | None) -> str:
    """The error message: what was searched, where, and what to do, with a regex that finds something."""
    names = ", ".join(f"{layer}.{each.name}" for each in weights[:8])
    maps = [each.name for each in weights if is_map(each)]
    example = f', such as up_projection=r"{re.escape(maps[0])}$"' if maps else ""
    if pattern is not None:
        return (
            f"up_projection={pattern!r} matches nothing in '{label}' (looked in {where}). Pass a regex that is found "
            f"in a name there{example}. Names there: {names}."
        )
    return (
        f"No up-projection found in '{label}' (looked in {where}). Pass up_projection=\"<regex>\" that finds it among "
        f"names such as {names}{example}. Known names: {', '.join(NAMES)}."
    )


def _label(model: nn.Module) -> str:
    return str(cast(Any, model).config.model_type)
