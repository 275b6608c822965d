"""The ATen graph of a model: exported on the meta device or the CPU, and in training mode where that differs."""

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lfrns_hub.format.narrow import kept_tensors, meta_copy, model_copy
from lfrns_hub.model_io.batches import read_tensors
from lfrns_hub.model_io.hooks import hooked, on_output
from lfrns_hub.model_io.model import same_draw
from lfrns_hub.units import Cache, forget

TRAINING_IMAGES = 4  # a BatchNorm of single values cannot train on one image


def export(model: nn.Module, images: Tensor, caches: Iterable[Cache] = ()) -> tuple[nn.Module, ExportedProgram]:
    """Export a model in eval mode.

    Args:
        model: The network; untouched.
        images: [1, C, H, W]; only shape and dtype are used.
        caches: Attributes that a copy starts without.
    Returns:
        The copy that was exported, which returns a tuple of tensors, and its program. The copy is on the meta device,
        or on the CPU where the forward creates tensors or reads values.
    Raises:
        ValueError: The model does not run with images as the only input, or torch.export cannot export it.
    """
    check_forward(model)
    failures = []
    for copied in (meta_copy, cpu_copy):
        network = _answering_tensors(forget(copied(model), caches).eval())
        try:
            program = _export(network, images)
        except GuardOnDataDependentSymNode as error:
            failures.append(error)
            break
        except Exception as error:
            failures.append(error)
        else:
            check_images_stay(model, program)
            return network, functional(program)
    raise _refusal(model, images, failures[-1]) from failures[-1]


def export_training(
    model: nn.Module, network: nn.Module, program: ExportedProgram, images: Tensor, caches: Iterable[Cache] = ()
) -> ExportedProgram | None:
    """Export a model in training mode, if it then runs layers or returns outputs that eval mode does not.

    Args:
        model, images, caches: As for `export`.
        network, program: Result of `export`.
    Returns:
        The program; None where training runs the same layers, needs other inputs, or cannot be exported.
    """
    images = images[:1].expand(TRAINING_IMAGES, *images.shape[1:])
    fresh = meta_copy if _device_of(network).type == "meta" else cpu_copy  # a forward may leave tensors on the copy
    trial, called = forget(fresh(model), caches).train(), []
    unread = [trial.get_submodule(layer) for layer in _unread_layers(network, program)]
    try:
        with torch.no_grad(), same_draw(), hooked(inputs=[(layer, lambda m, *_: called.append(m)) for layer in unread]):
            outputs = read_tensors(trial(torch.zeros_like(images, device=_device_of(trial))))
        shapes = [node.meta["val"].shape[1:] for node in answers(program)]
        if not called and [output.shape[1:] for output in outputs] == shapes:
            return None
        return functional(_export(_answering_tensors(forget(fresh(model), caches).train()), images))
    except Exception:  # a model that needs targets too, or that torch.export cannot export
        return None


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program without writes to views: the graph shows a written slice itself, but not its later readers."""
    with torch.no_grad():
        return program.run_decompositions({}) if any(map(_writes_view, program.graph.nodes)) else program


def answers(program: ExportedProgram) -> list[Node]:
    """Return the nodes that are the model's own outputs; a functional graph also returns the buffers that it writes."""
    given = next(node for node in program.graph.nodes if node.op == "output").args[0]
    specs = program.graph_signature.output_specs
    pairs = zip(given, specs, strict=True)
    return [node for node, spec in pairs if spec.kind == OutputKind.USER_OUTPUT and isinstance(node, Node)]


def needed(nodes: Iterable[Node]) -> set[Node]:
    """Return these nodes and all nodes that they are computed from."""
    reached: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo.extend(node.all_input_nodes)
    return reached


