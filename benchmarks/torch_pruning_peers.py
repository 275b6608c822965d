"""Torch-Pruning (VainF) as contestants, by its public API as its README and examples have it.

Fang et al. 2023, DepGraph. Layers that it cannot narrow are ignored, as a careful user would: the residual channels of
the CIFAR ResNets, whose shortcuts pad channels (it narrows both sides of the padding alike, and the model breaks).
"""

import warnings
from collections.abc import Callable
from itertools import product

import torch
from case import Absent, Case, NotSupported, contestant
from peers import accumulate_gradients, as_dense, search, trainable
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTAttention

from lfrns_hub.model_io.batches import read_logits
from lfrns_hub.models import CifarBasicBlock, CifarResNet

try:
    import torch_pruning as tp
except ImportError:
    tp = Absent("torch_pruning")

# "inner": all but the residual channels, which for a ViT are MLP neurons and head dimensions, as `--bottleneck` of its
# examples has it. Of ViTs alone: "neurons" only, "heads" (neurons and whole heads), "all" (residual channels too, the
# default of its examples).
SCOPES = ("inner", "neurons", "heads", "all")
ISOMORPHIC = [{"scope": scope, "iterative_steps": steps} for scope, steps in product(SCOPES, (1, 10))]
VARIANTS = [
    variant | {"global_pruning": together}
    for variant, together in product(ISOMORPHIC, (False, True))
    # In steps and layer by layer it takes the whole share again of the heads left, until one is left.
    if together or variant != {"scope": "heads", "iterative_steps": 10}
]


def torch_pruning(
    case: Case, importance: Callable, *, scope: str, iterative_steps: int, gradients: bool = False, **options: bool
) -> nn.Module:
    """Prune to the budget, at once or in steps along its linear schedule, of which the last one is searched."""
    model = trainable(case.dense)
    if scope != "inner" and not isinstance(model, (ViTForImageClassification, VisionTransformer)):
        raise NotSupported(f'scope "{scope}" is of ViTs alone')
    if scope != "neurons" and isinstance(model, VisionTransformer):
        raise NotSupported(f'scope "{scope}" takes a forward of its examples in place of timm\'s')
    if gradients:
        accumulate_gradients(model, case)
    found, ratio = search_ratio(case, model, importance, scope, options)
    if iterative_steps > 1:
        pruner = make_pruner(case, model, importance, scope, options, ratio, iterative_steps=iterative_steps)
        for step in range(1, iterative_steps):
            before = trainable(model)
            if gradients and step > 1:
                accumulate_gradients(model, case)
            take_step(case, model, pruner)
            if case.kept_macs(model) < case.macs:  # the schedule was made for the pruning at once
                model = before
                break
        if gradients:
            accumulate_gradients(model, case)
        found, _ = search_ratio(case, model, importance, scope, options)
    return as_dense(found, case.dense)


def search_ratio(
    case: Case, model: nn.Module, importance: Callable, scope: str, options: dict[str, bool]
) -> tuple[nn.Module, float]:
    """Search the ratio of one step; the model and its gradients stay, copies are pruned."""
    scopes = ranking_scopes(case, model, importance, scope, options)

    def prune(ratio: float, smaller: float, count: int) -> nn.Module:
        copied = trainable(model)
        few = {tuple(copied.get_submodule(name) for name in names): smaller for names in scopes[:count]}
        heads = {module: smaller for modules in few for module in modules}
        pruner = make_pruner(
            case, copied, importance, scope, options, ratio, pruning_ratio_dict=few, head_pruning_ratio_dict=heads
        )
        take_step(case, copied, pruner)
        return copied

    return search(case, prune, len(scopes))


def ranking_scopes(
    case: Case, model: nn.Module, importance: Callable, scope: str, options: dict[str, bool]
) -> list[list[str]]:
    """Return what is ranked together: a layer's name of each group, of groups of one structure or one by one."""
    isomorphic = options.get("isomorphic", False)
    if options["global_pruning"] and not isomorphic:
        return []
    pruner = make_pruner(case, model, importance, scope, options, 0.5)
    graph, names, scopes = pruner.DG, {module: name for name, module in model.named_modules()}, {}
    for number, group in enumerate(graph.get_all_groups(pruner.ignored_layers, pruner.root_module_types)):
        structure = tuple(
            (type(dep.source.module), type(dep.target.module), graph.is_out_channel_pruning_fn(dep.handler))
            for dep, _ in group
        )
        scopes.setdefault(structure if isomorphic else number, []).append(names[group[0].dep.target.module])
    return list(scopes.values())


