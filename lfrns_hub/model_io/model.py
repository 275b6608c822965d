"""Models in the form of the caller: in a wrapper, in training mode, on any device, in any floating-point dtype."""

import contextlib
import ctypes
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lfrns_hub.format.narrow import model_copy

Result = TypeVar("Result")

# torch.compile keeps the module it wraps under this name; its class is in torch._dynamo, which is slow to import.
_COMPILED = "_orig_mod"
# Modules of the layers of quantised models, and of the observers of models to be quantised.
QUANTISED = (
    "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.intrinsic.qat", "torch.ao.nn.qat",
    "torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize", "torchao.", "bitsandbytes.",
)  # fmt: skip
SMALLER = (torch.float32, torch.float16, torch.bfloat16)  # than float64
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


def unwrap(model: Any, call: str) -> nn.Module:
    """Return a model without the wrappers of torch.compile, DistributedDataParallel and DataParallel.

    Args:
        model: A module, wrapped or not; the result shares its weights.
        call: The public call, for the error.
    Raises:
        TypeError: The model is not a module.
        ValueError: A module inside is compiled, or the weights are sharded, scripted, quantised, adapted by peft, or
            not initialised yet.
    """
    given = f"{call}({type(model).__name__})"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{given}: a torch.nn.Module is needed, such as timm.create_model('resnet50').")
    while True:
        if _COMPILED in model._modules:
            model = model._modules[_COMPILED]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{given}: its code is compiled. Give the module that was scripted or traced.")
    for name, module in model.named_modules():
        if _COMPILED in module._modules:
            raise ValueError(f"{given}: {name} in it is compiled. Put {name}.{_COMPILED} in its place.")
    if (found := find_quantised(model)) is not None:
        raise ValueError(
            f"{given}: {found} is quantised or prepared for it. Give the model in floating point; the slim one can be "
            "quantised."
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(f"{given}: it has adapters of peft. Merge them first: model = model.merge_and_unload().")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{given}: {name} has no shape yet. Run one batch through the model first.")
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "_is_flat_param"):
            raise ValueError(f"{given}: {name} is sharded among processes. Gather the whole model first.")
    return model


def find_quantised(model: nn.Module) -> str | None:
    """Return a layer without a floating-point weight, quantised by torch.ao, torchao, bitsandbytes or the like."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTISED) or hasattr(module, "_packed_params"):
            return f"{name} ({type(module).__name__})"
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in tensors:
            is_wrapped = is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor")
            if is_wrapped or tensor.is_quantized or ("weight" in leaf and tensor.dtype in INTEGERS):
                return f"{name} ({type(module).__name__})"
    return None


def refuse_meta(model: nn.Module, call: str) -> None:
    """Refuse a model whose weights have no values."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"{call}({type(model).__name__}): {name} is on the meta device and has no values. Load weights first, "
                "or give it any by model.to_empty(device='cpu')."
            )


@contextlib.contextmanager
def evaluating(*models: nn.Module | None, device: torch.device | None = None) -> Iterator[None]:
    """Set models to eval mode (and move them to a device); restore the mode and device of every module at the end."""
    present = [model for model in models if model is not None]
    modes = [(module, module.training) for model in present for module in model.modules()]
    homes = [(model, device_of(model)) for model in present]
    try:
        for model, home in homes:
            model.eval()
            if device is not None and home != device:
                model.to(device)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for model, home in homes:
            if device is not None and home != device:
                model.to(home)


