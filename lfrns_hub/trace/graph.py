"""Export a model on the meta device and run channel ids through its ATen graph."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from lfrns_hub.trace import elementwise, layers, movement  # noqa: F401  (they register their rules)
from lfrns_hub.trace.groups import MacsModel, read_groups
from lfrns_hub.trace.ids import NONE, IdTable
from lfrns_hub.trace.rules import find_rule
from lfrns_hub.units import UnitGroup

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model's structure to the meta device without copying a weight."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


class Trace:
    """The groups of a model, and how its MACs and parameters depend on their widths.

    Attributes:
        groups: Every group, frozen ones too, in the order of the network.
        cost: MACs and parameters as functions of the units kept.
    """

    groups: list[UnitGroup]
    cost: MacsModel

    def __init__(self, model: nn.Module, example_input: Tensor):
        self.model = meta_copy(model).eval()
        self.ids = IdTable()
        example = torch.empty_like(example_input[:1], device="meta")
        try:
            with torch.no_grad():
                program = torch.export.export(self.model, (example,), strict=False)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"tracing {type(model).__name__} on images {list(example_input.shape)} failed: {first}. "
                "torch.export must be able to run the model on this input: check its size and channels."
            ) from error
        self.sources = {
            spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None
        }
        self.shared = self._shared_tensors()
        self._run(program)
        self.groups = read_groups(self.ids, self.model)
        self.cost = MacsModel(self.ids, self.groups, self.model)

    def _shared_tensors(self) -> set[str]:
        """Name the parameters that live under more than one name."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        return {name for group in names.values() if len(group) > 1 for name in group}

    def _run(self, program: torch.export.ExportedProgram) -> None:
        """Run the ids through every node."""
        values: dict[Node, Any] = {}
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._source(node, kinds[node.name])
            elif node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "output":
                for value in torch.utils._pytree.tree_leaves(torch.fx.node.map_arg(node.args, lambda n: values[n])):
                    if isinstance(value, Tensor):
                        self.ids.freeze(value.flatten(), "it is the network's output")
            else:
                values[node] = None

    def _source(self, node: Node, kind: InputKind) -> Any:
        """Parameters and buffers get ids of their own, an input none."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        used_elementwise = any(not self._is_layer_tensor(user, node) for user in node.users)
        if kind not in (InputKind.PARAMETER, InputKind.BUFFER) or not used_elementwise or value.ndim == 0:
            return self.none_like(node)
        ids = self.ids.fresh(value.numel(), from_tensor=True).view(value.shape)
        self.ids.tensors[self.sources[node.name]] = ids
        return ids

    def _is_layer_tensor(self, user: Node, node: Node) -> bool:
        """Whether a rule for layers reads this tensor as a weight."""
        name = str(user.target)
        return any(f"aten.{layer}" in name for layer in ("conv", "linear", "_norm")) and node in user.args[1:5]

    def _call(self, node: Node, values: dict[Node, Any]) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        if str(node.target) == "<built-in function getitem>":
            return args[0][args[1]]
        rule = find_rule(node.target)
        if rule is not None:
            try:
                return rule(self, node, *args, **kwargs)
            except (TypeError, RuntimeError, IndexError) as error:
                reason = f"the rule of {node.target} failed ({str(error).splitlines()[0][:80]})"
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
        """Ids of no unit in the shape of a node's value."""
        return torch.utils._pytree.tree_map(
            lambda v: torch.full((), NONE).expand(v.shape) if isinstance(v, Tensor) else v, node.meta.get("val")
        )

    def reason(self, node: Node, why: str) -> str:
        """Say why and where: operation, module, line of user code."""
        stack = node.meta.get("nn_module_stack") or {}
        module = list(stack.values())[-1][0] if stack else ""
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
        where = f", in `{lines[-1]}`" if lines else ""
        return f"{why} ({node.target} in {module or 'the model'}{where})"

    def tensor_name(self, node: Any) -> str:
        """Name the parameter or buffer that a node is, or '' where it is computed."""
        return self.sources.get(node.name, "") if isinstance(node, Node) else ""

    def layer_of(self, node: Node, weight: Any) -> str | None:
        """Name the stock layer that this call is, or None: a functional call, a computed or a shared weight."""
        name = self.tensor_name(weight)
        if not name.endswith(".weight") or name in self.shared:
            return None
        module = name.removesuffix(".weight")
        stack = node.meta.get("nn_module_stack") or {}
        innermost = list(stack.values())[-1][0] if stack else ""
        plain = isinstance(self.model.get_submodule(module), LAYERS) and innermost == module
        return module if plain and isinstance(node.args[0], Node) else None


def trace_model(model: nn.Module, example_input: Tensor) -> Trace:
    """Trace a model on images like `example_input` [N, C, H, W]; nothing of the model changes."""
    return Trace(model, example_input)