def make_pruner(
    case: Case, model: nn.Module, importance: Callable, scope: str, options: dict, ratio: float, **more: object
) -> "tp.pruner.BasePruner":
    """Trace a model; the widths of attention are given as the ViT examples give them."""
    attentions = [module for module in model.modules() if isinstance(module, ViTAttention)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the ViT's bare parameters, whose default dimension is right
        return tp.pruner.BasePruner(
            model,
            case.example(),
            importance,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            ignored_layers=ignored_layers(model, scope),
            num_heads={p: a.num_attention_heads for a in attentions for p in (a.q_proj, a.k_proj, a.v_proj)},
            prune_num_heads=scope == "heads",
            prune_head_dims=scope != "heads",
            in_channel_groups={},
            out_channel_groups={},
            output_transform=lambda output: read_logits(output).sum(),
            **options,
            **more,
        )


def ignored_layers(model: nn.Module, scope: str) -> list[nn.Module]:
    """Return the layers whose output channels stay: the classifier's, and those that the scope leaves out."""
    if isinstance(model, CifarResNet):
        return [model.linear, model.conv1, *(m.conv2 for m in model.modules() if isinstance(m, CifarBasicBlock))]
    if isinstance(model, VisionTransformer):
        neurons = {block.mlp.fc1 for block in model.blocks}
        return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in neurons]
    if not isinstance(model, ViTForImageClassification):
        return [model.get_classifier()]
    ignored = [model.classifier]
    for layer in model.vit.layers if scope != "all" else ():
        attention = layer.attention
        ignored += [attention.o_proj, layer.mlp.fc2]
        ignored += [attention.q_proj, attention.k_proj, attention.v_proj] if scope == "neurons" else []
    return ignored if scope == "all" else [*ignored, model.vit.embeddings.patch_embeddings.projection]


def take_step(case: Case, model: nn.Module, pruner: "tp.pruner.BasePruner") -> None:
    """Prune by one step, in place; then let attention state its widths, as the ViT examples do."""
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        pruner.step()
    for attention in model.modules():
        if not isinstance(attention, ViTAttention):
            continue
        width = attention.q_proj.out_features
        if not pruner.num_heads[attention.q_proj]:  # it keeps the last heads of a layer, but counts them as gone
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                pruner.num_heads[projection] = pruner.out_channel_groups[projection] = width // attention.head_dim
        attention.num_attention_heads = pruner.num_heads[attention.q_proj]
        attention.head_dim = width // attention.num_attention_heads


@contestant("Torch-Pruning, random", "peer", VARIANTS)
def torch_pruning_random(case: Case, **variant: object) -> nn.Module:
    """Prune at random."""
    return torch_pruning(case, tp.importance.RandomImportance(), **variant)


@contestant("Torch-Pruning, L1", "peer", VARIANTS)
def torch_pruning_l1(case: Case, **variant: object) -> nn.Module:
    """Prune what has the smallest L1 norm. Source: Li et al. 2017, over the group as in Fang et al. 2023."""
    return torch_pruning(case, tp.importance.GroupMagnitudeImportance(p=1), **variant)


@contestant("Torch-Pruning, L2", "peer", VARIANTS)
def torch_pruning_l2(case: Case, **variant: object) -> nn.Module:
    """Prune what has the smallest L2 norm. Source: Fang et al. 2023, section 3.3."""
    return torch_pruning(case, tp.importance.GroupMagnitudeImportance(p=2), **variant)


@contestant("Torch-Pruning, BatchNorm scale", "peer", VARIANTS)
def torch_pruning_batchnorm(case: Case, **variant: object) -> nn.Module:
    """Prune what has the smallest BatchNorm scale. Source: Liu et al. 2017, without the sparse training."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in case.dense.modules()):
        raise NotSupported("it has no BatchNorm")
    return torch_pruning(case, tp.importance.BNScaleImportance(), **variant)


@contestant("Torch-Pruning, FPGM", "peer", VARIANTS)
def torch_pruning_fpgm(case: Case, **variant: object) -> nn.Module:
    """Prune what is nearest to the layer's other filters. Source: He et al. 2019."""
    return torch_pruning(case, tp.importance.FPGMImportance(), **variant)


@contestant("Torch-Pruning, Taylor", "peer", VARIANTS)
def torch_pruning_taylor(case: Case, **variant: object) -> nn.Module:
    """Prune what changes the loss least, to first order. Source: Molchanov et al. 2019."""
    return torch_pruning(case, tp.importance.GroupTaylorImportance(), gradients=True, **variant)


@contestant("Torch-Pruning, isomorphic", "peer", ISOMORPHIC)
def torch_pruning_isomorphic(case: Case, **variant: object) -> nn.Module:
    """Rank Taylor importance among groups of the same structure. Source: Fang et al. 2024, isomorphic pruning."""
    importance = tp.importance.GroupTaylorImportance()
    return torch_pruning(case, importance, gradients=True, global_pruning=True, isomorphic=True, **variant)
