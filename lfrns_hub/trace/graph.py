"""Propagation of channel ids through the ATen graph of a model."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lfrns_hub.format.narrow import feature_entries
from lfrns_hub.trace.divisions import read_divisions
from lfrns_hub.trace.forward import watch_forward
from lfrns_hub.trace.groups import MacsModel, read_groups, unit_places
from lfrns_hub.trace.ids import NONE, IdTable
from lfrns_hub.trace.programs import answers, export, export_training, first_line, needed
from lfrns_hub.trace.rules import elementwise, layers, movement, products  # noqa: F401  (they register their rules)
from lfrns_hub.trace.rules.registry import find_rule
from lfrns_hub.trace.sites import Site, find_sites
from lfrns_hub.trace.widths import note_features, note_unread
from lfrns_hub.units import UnitGroup

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# If a weight is computed by these operations only, each input channel keeps its own part of it.
PLAIN_WEIGHT_OPS = ("mul", "view", "reshape", "to", "_to_copy", "contiguous", "clone", "div", "expand", "squeeze",
                    "unsqueeze", "alias", "detach")  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """The parameter behind a layer's weight, its scales, and whether its inputs are normalised together."""

    name: str
    gains: tuple[str, ...] = ()
    standardised: bool = False


class Trace:
    """The groups of a model, and how its MACs and parameters depend on their widths.

    Attributes:
        groups: Every group, frozen ones too, in the order of the network.
        cost: MACs and parameters as functions of the units kept.
        divisions: Where the forward divides units itself: the units of each part (`trace/divisions.py`).
        sites: Layers whose output can be compared with that of another network of the same graph.
    """

    groups: list[UnitGroup]
    cost: MacsModel
    divisions: list[list]
    sites: list[Site]

    def __init__(self, model: nn.Module, example_input: Tensor):
        watched = watch_forward(model, example_input)
        self.model, program = export(model, example_input[:1], watched.caches)
        self._name_modules()
        self.ids = IdTable()
        self.training = False
        self._run(program)
        training = export_training(model, self.model, program, example_input, watched.caches)
        if training is not None:
            counted = len(self.ids.macs)
            self.training = True
            self._run(training)
            self.training = False
            del self.ids.macs[counted:]
            self._open(program)
        if watched.reads is not None:
            note_unread(self, watched.reads)
        self.regroup([replace(group, caches=watched.caches) for group in read_groups(self.ids, self.model)])
        labels = self.ids.classes()
        self.divisions = read_divisions(self.ids.divisions, labels, unit_places(self.ids, labels, self.groups))
        self.sites = find_sites(self, list(program.graph.nodes))

    def _open(self, program: torch.export.ExportedProgram) -> None:
        """Read a program: the tensor of each placeholder, and the nodes that the network's outputs depend on."""
        self.sources = {
            spec.arg.name: self.first_name(spec.target)
            for spec in program.graph_signature.input_specs
            if spec.target is not None
        }
        self.weight_nodes = self._weight_nodes(program)
        # No hook sees layers that only training runs or that no output depends on.
        self.observed = set() if self.training else needed(answers(program))

    def regroup(self, groups: list[UnitGroup]) -> None:
        """Replace the groups by others of the same units; the costs follow."""
        self.groups, self.cost = groups, MacsModel(self.ids, groups, self.model)

    def _name_modules(self) -> None:
        """Map every module and tensor to one name: the first, if it has several."""
        self.module_names: dict[str, str] = {}
        firsts: dict[int, str] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            self.module_names[name] = firsts.setdefault(id(module), name)
        owners: dict[int, set[str]] = {}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(tensor), set()).add(self.first_name(name))
        self.shared = {name.removesuffix(".weight") for names in owners.values() if len(names) > 1 for name in names}

    def first_name(self, tensor: str) -> str:
        """Return the first name of a parameter or buffer."""
        owner, dot, leaf = tensor.rpartition(".")
        return self.module_names.get(owner, owner) + dot + leaf

    def _weight_nodes(self, program: torch.export.ExportedProgram) -> set[Node]:
        """Find nodes that are computed only from parameters and read only as a layer's weight."""
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        fixed: set[Node] = set()
        for node in program.graph.nodes:
            if node.op == "placeholder":
                if kinds[node.name] in (InputKind.PARAMETER, InputKind.BUFFER):
                    fixed.add(node)
            elif node.op == "call_function" and node.all_input_nodes and fixed.issuperset(node.all_input_nodes):
                fixed.add(node)
        weights: set[Node] = set()
        for node in reversed(program.graph.nodes):
            if node in fixed and node.users:
                if all(user in weights or (is_layer_call(user) and user.args[1] is node) for user in node.users):
                    weights.add(node)
        return weights

    def _run(self, program: torch.export.ExportedProgram) -> None:
        """Propagate the ids through every node."""
        self._open(program)
        outputs = answers(program)
        values: dict[Node, Any] = {}
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        features = {entry.get("module", ""): torch.empty(0) for entry in feature_entries(self.model)}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._source(node, kinds[node.name])
            elif node.op == "call_function":
                values[node] = self._call(node, values)
                for name, _ in (node.meta.get("nn_module_stack") or {}).values():
                    if name in features and isinstance(values[node], Tensor):
                        features[name] = values[node]
            else:
                values[node] = None
        for node in outputs:
            if isinstance(values[node], Tensor):
                self.ids.freeze(values[node].flatten(), "it is the network's output" + " in training" * self.training)
        if not self.training:
            note_features(self, features)
            self._training_norms()

    def _training_norms(self) -> None:
        """Tie norms that only training runs, such as those of split batch norm, to the norm that contains them."""
        for name, module in self.model.named_modules():
            ids = self.ids.by_axis.get((f"{name}.weight", 0))
            if ids is None or not isinstance(module, nn.modules.batchnorm._NormBase):
                continue
            for inner, norm in module.named_modules():
                if inner and getattr(norm, "num_features", None) == module.num_features:
                    for leaf in ("weight", "bias", "running_mean", "running_var"):
                        if getattr(norm, leaf, None) is not None:
                            self.ids.axis(f"{name}.{inner}.{leaf}", 0, ids)

    def _source(self, node: Node, kind: InputKind) -> Any:
        """Return the ids of a placeholder: new ones for parameters and buffers that are added or multiplied."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        if kind not in (InputKind.PARAMETER, InputKind.BUFFER) or value.ndim == 0 or value.numel() == 0:
            return self.none_like(node)
        if node in self.weight_nodes:
            return self.none_like(node)
        if all(is_layer_call(user) and node in user.args[1:5] for user in node.users):
            return self.none_like(node)
        name = self.sources[node.name]
        if name not in self.ids.tensors:
            self.ids.tensors[name] = self.ids.fresh(value.numel(), from_tensor=True).view(value.shape)
        return self.ids.tensors[name]

    def _call(self, node: Node, values: dict[Node, Any]) -> Any:
        if node in self.weight_nodes:
            return self.none_like(node)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        if str(node.target) == "<built-in function getitem>":
            return args[0][args[1]]
        rule = find_rule(node.target)
        if rule is not None:
            try:
                result = rule(self, node, *args, **kwargs)
                value = node.meta.get("val")  # a functional form also returns values that the rule does not know
                if isinstance(result, Tensor) and isinstance(value, (tuple, list)):
                    return [result, *self.none_like(node)[1:]]
                return result
            except Exception as error:  # a call in a form unknown to its rule may fail in any way
                reason = f"the rule of {node.target} failed ({first_line(error)[:80]})"
                return self._freeze_call(node, args, kwargs, reason)
        if not any(
            isinstance(a, Tensor) and bool((a != NONE).any()) for a in torch.utils._pytree.tree_leaves((args, kwargs))
        ):
            return self.none_like(node)
        return self._freeze_call(node, args, kwargs, f"no rule for {node.target}")

    def _freeze_call(self, node: Node, args: Any, kwargs: Any, why: str) -> Any:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.ids.freeze(value.flatten(), self.reason(node, why))
        return self.none_like(node)

    def none_like(self, node: Node) -> Any:
        """Return ids of no unit in the shape of a node's value."""
        return torch.utils._pytree.tree_map(
            lambda v: torch.full((), NONE).expand(v.shape) if isinstance(v, Tensor) else v, node.meta.get("val")
        )

    def module_of(self, node: Node) -> str | None:
        """Return the name of the innermost module that a node was called in."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return self.module_names.get(stack[-1][0]) if stack else None

    def reason(self, node: Node, why: str) -> str:
        """Return a reason with its place: operation, module, line of user code."""
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
        where = f", in `{lines[-1]}`" if lines else ""
        return f"{why} ({node.target} in {self.module_of(node) or 'the model'}{where})"

    def tensor_name(self, node: Any) -> str:
        """Return the name of the parameter or buffer of a node, or '' where it is computed."""
        return self.sources.get(node.name, "") if isinstance(node, Node) else ""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter or buffer, () without a name."""
        if not name:
            return ()
        owner, _, leaf = name.rpartition(".")
        return tuple(getattr(self.model.get_submodule(owner), leaf).shape)

    def weight_of(self, node: Any) -> Weight | None:
        """Return the one parameter that a layer's weight is computed from, or None."""
        if name := self.tensor_name(node):
            return Weight(name)
        if node not in self.weight_nodes:
            return None
        numel = node.meta["val"].numel()
        names, standardised, todo, seen = [], False, [node], set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            if at.op == "placeholder":
                names.append(self.tensor_name(at))
            else:
                standardised |= operation(at) not in PLAIN_WEIGHT_OPS
                todo.extend(at.all_input_nodes)
        whole = [name for name in names if torch.Size(self.shape_of(name)).numel() == numel]
        gains = tuple(name for name in names if name not in whole)
        return Weight(whole[0], gains, standardised) if len(whole) == 1 else None

    def layer_of(self, node: Node, weight: Any) -> str | None:
        """Return the stock layer of this call, or None: a functional call, a computed or a shared weight."""
        source = self.weight_of(weight)
        if source is None or not source.name.endswith(".weight"):
            return None
        module = source.name.removesuffix(".weight")
        plain = isinstance(self.model.get_submodule(module), LAYERS) and self.module_of(node) == module
        return module if plain and module not in self.shared and isinstance(node.args[0], Node) else None

    def why_no_layer(self, node: Node) -> str:
        """Explain why a call is not a layer that a hook can watch."""
        source = self.weight_of(node.args[1])
        module = self.module_of(node)
        if (source is None or not source.name.endswith(".weight")) and module:
            if how := how_computed(self.model.get_submodule(module)):
                return f"its weight is computed{how}"
        if source is None:
            parts = [self.tensor_name(n) for n in needed([node.args[1]]) if self.tensor_name(n)]
            return f"its weight is computed from {' and '.join(sorted(parts))}" if parts else "its weight is computed"
        if source.name.removesuffix(".weight") in self.shared:
            return "its weight is that of several layers"
        if self.module_of(node) != source.name.removesuffix(".weight"):
            return f"{source.name} is used outside its layer, where no hook sees its input"
        return "units of several heads or parts share its weight"