def check_forward(model: nn.Module) -> None:
    """Refuse a model that cannot be called with images as the only argument."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in kinds]
    if len(required) > 1 or any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in required):
        names = [p.name for p in required]
        raise ValueError(
            f"{type(model).__name__}.forward({', '.join(names)}): it must run on images alone. Give the other "
            "arguments defaults, or wrap the model in a module whose forward takes images and gives it the rest."
        )


def check_images_stay(model: nn.Module, program: ExportedProgram) -> None:
    """Refuse a model that writes to its images: the next pass would see changed ones."""
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT}
    for node in program.graph.nodes:
        if node.op == "call_function" and any(_base(value).name in inputs for value in _written(node)):
            lines = (node.meta.get("stack_trace") or "").strip().splitlines()
            raise ValueError(
                f"{type(model).__name__}: its forward writes to the images that it is given"
                f"{f', in `{lines[-1].strip()}`' if lines else ''}, so that every pass sees others. Let it make a new "
                "tensor, as x = x - mean for x -= mean."
            )


def cpu_copy(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU: existing CPU parameters are shared, parameters without values become zero."""

    def placed(tensor: Tensor) -> Tensor:
        if tensor.is_meta:  # untouched memory is not allocated
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return tensor.detach().cpu()

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(placed(parameter), parameter.requires_grad)
    for tensor in kept_tensors(model):  # also constants that are not buffers, which a model's own .cpu() does not move
        memo.setdefault(id(tensor), placed(tensor).clone())
    return model_copy(model, memo)


def _answering_tensors(network: nn.Module) -> nn.Module:
    """Make a copy return a tuple of tensors: torch.export accepts only dataclasses that it knows."""
    on_output(network, lambda _module, _inputs, output: tuple(read_tensors(output)))
    return network


def _export(network: nn.Module, images: Tensor) -> ExportedProgram:
    """Export a copy in its present mode."""
    with torch.no_grad(), same_draw(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attribute")  # tensors left on the copy are discarded with it
        example = torch.empty_like(images, device=_device_of(network))
        return torch.export.export(network, (example,), strict=False)


def _device_of(network: nn.Module) -> torch.device:
    """Return the device of a copy; the CPU if it has no tensors."""
    return next((t.device for t in (*network.parameters(), *network.buffers())), torch.device("cpu"))


def _written(node: Node) -> list[Node]:
    """Return the arguments that an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    return [v for a, v in pairs if a.alias_info is not None and a.alias_info.is_write and isinstance(v, Node)]


def _writes_view(node: Node) -> bool:
    """Return whether a node writes to a tensor that other nodes read through a view, or that is a view itself."""
    return any(v.op != "placeholder" and (_is_view(v) or len(v.users) > 1) for v in _written(node))


def _base(node: Node) -> Node:
    """Return the node whose memory a view shares."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: Node) -> bool:
    """Return whether a node's value shares the memory of another's, as an element of a split does too."""
    if str(node.target) == "<built-in function getitem>":
        return _is_view(node.args[0])
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _unread_layers(network: nn.Module, program: ExportedProgram) -> list[str]:
    """Return the names of modules whose own parameters no node reads."""
    read: set[str] = set()
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.PARAMETER and placeholders[spec.arg.name].users:
            read.add(spec.target)
    of_read = {id(network.get_parameter(name)) for name in read}
    own = ((name, [id(p) for p in module.parameters(recurse=False)]) for name, module in network.named_modules())
    return [name for name, parameters in own if parameters and of_read.isdisjoint(parameters)]


def _refusal(model: nn.Module, images: Tensor, failure: Exception) -> ValueError:
    """Return an error that states whether the model or torch.export fails on such images."""
    call = f"{type(model).__name__} on images {list(images.shape)}"
    try:
        with torch.no_grad(), same_draw():
            cpu_copy(model).eval()(torch.zeros(images.shape, dtype=images.dtype))
    except Exception as error:
        takes = ", ".join(inspect.signature(model.forward).parameters)
        return ValueError(
            f"tracing {call} failed: the model itself raises {first_line(error)}. It must run on images of this size "
            f"and channels alone, and its forward takes ({takes}): where it wants them otherwise, wrap it in a module "
            "that takes images."
        )
    if isinstance(failure, GuardOnDataDependentSymNode):
        return ValueError(
            f"tracing {call} failed: an `if`, a loop or an index of its forward depends on the values of a tensor, "
            "which torch.export cannot follow. Let the forward take one way for all images, as by torch.where."
        )
    return ValueError(
        f"tracing {call} failed: the model runs, but torch.export cannot follow it: {first_line(failure)}. Find the "
        "line by torch.export.export(model, (images,), strict=False)."
    )


def first_line(error: Exception) -> str:
    """Return an error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
