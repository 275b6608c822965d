"""What is exported answers as PyTorch does, whatever the batch; what does not is never put in place."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from lfrns_hub.runtimes import export as module
from lfrns_hub.runtimes.bench import bench, format_timings, peak_memory, size_on_disk
from lfrns_hub.runtimes.export import export, open_runner
from lfrns_hub.zoo import create_skeleton

IMAGES = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A network that answers as transformers' do."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.head(self.first(pixel_values).relu().mean((2, 3))))


class OfTwo(Net):
    """Counts its images in Python, so that the graph fits no other number."""

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return super().forward(torch.stack(list(pixel_values)))


def test_an_archive_gives_the_logits_of_any_batch_in_float32(tmp_path: Path) -> None:
    model = Net().eval().bfloat16()
    done = export(model, tmp_path / "sub" / "m.pt2", IMAGES, format="pt2")
    assert done.any_batch
    assert done.largest_error <= 1e-6
    assert done.size_mb == (tmp_path / "sub" / "m.pt2").stat().st_size / 1e6
    images = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(open_runner(done.path)(images), Net.forward(model.float(), images).logits)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["m.pt2"]


def test_a_model_that_fixes_its_batch_is_exported_with_that_one(tmp_path: Path) -> None:
    done = export(OfTwo().eval(), tmp_path / "m.pt2", IMAGES, format="pt2")
    assert not done.any_batch
    assert open_runner(done.path)(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_what_torch_cannot_trace_is_one_line(tmp_path: Path) -> None:
    class Refuses(Net):
        def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
            raise OSError("no\nway")

    with pytest.raises(ValueError, match=r"export\(Refuses, format='pt2'\): torch cannot export it: no$"):
        export(Refuses(), tmp_path / "m.pt2", IMAGES, format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_answers_otherwise_is_refused_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.pt2").write_text("earlier")
    monkeypatch.setattr(module, "open_runner", lambda path: lambda images: torch.full((len(images), 5), float("nan")))
    with pytest.raises(ValueError, match=r"Net, format='pt2'\): its answers differ .* nan"):
        export(Net().eval(), tmp_path / "m.pt2", IMAGES, format="pt2")
    assert (tmp_path / "m.pt2").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_formats_endings_and_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"format='tflite'\): the formats are onnx and pt2"):
        export(Net(), tmp_path / "m.tflite", IMAGES, format="tflite")
    with pytest.raises(ValueError, match=r"m\.bin', format='onnx'\): .* end in \.onnx"):
        export(Net(), tmp_path / "m.bin", IMAGES)
    monkeypatch.setattr(module, "installed", lambda package: package != "onnxscript")
    with pytest.raises(ImportError, match=r"onnxscript: pip install 'lfrns_hub\[export\]'"):
        export(Net(), tmp_path / "m.onnx", IMAGES)


def test_onnx_is_compared_in_onnxruntime_and_timed_beside_eager(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done = export(Net(4).eval(), tmp_path / "m.onnx", IMAGES)
    assert done.any_batch
    assert done.largest_error <= 1e-5
    found = bench(Net(4), Net(8), IMAGES, batches=(1, 3), runs=3, warmup=1)
    timings = found.timings
    runtimes = (
        ["eager", "onnxruntime"] if "compiled, batch 1" in found.left_out else ["eager", "compiled", "onnxruntime"]
    )
    assert [(one.runtime, one.batch) for one in timings] == [(name, batch) for name in runtimes for batch in (1, 3)]
    assert all(one.slim_images_s == 1000 * one.batch / one.slim_ms[0] for one in timings)
    assert all(0 < one.ratio[1] <= one.ratio[0] <= one.ratio[2] for one in timings)
    assert format_timings(timings, "Net").row_count == len(timings)


def test_bench_leaves_out_what_does_not_compile_or_export_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **options: object) -> None:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(torch, "compile", refuses)
    monkeypatch.setattr("lfrns_hub.runtimes.bench.installed", lambda package: package == "onnx")
    found = bench(Net(4), Net(8), IMAGES, batches=(2,), runs=1, warmup=0)
    assert [one.runtime for one in found.timings] == ["eager"]
    assert found.left_out["compiled, batch 2"] == "RuntimeError: no compiler"
    assert found.left_out["onnxruntime"].startswith("onnxscript, onnxruntime not installed: pip install")
    monkeypatch.setattr("lfrns_hub.runtimes.bench.installed", lambda package: True)
    monkeypatch.setattr("lfrns_hub.runtimes.bench.export", refuses)
    found = bench(Net(4), Net(8), IMAGES, batches=(2,), runs=1, warmup=0)
    assert found.left_out["onnxruntime"] == "RuntimeError: no compiler"


def test_peak_memory_holds_the_weights_and_grows_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["cifar_resnet20"], [3, 256, 256], [1, 16]
    peaks = peak_memory("lfrns_hub.zoo:create_skeleton", *arguments, device="cpu", dtype="float32")
    weights_mb, map_mb = size_on_disk(create_skeleton("cifar_resnet20")), 16 * 256 * 256 * 4 / 1e6
    assert peaks[1] >= 0.99 * weights_mb
    assert peaks[16] > 16 * map_mb
    assert peaks[16] > 4 * peaks[1]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # a process that fails
    assert peak_memory("lfrns_hub.zoo:create_skeleton", *arguments, device="cpu", dtype="float32") is None


def test_peak_memory_leaves_out_what_the_first_pass_alone_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lasting.py").write_text(
        """
import torch

class Net(torch.nn.Linear):
    def forward(self, images):
        if not hasattr(self, "table"):
            self.table = torch.ones(25_000_000)  # 100 MB
        return super().forward(images)

def build():
    return Net(8, 8)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    peaks = peak_memory("lasting:build", [], [8], [1], device="cpu", dtype="float32")
    assert 0 < peaks[1] < 50


def test_a_bench_stops_when_its_seconds_are_over_and_compiles_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfrns_hub.runtimes.bench.installed", lambda package: False)
    passes = []
    dense = Net(8)
    dense.register_forward_hook(lambda *_: passes.append(1))
    runtimes = ("eager", "onnxruntime")
    found = bench(Net(4), dense, IMAGES, batches=(1,), runs=1000, warmup=1000, seconds=0.0, runtimes=runtimes)
    assert [one.runtime for one in found.timings] == ["eager"]
    assert list(found.left_out) == ["onnxruntime"]
    assert len(passes) == 1 + 5  # one to warm up, five timed


def test_bench_refuses_what_it_cannot_time() -> None:
    with pytest.raises(ValueError, match=r"batches=\[0\], runs=30"):
        bench(Net(), Net(), IMAGES, batches=[0])
    with pytest.raises(ValueError, match=r"batches=\[1\], runs=0"):
        bench(Net(), Net(), IMAGES, batches=[1], runs=0)
