"""Export of a model to one file that runs without its Python: ONNX or torch.export archive, checked against PyTorch."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lfrns_hub.format.narrow import model_copy
from lfrns_hub.model_io.batches import read_logits
from lfrns_hub.model_io.model import refuse_meta, unwrap
from lfrns_hub.runs import draft_of, locked, rename_synced

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4  # of the largest output: another library's kernels sum in another order
EXAMPLE_IMAGES = 2  # torch.export treats a batch of one as a constant
CHECKED_IMAGES = 3  # another number, to detect a batch size that became a constant


@dataclass
class Export:
    """Result of an export.

    Attributes:
        path: The file.
        format: "onnx" or "pt2".
        size_mb: Size of the file, 1e6 bytes.
        largest_error: Largest difference from PyTorch over the largest output; None if no runtime for it is installed.
        any_batch: Whether it accepts any number of images; else only EXAMPLE_IMAGES.
    """

    path: Path
    format: str
    size_mb: float
    largest_error: float | None
    any_batch: bool


class Logits(nn.Module):
    """A model that returns only its logits, for any library."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return read_logits(self.model(images))


def export(model: nn.Module, path: str | Path, example_input: Tensor, *, format: str = "onnx") -> Export:
    """Write a model as an ONNX file or a torch.export archive, and compare it with PyTorch before it is put in place.

    The input is called "images", the output "logits". Weights are written in float32 whatever their dtype.

    Args:
        model: Slim or dense, of any library; untouched. Wrappers of torch.compile and DDP are removed.
        path: The file to write; an existing one is replaced.
        example_input: Images [N, C, H, W]; only the shape of one image is used.
        format: "onnx" (needs the extra `export`) or "pt2".
    Returns:
        The file, and its difference from PyTorch. ONNX is compared if onnxruntime is installed.
    Raises:
        ValueError: Another format or extension, a model that cannot be exported, or a file with other outputs.
        ImportError: The format is ONNX, and its packages are not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"export(format={format!r}): the formats are {' and '.join(FORMATS)}. Leave it out for onnx.")
    if Path(path).suffix != f".{format}":
        raise ValueError(f"export({str(path)!r}, format={format!r}): the file's name must end in .{format}.")
    if format == "onnx":
        require("onnx", "onnxscript")
    model = unwrap(model, "export")
    refuse_meta(model, "export")
    model, path = Logits(model_copy(model).cpu().float()).eval().requires_grad_(False), Path(path)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(CHECKED_IMAGES, *example_input.shape[1:], generator=generator)
    call = f"export({type(model.model).__name__}, format={format!r})"
    with _said(call):
        batches = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(model, (images[:EXAMPLE_IMAGES],), dynamic_shapes=batches, strict=False)
    shape = next(node.meta["val"] for node in program.graph.nodes if node.name == "images").shape
    any_batch = not str(shape[0]).isdigit()  # a size found to be constant is still a symbol, but prints as a number
    images = images if any_batch else images[:EXAMPLE_IMAGES]
    with locked(path, call), draft_of(path.resolve()) as folder:
        draft = folder / path.name
        with _said(call):
            _write(program, draft)
            runner = open_runner(draft)
        with torch.no_grad():
            error = None if runner is None else largest_error(runner(images), model(images))
        if error is not None and not error <= TOLERANCE:  # NaN counts as wrong
            raise ValueError(
                f"{call}: its answers differ from PyTorch's by {error:.1e} of the largest, {TOLERANCE:g} are allowed. "
                "Nothing was written; try the other format."
            )
        rename_synced(draft, path)
    return Export(path, format, path.stat().st_size / 1e6, error, any_batch)


def _write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program in the format given by the file's name."""
    if path.suffix == ".onnx":
        # One file: separate weights would be lost when the file is moved.
        options = {"input_names": ["images"], "output_names": ["logits"], "external_data": False, "verbose": False}
        torch.onnx.export(program, (), str(path), dynamo=True, **options)
    else:
        torch.export.save(program, path)


@contextmanager
def _said(call: str) -> Iterator[None]:
    """Convert errors of the exporters, which have a dozen types, into one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{call}: torch cannot export it: {reason}") from error


def open_runner(path: Path, *, threads: int | None = None) -> Callable[[Tensor], Tensor] | None:
    """Open a file from `export`, as a function from float32 images [N, C, H, W] on the CPU to logits.

    Args:
        path: The file; its name ends in .onnx or .pt2.
        threads: Threads of onnxruntime; default: its own choice.
    Returns:
        The function; None for ONNX without onnxruntime.
    """
    if path.suffix != ".onnx":
        return torch.export.load(path).module()
    if not installed("onnxruntime"):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Read as bytes: the file may be moved while the session is open.
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def largest_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; infinite if the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(*packages: str) -> None:
    """Refuse to continue without packages of the extra `export`.

    Raises:
        ImportError: A package is missing.
    """
    missing = [package for package in packages if not installed(package)]
    if missing:
        raise ImportError(
            f"ONNX needs {', '.join(missing)}: pip install 'lfrns_hub[export]'. --format pt2 needs nothing."
        )
