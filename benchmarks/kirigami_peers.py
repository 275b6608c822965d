"""torch-kirigami (ZaberKo) as contestants, by its public API as its documentation and example workflows have it.

Its package scores (magnitude, Taylor), analyses dependencies, plans and cuts. FPGM, VBP and OSSCAR are example scripts
of its source distribution (examples/workflows, 0.2.1) for ImageNet models of torchvision; here they are written anew on
its API, with the scripts' settings but the widths' multiple of 8, and all calibration images. Its budgets are of
parameters and channels: the search for the MACs is ours. It narrows here what its workflows narrow, the inner channels
of residual blocks, MLP neurons and attention heads; in networks without residual additions, all that it finds.

N rows, I input channels, P places of a kernel, O outputs.
"""

from functools import cached_property, lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from case import Absent, Case, NotSupported, contestant
from peers import accumulate_gradients, as_dense, input_moments, lowest, search, shift_bias, trainable
from torch import Tensor, nn
from transformers import ViTForImageClassification

from lfrns_hub.models import CifarBasicBlock, CifarResNet, CifarVGG

try:
    from torch_kirigami import AxisRef, DependencyGraph
    from torch_kirigami.pruning import (
        Candidate,
        ChannelRatio,
        GroupMagnitude,
        PlanningContext,
        Pruner,
        WeightTaylor,
    )
except ImportError:
    AxisRef = DependencyGraph = Candidate = ChannelRatio = Absent("torch_kirigami")
    GroupMagnitude = PlanningContext = Pruner = WeightTaylor = Absent("torch_kirigami")

SCORES_A_CALL = 32  # as many impacts as it remembers, so that none is worked out twice
CALIBRATION_ROWS = 4096  # of a batch; this and the next three are the defaults of its OSSCAR workflow
DAMPING = 0.01
PRUNE_BATCH = 8
SWAP_STEPS = 5

WIDTHS = [{"widths": "local"}, {"widths": "global"}]
# Three rounds, as its iterative workflow has them, each with scores of its own. `heads` is of ViTs.
VARIANTS = [*WIDTHS, {"widths": "global", "rounds": 3}, {"widths": "local", "heads": True}]
VARIANTS += [{"widths": "global", "heads": True}, {"widths": "global", "heads": True, "rounds": 3}]