@contextlib.contextmanager
def same_draw(seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers each time, so that two models with a random forward can be compared.

    A forward may draw from torch, numpy or Python; afterwards the state of each generator is restored.

    Example:
        >>> with same_draw():
        ...     first = torch.rand(3)
        >>> with same_draw():
        ...     print(torch.equal(torch.rand(3), first))
        True
    """
    python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(of_numpy)


def differentiated(compute: Callable[[], Result]) -> Result:
    """Run a forward and backward pass; if the forward writes to a tensor that the backward needs, keep copies.

    Args:
        compute: Both passes; it may be called a second time.
    """
    try:
        return compute()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        return compute()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype for tensors that a forward creates, so that they fit a model of that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Doubling(TorchFunctionMode):
    """Makes a forward's casts to a smaller floating-point dtype return float64, and its constants float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        name = getattr(func, "__name__", "")
        target = args[:1] if re.fullmatch(r".*[^_]_|__set.*|__i[a-z]+__", name) else ()  # it is written to: no copy
        args = [*target, *map(_doubled, args[len(target) :])]
        return func(*args, **{key: _doubled(value) for key, value in (kwargs or {}).items()})


def _doubled(value: Any) -> Any:
    """Return a tensor in float64, and float64 for a smaller dtype; any other argument unchanged."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in SMALLER else value
    if isinstance(value, Tensor):
        return value.double() if value.dtype in SMALLER else value
    return type(value)(map(_doubled, value)) if type(value) in (list, tuple) else value


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Run a float64 model whose forward creates, keeps or casts to float32 or less: these are float64 too.

    Example:
        >>> with in_double():
        ...     print(torch.zeros(1).float().to(torch.float16).dtype)
        torch.float64
    """
    with default_dtype(torch.float64), _Doubling():
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def as_input(images: Tensor, model: nn.Module) -> Tensor:
    """Move images to a model's device, and floating-point ones to its dtype."""
    return images.to(device_of(model), dtype_of(model) if images.is_floating_point() else images.dtype)


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """Return a model's fastest memory format: channels last where it has convolutions other than patch embeddings.

    Example:
        >>> memory_format_of(nn.Conv2d(3, 8, 3)), memory_format_of(nn.Conv2d(3, 8, 16, stride=16))
        (torch.channels_last, torch.contiguous_format)
    """
    convolves = any(isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules())
    return torch.channels_last if convolves else torch.contiguous_format


def in_channels_last(model: nn.Module) -> bool:
    """Return whether a model's convolution weights are in channels_last."""
    weights = [p for p in model.parameters() if p.ndim == 4]
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


def laid_out(images: Tensor, model: nn.Module) -> Tensor:
    """Return images [N, C, H, W] in the model's memory format; any other input unchanged."""
    if images.ndim != 4:
        return images
    return images.contiguous(memory_format=torch.channels_last if in_channels_last(model) else torch.contiguous_format)


def settle_layout(images: Tensor, *models: nn.Module | None) -> None:
    """Make models contiguous again whose forward fails in channels_last, for example by a view of a map as a row.

    Args:
        images: [N, C, H, W]; one of them is run.
        models: In any mode; None is ignored.
    """

    def runs(model: nn.Module) -> bool:
        try:
            with evaluating(model), torch.no_grad(), same_draw():
                model(as_input(laid_out(images[:1], model), model))
        except RuntimeError:
            return False
        return True

    for model in models:
        if model is not None and in_channels_last(model) and not runs(model):
            model.to(memory_format=torch.contiguous_format)
            if not runs(model):  # another error, which the caller will see
                model.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def laid_out_models(*models: nn.Module | None) -> Iterator[None]:
    """Keep models in the format of `memory_format_of`; restore those that had another at the end."""
    moved = []
    for model in models:
        if model is not None and memory_format_of(model) == torch.channels_last:
            came = all(p.is_contiguous() for p in model.parameters())
            moved += [model] if came else []
            model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for model in moved:
            model.to(memory_format=torch.contiguous_format)


def return_memory() -> None:
    """Return freed memory to the system where the C library keeps it: large tensors do not fit into its gaps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if trim:
        trim(0)


def analysis_copy(model: nn.Module, device: Any) -> nn.Module:
    """Copy a model for the analysis: on the device, in eval mode, float32 or better, with no trainable weights.

    A convnet's kernels are channels last, in which convolutions run up to three times as fast.
    """
    dense = model_copy(model).to(device=device, dtype=torch.promote_types(dtype_of(model), torch.float32))
    dense.to(memory_format=memory_format_of(dense)).zero_grad(set_to_none=True)
    return dense.eval().requires_grad_(False)


def typed_as(result: nn.Module, model: nn.Module) -> nn.Module:
    """Set each tensor of a slim model to its dense dtype and layout, each parameter to its requires_grad, in place."""
    dense = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dense[name].dtype if name in dense else dtype_of(model))
        if name not in dense or dense[name].is_contiguous():
            # With one channel every format counts as contiguous, and kernels are chosen by the strides.
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(dense[name].requires_grad if name in dense else True)
    return result
