"""The CIFAR networks of the pruning literature, registered with timm: 32x32 input, any number of classes."""

from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, cat, nn

# Channel statistics of ImageNet: what the published CIFAR ResNets (akamaster/pytorch_resnet_cifar10) were trained with.
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _CifarNet(nn.Module):
    """Head, pooling and initialisation that the CIFAR networks share; `linear` is the classifier."""

    def _set_head(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.global_pool, self.linear = create_classifier(num_features, num_classes, pool_type=global_pool)

    def _init_weights(self) -> None:
        """Initialise every conv and linear as in He et al. 2015, equation 10."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; 0 classes leaves pooled features."""
        # The width is read from the layer: a slim model has fewer features than its class says.
        num_features = self.linear.in_features if isinstance(self.linear, nn.Linear) else self.num_features
        pool_type = global_pool if global_pool is not None else self.global_pool.pool_type
        like = next(self.parameters())
        self._set_head(num_features, num_classes, pool_type, self.drop_rate)
        self.linear.to(device=like.device, dtype=like.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features [N, C, H, W] and classify them: [N, classes]."""
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images [N, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


class PadShortcut(nn.Module):
    """Parameter-free shortcut, He et al. 2016 section 3.3, option A: subsample, then zero channels on both sides."""

    def __init__(self, stride: int, pad: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.pad = pad  # zero channels in front and behind

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))


class CifarBasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        missing = channels - in_channels
        same = stride == 1 and missing == 0
        self.shortcut = nn.Identity() if same else PadShortcut(stride, (missing // 2, missing - missing // 2))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(_CifarNet):
    """ResNet for 32x32 images, He et al. 2016 section 4.2: stages of 16, 32 and 64 channels, 6 n + 2 layers."""

    def __init__(
        self,
        blocks_per_stage: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        width, self.feature_info = 16, []
        for stage, channels in enumerate((16, 32, 64), start=1):
            blocks = []
            for block in range(blocks_per_stage):
                blocks.append(CifarBasicBlock(width, channels, stride=2 if stage > 1 and block == 0 else 1))
                width = channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self._set_head(width, num_classes, global_pool, drop_rate)
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's features, [N, 64, H / 4, W / 4] when dense."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


class CifarVGG(_CifarNet):
    """VGG-16 with BatchNorm for 32x32 images: 13 convs, one hidden layer of 512.

    Source: Simonyan and Zisserman 2015, configuration D, with the 512-wide head that pruning papers use on CIFAR
        (Li et al. 2017, section 4.1: 15 M parameters, 313 M MACs). The hidden layer has no BatchNorm, so that a
        batch of one image trains.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        hidden_features: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        layers, width, self.feature_info = [], in_chans, []
        for stage, widths in enumerate(stages):
            for channels in widths:
                layers += [nn.Conv2d(width, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                width = channels
            module = f"features.{len(layers) - 1}"
            self.feature_info.append({"num_chs": width, "reduction": 2**stage, "module": module})
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self._set_head(hidden_features, num_classes, global_pool, drop_rate)
        self.fc1 = nn.Linear(width, hidden_features)
        self.act = nn.ReLU()
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's features, [N, 512, H / 32, W / 32] when dense."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features [N, C, H, W], apply the hidden layer and classify: [N, classes]."""
        x = self.act(self.fc1(self.global_pool(x)))
        if self.drop_rate > 0:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)


class CifarDenseLayer(nn.Module):
    """BatchNorm, ReLU, 3x3 conv; its output is appended to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cat([x, self.conv1(self.act1(self.bn1(x)))], 1)


class CifarDenseNet(_CifarNet):
    """DenseNet for 32x32 images, Huang et al. 2017 section 3: three blocks, no bottleneck, no compression."""

    def __init__(
        self,
        layers_per_block: int,
        growth: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        # 16 filters in the first conv for every growth: Huang et al. 2017, section 3, "Implementation Details".
        width, self.feature_info = 16, []
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        for block in range(1, 4):
            layers = [CifarDenseLayer(width + i * growth, growth) for i in range(layers_per_block)]
            width += layers_per_block * growth
            self.add_module(f"block{block}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (block - 1), "module": f"block{block}"})
            if block < 3:
                conv = nn.Conv2d(width, width, 1, bias=False)
                transition = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv, nn.AvgPool2d(2))
                self.add_module(f"transition{block}", transition)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self._set_head(width, num_classes, global_pool, drop_rate)
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last block's features after BatchNorm and ReLU, [N, 448, H / 4, W / 4] when dense."""
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition2(self.block2(x))
        return self.act(self.bn(self.block3(x)))


def _cfg(first_conv: str = "conv1", pool_size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": pool_size,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": first_conv,
        "classifier": "linear",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet20.untrained": _cfg(),
        "cifar_resnet56.untrained": _cfg(),
        "cifar_resnet110.untrained": _cfg(),
        "cifar_vgg16_bn.untrained": _cfg("features.0", (1, 1)),
        "cifar_densenet40.untrained": _cfg(),
    }
)


def _build(cls: type[nn.Module], name: str, pretrained: bool, num_stages: int, **kwargs: Any) -> nn.Module:
    """Build a network as timm does; `features_only` returns every stage unless the caller names some."""
    out_indices = kwargs.pop("out_indices", tuple(range(num_stages)))
    feature_cfg = {"out_indices": out_indices, "flatten_sequential": cls is CifarVGG}
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 41 M MACs."""
    return _build(CifarResNet, "cifar_resnet20", pretrained, 3, blocks_per_stage=3, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56: 0.85 M parameters, 125 M MACs."""
    return _build(CifarResNet, "cifar_resnet56", pretrained, 3, blocks_per_stage=9, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110: 1.7 M parameters, 253 M MACs."""
    return _build(CifarResNet, "cifar_resnet110", pretrained, 3, blocks_per_stage=18, **kwargs)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16 with BatchNorm: 15 M parameters, 313 M MACs."""
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    return _build(CifarVGG, "cifar_vgg16_bn", pretrained, len(stages), stages=stages, hidden_features=512, **kwargs)


@register_model
def cifar_densenet40(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """DenseNet-40 with growth 12: 1.0 M parameters, 265 M MACs."""
    return _build(CifarDenseNet, "cifar_densenet40", pretrained, 3, layers_per_block=12, growth=12, **kwargs)