class TraceableViT(nn.Module):
    """The layers of a transformers ViT in a form that FX traces; the stock model's own modules, so cut with it."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.layers = model.vit.layers

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the layers make of embeddings [N, T, C]."""
        for layer in self.layers:
            attention, x = layer.attention, layer.layernorm_before(hidden)
            query, key, value = (
                projection(x).reshape(x.size(0), x.size(1), -1, attention.head_dim).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            x = F.scaled_dot_product_attention(query, key, value)
            hidden = hidden + attention.o_proj(x.transpose(1, 2).reshape(x.size(0), x.size(2), -1))
            mlp, x = layer.mlp, layer.layernorm_after(hidden)
            hidden = hidden + mlp.fc2(mlp.activation_fn(mlp.fc1(x)))
        return hidden


class Traced:
    """A model with its dependency graph; it stays as it is, and copies of it are cut.

    Attributes:
        model: The stock model.
        graph, pruner: Kirigami's, of what it traces of the model.
    """

    def __init__(self, model: nn.Module, case: Case) -> None:
        self.model = model
        example = case.example()
        if isinstance(model, ViTForImageClassification):
            example = model.vit.embeddings(example).detach()
        self.graph = DependencyGraph.build(traceable(model), args=(example,))
        self.pruner = Pruner(self.graph.model, graph=self.graph)

    @cached_property
    def axes(self) -> dict[AxisRef, list[Candidate]]:
        """The units that may leave, of each axis."""
        space = self.pruner.discover_candidates(targets=targets(self.model))
        axes: dict[AxisRef, list[Candidate]] = {axis: [] for axis in space.channel_axes}
        for candidate in space.candidates:
            axes[candidate.axis].append(candidate)
        return axes

    @cached_property
    def heads(self) -> dict[AxisRef, list[Candidate]]:
        """The heads of each attention, on its query's head axis, as kirigami's workflow for ViTs has it."""
        queries = [o for o in self.graph.operations() if o.node.target is F.scaled_dot_product_attention]
        axes = {query.node.name: query.argument("query", 0).axis(1) for query in queries}
        return {
            axis: [Candidate(f"{name}:{i:04d}", (axis.select([i]),), axis) for i in range(axis.tensor.shape[1])]
            for name, axis in axes.items()
        }

    def axis(self, module: str) -> AxisRef:
        """Return the output axis of a module, by its name in the stock model."""
        return self.graph.parameter(f"{module.removeprefix('vit.')}.weight").axis(0)

    def stock_name(self, axis: AxisRef) -> str:
        """Return the name in the stock model of the module of an output axis."""
        name = axis.tensor.paths[0].removesuffix(".weight")
        return f"vit.{name}" if isinstance(self.model, ViTForImageClassification) else name


def traceable(model: nn.Module) -> nn.Module:
    """Return what kirigami traces: the model itself, or a ViT's layers."""
    return TraceableViT(model) if isinstance(model, ViTForImageClassification) else model


def targets(model: nn.Module) -> list[str] | None:
    """Return the modules whose outputs may leave, by kirigami's names; None for all that it finds."""
    if isinstance(model, ViTForImageClassification):
        return ["layers.*.mlp.fc1"]
    if isinstance(model, CifarResNet):
        return [f"{name}.conv1" for name, module in model.named_modules() if isinstance(module, CifarBasicBlock)]
    return None


@lru_cache(maxsize=1)
def traced_dense(case: Case) -> Traced:
    """Trace the dense model once for all contestants of a case: it may take a minute."""
    return Traced(trainable(case.dense), case)


@lru_cache(maxsize=2)
def dense_scores(case: Case, metric: type) -> list[Tensor]:
    """Score the units of the dense model once for all variants."""
    return score(case, traced_dense(case), metric)


def score(case: Case, traced: Traced, metric: type) -> list[Tensor]:
    """Score the units of each axis by a metric of kirigami, heads last: one tensor [U] an axis."""
    if metric is WeightTaylor:
        accumulate_gradients(traced.model, case)
    axes = traced.axes | traced.heads
    candidates = [candidate for axis in axes.values() for candidate in axis]
    context = PlanningContext(traced.graph, candidates, ChannelRatio(0.0), tuple(axes), traced.pruner.constraints)
    scorer, scores = metric(), []
    for axis in axes.values():
        calls = [tuple(axis[i : i + SCORES_A_CALL]) for i in range(0, len(axis), SCORES_A_CALL)]
        scores.append(torch.tensor([s for call in calls for s in context.score(scorer, call)], dtype=torch.float64))
    return scores


def prune(traced: Traced, removed: dict[AxisRef, list[int]]) -> nn.Module:
    """Cut the units with these indices from a copy of the traced model."""
    plan = traced.pruner.plan_remove([axis.select(gone) for axis, gone in removed.items() if gone])
    model = trainable(traced.model)
    Pruner(traceable(model)).apply(plan)
    if isinstance(model, ViTForImageClassification):
        for layer in model.vit.layers:
            layer.attention.num_attention_heads = layer.attention.q_proj.out_features // layer.attention.head_dim
    return model


def cut_lowest(traced: Traced, scores: list[Tensor], widths: str, *shares: float) -> nn.Module:
    """Cut the units of lowest score: the static ranking that its `Greedy` takes one by one."""
    removed = lowest(scores, *shares, together=widths == "global")
    return prune(traced, dict(zip([*traced.axes, *traced.heads], removed, strict=False)))


def search_ranked(case: Case, traced: Traced, scores: list[Tensor], widths: str) -> tuple[nn.Module, float]:
    """Search the ratio of units of lowest score to cut."""
    layers = len(scores) if widths == "local" else 0
    return search(case, lambda *shares: cut_lowest(traced, scores, widths, *shares), layers)


def by_metric(case: Case, metric: type, widths: str, rounds: int = 1, heads: bool = False) -> nn.Module:
    """Prune by a metric of kirigami, at once or in rounds of which the last one is searched."""
    traced = traced_dense(case)
    if heads and not traced.heads:
        raise NotSupported("it has no attention heads")
    scored = len(traced.axes) + (len(traced.heads) if heads else 0)
    scores = dense_scores(case, metric)[:scored]
    found, whole = search_ranked(case, traced, scores, widths)
    for before, now in pairwise([whole * done / rounds for done in range(rounds)]):
        share = (now - before) / (1 - before)  # of the units left
        model = cut_lowest(traced, scores, widths, share, share, 0)
        if case.kept_macs(model) < case.macs:  # the rounds were made for the pruning at once
            break
        traced = Traced(model, case)
        scores = score(case, traced, metric)[:scored]
    if rounds > 1:
        found, _ = search_ranked(case, traced, scores, widths)
    return as_dense(found, case.dense)


@contestant("torch-kirigami, magnitude", "peer", VARIANTS)
def kirigami_magnitude(case: Case, **variant: object) -> nn.Module:
    """Cut the least energy over a unit's group, relative to its axis. Source: Fang et al. 2023, section 3.3."""
    return by_metric(case, GroupMagnitude, **variant)


@contestant("torch-kirigami, Taylor", "peer", VARIANTS)
def kirigami_taylor(case: Case, **variant: object) -> nn.Module:
    """Cut what changes the loss least, to first order. Source: Molchanov et al. 2019."""
    return by_metric(case, WeightTaylor, **variant)


@contestant("torch-kirigami, FPGM", "peer", WIDTHS)
def kirigami_fpgm(case: Case, widths: str) -> nn.Module:
    """Cut the filters nearest to the others of their layer. Source: He et al. 2019, by its workflow's metric."""
    traced = traced_dense(case)
    layers = [traced.model.get_submodule(traced.stock_name(axis)) for axis in traced.axes]
    filters = [layer.weight.detach().double().flatten(1) for layer in layers]
    scores = [torch.cdist(rows, rows).sum(1).cpu() for rows in filters]
    return as_dense(search_ranked(case, traced, scores, widths)[0], case.dense)


@contestant("torch-kirigami, VBP", "peer", WIDTHS)
def kirigami_vbp(case: Case, widths: str) -> nn.Module:
    """Cut the MLP neurons that vary least, their mean into the bias. Source: Berisha et al. 2025, by its workflow.

    The workflow ranks all neurons together ("global"), by the raw variance.
    """
    if not isinstance(case.dense, ViTForImageClassification):
        raise NotSupported("its VBP takes dense MLPs alone, not padded convolutions")
    traced, pairs = traced_dense(case), linear_pairs(case.dense)
    moments = input_moments(case.dense, pairs.values(), case)
    scores = [moments[consumer][1].cpu() for consumer in pairs.values()]

    def attempt(ratio: float, smaller: float, count: int) -> nn.Module:
        removed = lowest(scores, ratio, smaller, count, together=widths == "global")
        model = prune(traced, {traced.axis(name): gone for name, gone in zip(pairs, removed, strict=True)})
        for name, gone in zip(pairs.values(), removed, strict=True):
            shift_bias(model.get_submodule(name), case.dense.get_submodule(name), moments[name][0], gone)
        return model

    return as_dense(search(case, attempt, len(pairs) if widths == "local" else 0)[0], case.dense)


@contestant("torch-kirigami, OSSCAR", "peer")
def kirigami_osscar(case: Case) -> nn.Module:
    """Choose inputs and weights of each layer by least squares on the dense layer's outputs, layer after layer.

    Source: Meng et al. 2024, OSSCAR, by its workflow: the same share of each layer, groups of 8 deleted at once, then
        up to 5 swaps, weights drawn a little to the dense ones.
    """
    traced, pairs = traced_dense(case), linear_pairs(case.dense)
    alike = [torch.zeros(len(case.dense.get_submodule(producer).weight)) for producer in pairs]

    def attempt(ratio: float, smaller: float, count: int) -> nn.Module:
        removed = lowest(alike, ratio, smaller, count, together=False)
        return prune(traced, {traced.axis(name): gone for name, gone in zip(pairs, removed, strict=True)})

    narrow, _ = search(case, attempt, len(pairs))
    model = trainable(case.dense)
    for producer, consumer in pairs.items():
        keep = len(narrow.get_submodule(producer).weight)
        if keep < len(case.dense.get_submodule(producer).weight):
            model = reconstruct(case, model, producer, consumer, keep)
    return as_dense(model, case.dense)


def linear_pairs(model: nn.Module) -> dict[str, str]:
    """Return producers and the one consumer of each, of the same kind, nothing but channelwise layers between them."""
    names = {module: name for name, module in model.named_modules()}
    if isinstance(model, ViTForImageClassification):
        return {names[layer.mlp.fc1]: names[layer.mlp.fc2] for layer in model.vit.layers}
    if isinstance(model, CifarResNet):
        return {names[m.conv1]: names[m.conv2] for m in model.modules() if isinstance(m, CifarBasicBlock)}
    if isinstance(model, CifarVGG):
        convs = [names[module] for module in model.features if isinstance(module, nn.Conv2d)]
        return dict(pairwise(convs)) | {names[model.fc1]: names[model.linear]}
    raise NotSupported("its OSSCAR takes unbranched chains of convolutions or of linear layers alone")


def reconstruct(case: Case, model: nn.Module, producer: str, consumer: str, keep: int) -> nn.Module:
    """Cut a producer to `keep` channels, with the weights of its consumer that come nearest to the dense outputs."""
    layer = model.get_submodule(consumer)
    gram, cross = design(case, model, consumer)
    original = layer.weight.detach().double().flatten(1).T
    ridge = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).eps)
    gram.diagonal().add_(ridge)
    kept, weights = choose_inputs(gram, cross + ridge * original, layer.weight[0, 0].numel(), keep)
    traced = Traced(model, case)
    slim = prune(traced, {traced.axis(producer): sorted(set(range(layer.weight.shape[1])) - set(kept))})
    with torch.no_grad():
        new = slim.get_submodule(consumer).weight
        new.copy_(weights.T.reshape(new.shape))
    return slim


