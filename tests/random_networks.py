"""Random small networks, and what must hold for each of them when it is slimmed.

    LFRNS_NETWORKS=5000 python -m pytest tests/test_random_networks.py -n 2   # in shards, gone on with where it stopped
    python tests/random_networks.py                                           # what the shards found, as a table

A network is a list of steps on a map [N, C, H, W], then heads. Steps are what people write: convolutions of all kinds,
norms, gates, chunks, slices by share and by number, rolls, cats, views, shuffles, layers used twice, attention on
tokens. Numbers of a forward lie in its `spec`, where no attribute states them, or in an attribute.
"""

import copy
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lfrns_hub as lfrns

SIDE = 8  # pixels
SHARD = 50
MOST_FLAT = 400
FOUND = Path("out") / "networks"
# What a refusal may say; anything else is an error.
SMALLEST = r"is not reachable: the smallest is macs=([\d.]+)\."
REFUSALS = ("the model has no prunable unit",)
OUTPUT = "it is the network's output"


@dataclass(frozen=True)
class Step:
    """One step: its name, the channels that it reads and gives, and numbers of its own."""

    name: str
    width: int
    out: int
    numbers: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, self.width, self.out, tuple(sorted(self.numbers.items()))))


@dataclass(frozen=True)
class Spec:
    """A network: its steps, its heads, the form of its output."""

    steps: tuple[Step, ...]
    heads: tuple[str, ...]
    form: str
    aux: bool


def act(name: str) -> nn.Module:
    return {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "prelu": nn.PReLU, "none": nn.Identity}[name]()


def norm(name: str, width: int) -> nn.Module:
    if name == "group":
        return nn.GroupNorm(2 if width % 2 == 0 else 1, width)
    return {"batch": nn.BatchNorm2d, "none": lambda _: nn.Identity(), "channels": ChannelNorm}[name](width)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv(nn.Module):
    """A convolution, a norm and an activation."""

    def __init__(self, step: Step):
        super().__init__()
        n = step.numbers
        groups = {"one": 1, "two": 2, "depthwise": step.width}[n["groups"]]
        pad = n["kernel"] // 2 if n["padded"] else 0
        self.conv = nn.Conv2d(step.width, step.out, n["kernel"], n["stride"], pad, groups=groups, bias=n["bias"])
        self.norm, self.act = norm(n["norm"], step.out), act(n["act"])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    """x + f(x), f with a width of its own inside."""

    def __init__(self, step: Step):
        super().__init__()
        inner = step.numbers["inner"]
        self.one, self.two = nn.Conv2d(step.width, inner, 3, 1, 1), nn.Conv2d(inner, step.out, 1)
        self.norm, self.act = norm(step.numbers["norm"], inner), act(step.numbers["act"])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.act(self.norm(self.one(x))))


class Gated(nn.Module):
    """Squeeze and excitation, or a gated linear unit of two halves."""

    def __init__(self, step: Step):
        super().__init__()
        self.spec, width = step, step.width
        if step.numbers["kind"] == "squeeze":
            self.down, self.up = nn.Conv2d(width, step.numbers["inner"], 1), nn.Conv2d(step.numbers["inner"], width, 1)
        else:
            self.both = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.numbers["kind"] == "squeeze":
            return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        one, two = self.both(x).chunk(2, 1)
        return one * two.sigmoid() if self.spec.numbers["kind"] == "chunk" else F.glu(torch.cat([two, one], 1), 1)


class Parts(nn.Module):
    """Splits the channels, treats one part, puts all together again."""

    def __init__(self, step: Step):
        super().__init__()
        self.spec, n = step, step.numbers
        self.first = n["first"] if n["how"] != "share" else step.width // n["of"]
        if n["stated"]:
            self.split_dim = self.first
        if n["does"] == "conv":
            self.conv = nn.Conv2d(self.first, self.first, 3, 1, 1)
        if n["how"] != "attribute":
            del self.first

    def forward(self, x: Tensor) -> Tensor:
        n = self.spec.numbers
        if n["how"] == "share":
            first = x.shape[1] // n["of"]
        elif n["stated"]:
            first = self.split_dim
        else:
            first = n["first"]
        if n["by"] == "split":
            one, two = x.split([first, x.shape[1] - first], 1)
        else:
            one, two = x[:, :first], x[:, first:]
        if n["does"] == "conv":
            one = F.relu(self.conv(one))
        elif n["does"] == "shift":
            one = F.pad(one, (1, 0))[..., :-1]
        else:
            one = one * 2
        return torch.cat([two, one] if n["swap"] else [one, two], 1)


