"""What loading and running a slim model does without, and what a checkpoint is saved without."""

import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "v1"
BLOCKED = ("datasets", "matplotlib", "rich", "scipy", "sklearn", "typer")
# Where `find_spec` finds nothing the libraries that ask for it go without, as where it is not installed.
PROGRAM = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        blocked = name.partition(".")[0] in {blocked}
        return None if blocked else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
import lfrns_hub
from safetensors.torch import load_file

def answer(model, images):
    output = model.eval()(images)
    return output if isinstance(output, torch.Tensor) else output.logits

for folder, copy in zip(sys.argv[1::2], sys.argv[2::2]):
    saved = load_file(folder + "/answers.safetensors")
    with torch.no_grad():
        for source in (folder, copy):
            model = lfrns_hub.load(source)
            torch.testing.assert_close(answer(model, saved["images"]), saved["logits"], atol=1e-5, rtol=0)
            lfrns_hub.save(model, copy, overwrite=True)
try:
    import {gone}
except ModuleNotFoundError:
    print("without {gone}")
"""


def test_slim_models_load_run_and_save_without_what_only_analysis_needs(tmp_path: Path) -> None:
    program = PROGRAM.replace("{blocked}", repr(BLOCKED)).replace("{gone}", "matplotlib")
    kinds = ("timm", "transformers")
    folders = [str(folder) for kind in kinds for folder in (GOLDEN / kind, tmp_path / kind)]
    done = subprocess.run(
        [sys.executable, "-c", program, *folders], cwd=GOLDEN.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "without matplotlib"  # of other tools in the environment some print too
    assert "no pictures: matplotlib is not installed" in done.stderr
    assert all((tmp_path / kind / "README.md").is_file() for kind in kinds)