class _Reached(Exception):
    """The layer that is watched has run; what follows it is not needed."""


@torch.no_grad()
def layer_rows(model: nn.Module, consumer: str, images: Tensor, dense: bool) -> Tensor:
    """Give evenly spaced rows of one layer: inputs under the kernel [N, I P] or, of the dense model, outputs [N, O]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        places = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output  # [n, L, O]
        total = places[..., 0].numel()
        count = min(CALIBRATION_ROWS, total)
        rows = torch.arange(count, device=output.device) * total // count
        if dense:
            bias = 0 if module.bias is None else module.bias
            seen.append((places - bias).flatten(0, -2)[rows])
        elif output.ndim == 4:
            options = {"padding": module.padding, "stride": module.stride, "dilation": module.dilation}
            for image in (rows // places.shape[1]).unique_consecutive().tolist():
                here = rows[rows // places.shape[1] == image] % places.shape[1]
                seen.append(F.unfold(inputs[0][image : image + 1], module.kernel_size, **options)[0].T[here])
        else:
            seen.append(inputs[0].flatten(0, -2)[rows])
        raise _Reached

    hook = model.get_submodule(consumer).register_forward_hook(keep)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return torch.cat(seen).double()


def design(case: Case, model: nn.Module, consumer: str) -> tuple[Tensor, Tensor]:
    """Return the mean products of a layer's inputs with themselves [I P, I P] and with the dense outputs [I P, O]."""
    gram, cross, count = 0, 0, 0
    for images, _ in case.batches():
        inputs = layer_rows(model, consumer, images, dense=False)
        outputs = layer_rows(case.dense, consumer, images, dense=True)
        gram, cross, count = gram + inputs.T @ inputs, cross + inputs.T @ outputs, count + len(inputs)
    return gram / count, cross / count