def how_computed(module: nn.Module) -> str:
    """Explain how a layer's weight is computed, and how to make it plain, if torch has a way."""
    if parametrize.is_parametrized(module, "weight"):
        made = ", ".join(type(step).__name__.strip("_") for step in module.parametrizations.weight)
        return f" by {made}: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') makes it plain"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return " from a mask: torch.nn.utils.prune.remove(layer, 'weight') makes it plain"
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            remover = "remove_weight_norm" if isinstance(hook, WeightNorm) else "remove_spectral_norm"
            return f" by {type(hook).__name__}: torch.nn.utils.{remover}(layer) makes it plain"
    return ""


def operation(node: Node) -> str:
    """Return the name of a node's ATen operation without its overload, "" for anything else."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else ""


def is_layer_call(node: Node) -> bool:
    """Return whether a node is a layer, whose arguments 1 to 4 are weights."""
    name = str(node.target)
    return any(name.startswith(f"aten.{layer}") for layer in ("conv", "linear", "batch_norm", "layer_norm",
               "group_norm", "instance_norm", "rms_norm", "prelu", "_native_batch_norm"))  # fmt: skip


def trace_model(model: nn.Module, example_input: Tensor) -> Trace:
    """Trace a model on images like `example_input` [N, C, H, W]; the model is unchanged."""
    return Trace(model, example_input)