class Move(nn.Module):
    """Data movement: rolls, flips, shuffles, and copies of the channels."""

    def __init__(self, step: Step):
        super().__init__()
        self.spec = step

    def forward(self, x: Tensor) -> Tensor:
        n = self.spec.numbers
        if n["kind"] == "roll":
            return x.roll(x.shape[1] // 2 if n["share"] else 3, 1)
        if n["kind"] == "roll space":
            return x.roll((1, -1), (2, 3))
        if n["kind"] == "flip":
            return x.flip(1)
        if n["kind"] == "twice":
            return torch.cat([x, x], 1)
        if n["kind"] == "interleave":
            return x.repeat_interleave(2, 1)
        if n["kind"] == "shuffle":
            count, width, height, side = x.shape
            return x.view(count, 2, width // 2, height, side).transpose(1, 2).reshape(count, width, height, side)
        return F.max_pool2d(x, 2, 1, 1)[..., : x.shape[2], : x.shape[3]]


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self, step: Step):
        super().__init__()
        self.conv = nn.Conv2d(step.width, step.width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.conv(x))))


class Branches(nn.Module):
    """Two convolutions of one input, added, multiplied or put side by side."""

    def __init__(self, step: Step):
        super().__init__()
        self.spec = step
        half = step.out // 2 if step.numbers["kind"] == "cat" else step.out
        self.one, self.two = nn.Conv2d(step.width, half, 3, 1, 1), nn.Conv2d(step.width, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = F.relu(self.one(x)), F.silu(self.two(x))
        return {"add": lambda: one + two, "mul": lambda: one * two, "cat": lambda: torch.cat([one, two], 1)}[
            self.spec.numbers["kind"]
        ]()


class Tokens(nn.Module):
    """A transformer block on the positions of a map: attention and an MLP, each with or without."""

    def __init__(self, step: Step):
        super().__init__()
        self.spec, n, width = step, step.numbers, step.width
        self.norm = nn.LayerNorm(width)
        self.heads, self.dim = n["heads"], 4
        if n["attention"]:
            self.qkv = nn.Linear(width, 3 * self.heads * self.dim)
            self.project = nn.Linear(self.heads * self.dim, width)
        self.up, self.down = nn.Linear(width, n["inner"]), nn.Linear(n["inner"], width)

    def forward(self, x: Tensor) -> Tensor:
        count, width, height, side = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.spec.numbers["attention"]:
            qkv = self.qkv(self.norm(tokens)).reshape(count, height * side, 3, -1, self.dim).permute(2, 0, 3, 1, 4)
            query, key, value = qkv.unbind(0)
            if self.spec.numbers["fused"]:
                mixed = F.scaled_dot_product_attention(query, key, value)
            else:
                mixed = (query @ key.transpose(-2, -1) * self.dim**-0.5).softmax(-1) @ value
            tokens = tokens + self.project(mixed.transpose(1, 2).reshape(count, height * side, -1))
        tokens = tokens + self.down(F.gelu(self.up(tokens)))
        return tokens.transpose(1, 2).reshape(count, width, height, side)


STEPS = {"conv": Conv, "residual": Residual, "gated": Gated, "parts": Parts, "move": Move, "twice": Twice,
         "branches": Branches, "tokens": Tokens}  # fmt: skip


class Network(nn.Module):
    """A network of a spec, with random weights of a seed."""

    def __init__(self, spec: Spec, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.spec = spec
        self.steps = nn.ModuleList(STEPS[step.name](step) for step in spec.steps)
        width, side = spec.steps[-1].out, map_side(spec.steps)
        self.heads = nn.ModuleList(
            nn.Linear(width * side * side, 5)
            if head == "flatten"
            else nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, 5))
            if head == "mlp"
            else nn.Linear(width, 5)
            for head in spec.heads
        )
        if spec.aux:
            self.aux = nn.Linear(spec.steps[0].out, 5)
        for module in self.modules():  # norms that are all ones hide errors
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.data.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.data.uniform_(-0.5, 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        first = None
        for step in self.steps:
            x = step(x)
            first = x if first is None else first
        outputs = []
        for name, head in zip(self.spec.heads, self.heads, strict=True):
            outputs.append(head(x.flatten(1) if name == "flatten" else x.mean((2, 3))))
        if self.spec.aux and self.training:
            outputs.append(self.aux(first.mean((2, 3))))
        if self.spec.form == "dict":
            return {f"head{number}": output for number, output in enumerate(outputs)}
        if self.spec.form == "list" or len(outputs) > 1:
            return outputs
        return outputs[0]


def map_side(steps: tuple[Step, ...]) -> int:
    """Side of the map after some steps."""
    side = SIDE
    for step in steps:
        if step.name == "conv":
            kernel, stride = step.numbers["kernel"], step.numbers["stride"]
            side = (side + 2 * (kernel // 2 if step.numbers["padded"] else 0) - kernel) // stride + 1
    return side


@st.composite
def specs(draw: Any) -> Spec:
    """Draw a network."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    steps = [first := draw_conv(pick, 3, SIDE, first=True)]
    width = first.out
    for _ in range(draw(st.integers(1, 4))):
        step = draw_step(pick, width, map_side(tuple(steps)))
        steps.append(step)
        width = step.out
    flat = width * map_side(tuple(steps)) ** 2  # a wider layer costs seconds, and shows nothing else
    heads = tuple(pick("linear", "mlp", "flatten" if flat <= MOST_FLAT else "mlp") for _ in range(pick(1, 1, 1, 2)))
    return Spec(tuple(steps), heads, pick("plain", "plain", "dict", "list"), pick(False, False, False, True))


def draw_conv(pick: Any, width: int, side: int, first: bool = False) -> Step:
    """Draw a convolution."""
    groups = "one" if first or width % 2 else pick("one", "one", "two", "depthwise")
    out = width * pick(1, 1, 2) if groups == "depthwise" else pick(8, 12, 16, 24)
    kernel = pick(1, 3) if side >= 3 else 1
    return Step("conv", width, out, {
        "groups": groups, "kernel": kernel, "stride": pick(1, 2) if side >= 4 else 1,
        "padded": side < 5 or pick(True, True, False), "bias": pick(True, False),
        "norm": pick("none", "batch", "batch", "group", "channels"), "act": pick("relu", "gelu", "silu", "prelu"),
    })  # fmt: skip


def draw_step(pick: Any, width: int, side: int) -> Step:
    """Draw a step that reads a width."""
    name = pick("conv", "conv", "residual", "gated", "parts", "move", "twice", "branches", "tokens")
    if name == "conv" or width > 48:
        return draw_conv(pick, width, side)
    if name == "residual":
        numbers = {"inner": pick(6, 8, 16), "norm": pick("none", "batch", "group"), "act": pick("relu", "gelu")}
        return Step(name, width, width, numbers)
    if name == "gated":
        return Step(name, width, width, {"kind": pick("squeeze", "chunk", "glu"), "inner": pick(4, 8)})
    if name == "parts":
        how = pick("share", "number", "attribute")
        return Step(name, width, width, {
            "how": how, "of": pick(2, 4), "first": pick(2, width // 2, width - 3), "stated": how == "attribute",
            "by": pick("slice", "split"), "does": pick("conv", "shift", "scale"), "swap": pick(False, True),
        })  # fmt: skip
    if name == "move":
        kind = pick("roll", "roll space", "flip", "twice", "interleave", "shuffle", "pool")
        if kind == "shuffle" and width % 2:
            kind = "flip"
        out = 2 * width if kind in ("twice", "interleave") else width
        return Step(name, width, out, {"kind": kind, "share": pick(True, False)})
    if name == "branches":
        return Step(name, width, pick(8, 16), {"kind": pick("add", "mul", "cat")})
    if name == "tokens":
        numbers = {
            "heads": pick(2, 3),
            "attention": pick(True, False),
            "fused": pick(True, False),
            "inner": pick(8, 16),
        }
        return Step(name, width, width, numbers)
    return Step(name, width, width)


def outputs_of(answer: Any) -> Tensor:
    """All outputs side by side."""
    parts = list(answer.values()) if isinstance(answer, dict) else answer if isinstance(answer, list) else [answer]
    return torch.cat(parts, 1)


def macs_of(model: nn.Module, images: Tensor) -> int:
    """MACs by PyTorch's own counter, attention unfused so that it sees them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(images)
    return counter.get_total_flops() // 2


def masked_dense(dense: nn.Module, groups: list[Any], keep: dict[str, list[int]]) -> nn.Module:
    """The dense network with the removed units' columns zeroed in each consumer's weight: no hook of the library's."""
    dense = copy.deepcopy(dense)
    for group in groups:
        gone = sorted(set(range(group.size)) - set(keep.get(group.name, range(group.size))))
        for tap in group.taps if gone else ():
            dense.get_submodule(tap.module).weight.data[:, tap.index[gone].flatten()] = 0
    return dense


def with_dense_statistics(
    slim: nn.Module, dense: nn.Module, groups: list[Any], keep: dict[str, list[int]]
) -> nn.Module:
    """The slim network with the dense one's BatchNorm statistics: recalibration is not what is compared."""
    slim = copy.deepcopy(slim)
    stays = {name: torch.ones(len(b), dtype=torch.bool) for name, b in dense.named_buffers() if b.ndim == 1}
    for group in groups:
        gone = sorted(set(range(group.size)) - set(keep.get(group.name, range(group.size))))
        for part in group.slices:
            if part.tensor in stays:
                stays[part.tensor][part.index[gone].flatten()] = False
    buffers = dict(dense.named_buffers())
    for name, buffer in slim.named_buffers():
        if name in stays:
            buffer.copy_(buffers[name][stays[name]])
    return slim


def try_network(spec: Spec, macs: float, seed: int) -> dict[str, Any]:
    """Slim a network and compare.

    A budget that is refused names the smallest that is not: that one must come out right.

    Returns:
        "outcome": "right" or the refusal; "units": how many there are; "frozen": how many by reason.
    Raises:
        AssertionError: It came out wrong.
    """
    dense, images = Network(spec, seed), torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    groups, frozen = None, {}
    try:
        analysis = lfrns.analyse(dense, list(images.split(4)), seed=seed, progress=False)
        groups, frozen = analysis.every, analysis.checked.frozen
        try:
            result, outcome = analysis.cut(macs=macs, fold=False, fcr_steps=2), "right"
        except ValueError as error:
            smallest = re.search(SMALLEST, str(error))
            if smallest is None:
                raise
            macs, outcome = float(smallest[1]), shorten(str(error))
            result = analysis.cut(macs=macs, fold=False, fcr_steps=2) if macs < 1 else None
        frozen = frozen | (result.report.frozen if result else {})
    except ValueError as error:
        if not any(sentence in str(error) for sentence in REFUSALS):
            raise
        result, outcome = None, shorten(str(error))
    groups = groups or lfrns.find_units(dense, images[:1])
    counted = [group for group in groups if not (group.frozen_reason or "").startswith(OUTPUT)]
    frozen = {group.name: group.frozen_reason for group in counted if group.frozen_reason} | frozen
    told = {"outcome": outcome, "units": sum(g.size for g in counted), "frozen": by_reason(counted, frozen)}
    if result is None:
        return told
    keep = result.plan.keep
    with torch.no_grad():
        slim = with_dense_statistics(result.model, dense, groups, keep)
        want, got = outputs_of(masked_dense(dense, groups, keep)(images)), outputs_of(slim(images))
    error = float((got - want).abs().max() / want.abs().max())
    assert error < 1e-4, f"slim differs from the masked dense network by {error:.1e}"
    removed = {group.name: group.size - len(keep.get(group.name, range(group.size))) for group in groups}
    share = macs_of(result.model, images[:1]) / macs_of(dense, images[:1])
    told_share = analysis.trace.cost.macs(removed) / analysis.trace.cost.macs({})
    assert abs(share - told_share) < 1e-6 and share <= macs + 1e-9, (
        f"MACs {told_share:.4f} of the ledger, {share:.4f} counted"
    )
    with tempfile.TemporaryDirectory() as folder:
        lfrns.save(result.model, Path(folder) / "slim")
        again = lfrns.load(Path(folder) / "slim", model=Network(spec, seed + 1))
    with torch.no_grad():
        assert torch.equal(outputs_of(again(images)), outputs_of(result.model(images))), "it came back as another"
    return told


def by_reason(groups: list[Any], frozen: dict[str, str]) -> dict[str, int]:
    """Units frozen, by the reason without its numbers and places."""
    units: Counter[str] = Counter()
    for group in groups:
        if group.name in frozen:
            units[shorten(frozen[group.name])] += group.size
    return dict(units)


def shorten(text: str) -> str:
    """A message without numbers, names and places."""
    text = re.sub(r" \(aten\..*|: the smallest is .*|, in `.*", "", " ".join(text.split()))
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", text)[:110]


def summary(folder: Path = FOUND) -> str:
    """What the shards found."""
    outcomes: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    units = 0
    for path in sorted(folder.glob("*.json")):
        for told in json.loads(path.read_text()):
            outcomes[told["outcome"]] += 1
            units += told["units"]
            frozen.update(told["frozen"])
    count = max(1, sum(outcomes.values()))
    lines = [f"{sum(outcomes.values())} networks, {units} units"]
    lines += [f"{100 * n / count:6.2f} %  {name}" for name, n in outcomes.most_common()]
    lines += [f"frozen: {100 * sum(frozen.values()) / max(1, units):.2f} % of the units"]
    lines += [f"{100 * n / max(1, units):6.2f} %  {name}" for name, n in frozen.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(*map(Path, sys.argv[1:])))