def choose_inputs(gram: Tensor, cross: Tensor, places: int, keep: int) -> tuple[list[int], Tensor]:
    """Choose channels for least squares: delete the cheapest, then swap one at a time while that is better.

    Args:
        gram, cross: Mean products of inputs, [I P, I P], and with the wanted outputs, [I P, O]; P places a channel.
    Returns:
        The channels kept, ascending, and their weights [keep P, O].
    """

    def rows(channels: list[int]) -> Tensor:
        start = torch.tensor(channels, device=gram.device)[:, None] * places
        return (start + torch.arange(places, device=gram.device)).flatten()

    def solve(channels: list[int]) -> tuple[Tensor, Tensor]:
        index = rows(channels)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[index[:, None], index]))
        return inverse @ cross[index], inverse

    def costs(weights: Tensor, inverse: Tensor) -> Tensor:
        count = len(weights) // places
        blocks = inverse.reshape(count, places, count, places).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        grouped = weights.reshape(count, places, -1)
        return (grouped * torch.linalg.solve(blocks, grouped)).sum((1, 2))

    def delete(weights: Tensor, inverse: Tensor, leave: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        stay = [i for i in range(len(weights) // places) if i not in set(leave)]
        r, q = rows(stay), rows(leave)
        factor = torch.linalg.solve(inverse[q[:, None], q], inverse[q[:, None], r]).T  # [r, q]
        return weights[r] - factor @ weights[q], inverse[r[:, None], r] - factor @ inverse[q[:, None], r], stay

    def gain(channels: list[int], weights: Tensor) -> float:
        return float((weights * cross[rows(channels)]).sum())

    kept = list(range(len(gram) // places))
    weights, inverse = solve(kept)
    while len(kept) > keep:
        leave = costs(weights, inverse).argsort(stable=True)[: min(PRUNE_BATCH, len(kept) - keep)].tolist()
        weights, inverse, stay = delete(weights, inverse, leave)
        kept = [kept[i] for i in stay]
    weights, inverse = solve(kept)
    for _ in range(SWAP_STEPS):
        fewer_weights, fewer_inverse, stay = delete(weights, inverse, [int(costs(weights, inverse).argmin())])
        fewer = [kept[i] for i in stay]
        absent = sorted(set(range(len(gram) // places)) - set(fewer))
        q, r = rows(absent), rows(fewer)
        coupling = gram[q[:, None], r]
        explained = (coupling @ fewer_inverse).reshape(len(absent), places, -1)
        blocks = gram[q.reshape(-1, places, 1), q.reshape(-1, 1, places)]
        blocks = blocks - explained @ coupling.reshape(len(absent), places, -1).transpose(1, 2)
        rest = (cross[q] - coupling @ fewer_weights).reshape(len(absent), places, -1)
        restored = absent[int((rest * torch.linalg.solve(blocks, rest)).sum((1, 2)).argmax())]
        proposal = sorted([*fewer, restored])
        new_weights, new_inverse = solve(proposal)
        if proposal == kept or gain(proposal, new_weights) <= gain(kept, weights) * (1 + 1e-10):
            break
        kept, weights, inverse = proposal, new_weights, new_inverse
    return kept, weights
