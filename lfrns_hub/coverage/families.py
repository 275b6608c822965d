"""Networks that `lfrns coverage` tries: the smallest of each family of timm and transformers, options, others.

The tables are static, because finding the smallest model of each family means building all of timm once (minutes). A
family of a newer timm that is in no table is looked up at run time. Sorting timm's modules into convnets, ViTs and
hybrids is ours: a hybrid has attention and stages of convolutions, a network without attention on a ViT's grid of
patches (MLP-Mixer, Sequencer) is with the ViTs, one on a convnet's stages (MetaFormer, MambaOut, FocalNet) with the
convnets.
"""

from typing import Any

CONVNET_SIZE = 128  # pixels; convolutions accept any size, and a quarter of the area saves three quarters of the time

TIMM_CONVNETS = {
    "byobnet": "mobileone_s1",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "efficientnet": "mobilenetv2_035",
    "fasternet": "fasternet_t0",
    "focalnet": "focalnet_tiny_srf",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "mambaout": "mambaout_femto",
    "metaformer": "poolformerv2_s12",
    "mobilenetv3": "mobilenetv3_small_050",
    "nasnet": "nasnetalarge",
    "nfnet": "nf_regnet_b0",
    "pnasnet": "pnasnet5large",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "tresnet": "tresnet_m",
    "vgg": "vgg11",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
}
TIMM_VITS = {
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "convit": "convit_tiny",
    "crossvit": "crossvit_tiny_240",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "gemma4_vit": "gemma4_vit_167m",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "mlp_mixer": "gmlp_ti16_224",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nest": "nest_tiny",
    "pit": "pit_ti_224",
    "qwen3_vit": "qwen3_vit_88m",
    "sequencer": "sequencer2d_s",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "twins": "twins_svt_small",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "volo": "volo_d1_224",
    "xcit": "xcit_nano_12_p8_224",
}
TIMM_HYBRIDS = {
    "byoanet": "halonet_h1",
    "coat": "coat_tiny",
    "cpubone": "cpubone_nano",
    "csatv2": "csatv2",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fastvit": "fastvit_t8",
    "gcvit": "gcvit_xxtiny",
    "iformer": "iformer_t",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "maxvit_pico_rw_256",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "nextvit": "nextvit_small",
    "pvt_v2": "pvt_v2_b0",
    "shvit": "shvit_s1",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vitamin": "vitamin_small_224",
}

# If even the smallest model has more than 60 M parameters it is built with fewer blocks, or narrower.
TIMM_ARGS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "mobilenetv5_base": {"channel_multiplier": 0.5},
    "naflexvit_base_patch16_parfac_gap": {"depth": 2},
    "nasnetalarge": {"num_features": 2016, "stem_size": 48},
    "qwen3_vit_88m": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 2, "global_attn_indexes": [1]},
    "vgg11": {"mlp_ratio": 0.25},
}
# Pixels, where the published size only costs time, or a convnet accepts no other.
TIMM_SIZES = {
    "bat_resnext26ts": 256,
    "csatv2": 256,
    "deepseek_vit_412m": 224,
    "gemma4_vit_167m": 192,
    "mobilenetv5_base": 128,
    "naflexvit_base_patch16_parfac_gap": 224,
    "qwen3_vit_88m": 224,
    "sam2_hiera_tiny": 224,
}

Option = tuple[str, str, dict[str, Any]]  # description, timm name or function, arguments
SPLIT = "lfrns_hub.coverage.cases:build_split_batch_norm"
VARIANTS: dict[str, list[Option]] = {
    "resnet": [
        ("squeeze-excite", "seresnet18", {}),
        ("ECA", "resnet18", {"block_args": {"attn_layer": "eca"}}),
        ("CBAM", "resnet18", {"block_args": {"attn_layer": "cbam"}}),
        ("global context", "resnet18", {"block_args": {"attn_layer": "gc"}}),
        ("blur pool", "resnetblur18", {}),
        ("average-pool anti-aliasing", "resnetaa34d", {}),
        ("group norm", "resnet18", {"norm_layer": "groupnorm"}),
        ("split batch norm", SPLIT, {"name": "resnet18"}),
    ],
    "resnetv2": [
        ("weight standardisation, group norm", "resnetv2_50x1_bit", {}),
        ("evonorm", "resnetv2_50d_evos", {}),
    ],
    "byobnet": [
        ("RepVGG", "repvgg_a0", {}),
        ("bilinear attention", "bat_resnext26ts", {}),
        ("RegNet-Z, evonorm", "regnetz_b16_evos", {}),
    ],
    "efficientnet": [
        ("squeeze-excite", "efficientnet_b0", {}),
        ("ECA", "efficientnet_b0", {"se_layer": "eca"}),
        ("CBAM", "efficientnet_b0", {"se_layer": "cbam"}),
        ("global context", "gc_efficientnetv2_rw_t", {}),
        ("blur pool", "efficientnet_blur_b0", {}),
        ("group norm", "efficientnet_b0_gn", {}),
        ("evonorm", "efficientnet_b0_g16_evos", {}),
        ("mixture of kernels (CondConv)", "efficientnet_cc_b0_4e", {}),
        ("split batch norm", SPLIT, {"name": "mobilenetv2_035"}),
    ],
    "regnet": [
        ("squeeze-excite", "regnety_002", {}),
        ("linear block output", "regnetz_005", {}),
        ("pre-activation", "regnetx_002", {"preact": True}),
        ("split batch norm", SPLIT, {"name": "regnetx_002"}),
    ],
    "convnext": [
        ("GRN", "convnextv2_atto", {}),
        ("overlapping stem", "convnext_atto_ols", {}),
        ("batch norm", "convnext_atto", {"norm_layer": "batchnorm2d"}),
        ("linear layers in the MLP", "convnext_atto", {"conv_mlp": False}),
    ],
    "nfnet": [
        ("weight standardisation", "nf_resnet26", {}),
        ("squeeze-excite", "nf_seresnet26", {}),
        ("ECA", "nf_ecaresnet26", {}),
        ("CBAM", "nf_resnet26", {"attn_layer": "cbam"}),
        ("global context", "nf_resnet26", {"attn_layer": "gc"}),
    ],
    "densenet": [
        ("blur pool, deep stem", "densenetblur121d", {}),
        ("group norm", "densenet121", {"norm_layer": "groupnorm"}),
        ("evonorm", "densenet121", {"norm_layer": "evonorms0"}),
        ("split batch norm", SPLIT, {"name": "densenet121"}),
    ],
}

# Family, "package.module:function", its arguments, pixels; a package that is not installed is left out.
THIRD_PARTY: list[tuple[str, str, dict[str, Any], int]] = [
    ("torch.nn.Sequential", "lfrns_hub.coverage.cases:build_sequential", {}, 32),
    ("torchvision", "torchvision.models:resnet18", {"weights": None}, CONVNET_SIZE),
    ("torchvision", "torchvision.models:swin_t", {"weights": None}, 224),
    (
        "torchvision, segmentation",
        "torchvision.models.segmentation:fcn_resnet50",
        {"weights": None, "weights_backbone": None},
        CONVNET_SIZE,
    ),
    (
        "torchvision, segmentation",
        "torchvision.models.segmentation:deeplabv3_mobilenet_v3_large",
        {"weights": None, "weights_backbone": None},
        CONVNET_SIZE,
    ),
    (
        "vit-pytorch",
        "vit_pytorch:ViT",
        {
            "image_size": 64,
            "patch_size": 8,
            "num_classes": 10,
            "dim": 96,
            "depth": 4,
            "heads": 4,
            "mlp_dim": 192,
            "dim_head": 24,
        },
        64,
    ),
]


# Small configurations of every image classifier of transformers: pixels, arguments of the configuration.
VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TRANSFORMERS_CONVNETS: dict[str, tuple[int, dict[str, Any]]] = {
    "bit": (64, {"embedding_size": 32, "hidden_sizes": [64, 96, 128, 192], "depths": [2, 1, 1, 2], "num_groups": 8}),
    "convnext": (
        64,
        {"image_size": 64, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 2, 1, 1], "layer_scale_init_value": 0.5},
    ),
    "convnextv2": (64, {"image_size": 64, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 2, 1, 1]}),
    "efficientnet": (
        64,
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640, "dropout_rate": 0.0},
    ),
    "focalnet": (
        64,
        {
            "image_size": 64,
            "embed_dim": 24,
            "hidden_sizes": [48, 96, 192, 192],
            "depths": [1, 2, 1, 1],
            "drop_path_rate": 0.0,
        },
    ),
    "hgnet_v2": (
        64,
        {
            "embedding_size": 24,
            "depths": [1, 1, 2, 1],
            "hidden_sizes": [48, 96, 128, 192],
            "stem_channels": [3, 16, 24],
            "stage_in_channels": [24, 48, 96, 128],
            "stage_mid_channels": [16, 24, 32, 48],
            "stage_out_channels": [48, 96, 128, 192],
            "stage_num_blocks": [1, 1, 2, 1],
            "stage_numb_of_layers": [3, 3, 3, 3],
        },
    ),
    "mobilenet_v1": (64, {"image_size": 64, "depth_multiplier": 0.375, "classifier_dropout_prob": 0.0}),
    "mobilenet_v2": (64, {"image_size": 64, "depth_multiplier": 0.5, "classifier_dropout_prob": 0.0}),
    "poolformer": (64, {"hidden_sizes": [32, 48, 80, 96], "depths": [1, 2, 1, 1], "layer_scale_init_value": 0.5}),
    "pp_lcnet": (64, {"scale": 0.5, "class_expand": 320, "hidden_dropout_prob": 0.0}),
    "regnet": (
        64,
        {"embedding_size": 24, "hidden_sizes": [32, 64, 96, 160], "depths": [1, 2, 2, 1], "groups_width": 16},
    ),
    "resnet": (64, {"embedding_size": 32, "hidden_sizes": [64, 96, 128, 192], "depths": [2, 1, 1, 2]}),
    "textnet": (64, {"image_size": [64, 64], "stem_out_channels": 24, "hidden_sizes": [24, 32, 48, 64, 96]}),
}
TRANSFORMERS_VITS: dict[str, tuple[int, dict[str, Any]]] = {
    "beit": (
        32,
        {**VIT, "use_relative_position_bias": True, "use_absolute_position_embeddings": True, "drop_path_rate": 0.0},
    ),
    "clip": (32, {"vision_config": VIT, "text_config": TEXT, "projection_dim": 48}),
    "cvt": (
        64,
        {"embed_dim": [32, 48, 96], "num_heads": [2, 3, 4], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    ),
    "data2vec-vision": (
        32,
        {
            **VIT,
            "use_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "drop_path_rate": 0.0,
            "out_indices": [0, 1, 1, 2],
        },
    ),
    "deit": (32, VIT),
    "dinov2": (
        32,
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 3,
        },
    ),
    "dinov2_with_registers": (
        32,
        {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 3,
            "num_register_tokens": 3,
        },
    ),
    "donut-swin": (
        64,
        {
            "image_size": 64,
            "embed_dim": 32,
            "depths": [1, 2, 1],
            "num_heads": [2, 4, 8],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
    ),
    "hiera": (
        64,
        {
            "image_size": [64, 64],
            "embed_dim": 32,
            "depths": [1, 1, 2, 1],
            "num_heads": [2, 2, 4, 8],
            "num_query_pool": 2,
            "masked_unit_size": [8, 8],
        },
    ),
    "ijepa": (32, VIT),
    "levit": (
        64,
        {
            "image_size": 64,
            "hidden_sizes": [32, 64, 96],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 2, 1],
            "key_dim": [16, 16, 16],
            "patch_size": 16,
            "down_ops": [["Subsample", 16, 2, 4, 2, 2], ["Subsample", 16, 4, 4, 2, 2]],
        },
    ),
    "metaclip_2": (32, {"vision_config": VIT, "text_config": TEXT, "projection_dim": 48}),
    "mobilevit": (
        64,
        {
            "image_size": 64,
            "hidden_sizes": [48, 64, 80],
            "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 160],
            "hidden_dropout_prob": 0.0,
            "classifier_dropout_prob": 0.0,
        },
    ),
    "mobilevitv2": (
        64,
        {
            "image_size": 64,
            "n_attn_blocks": [1, 2, 1],
            "base_attn_unit_dims": [64, 96, 128],
            "width_multiplier": 0.5,
            "classifier_dropout_prob": 0.0,
        },
    ),
    "perceiver": (
        32,
        {
            "image_size": 32,
            "num_latents": 16,
            "d_latents": 64,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 1,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "pvt": (
        64,
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 80, 96],
            "depths": [1, 2, 1, 1],
            "num_attention_heads": [2, 3, 5, 6],
            "mlp_ratios": [4, 4, 3, 3],
        },
    ),
    "pvt_v2": (
        64,
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 80, 96],
            "depths": [1, 2, 1, 1],
            "num_attention_heads": [2, 3, 5, 6],
            "mlp_ratios": [4, 4, 3, 3],
        },
    ),
    "segformer": (
        64,
        {
            "hidden_sizes": [32, 48, 80, 96],
            "depths": [1, 2, 1, 1],
            "num_attention_heads": [2, 3, 5, 6],
            "drop_path_rate": 0.0,
        },
    ),
    "siglip": (32, {"vision_config": VIT, "text_config": {**TEXT, "projection_size": 64}}),
    "swiftformer": (
        64,
        {"image_size": 64, "depths": [1, 2, 1, 1], "embed_dims": [24, 32, 56, 96], "layer_scale_init_value": 0.5},
    ),
    "swin": (
        64,
        {
            "image_size": 64,
            "embed_dim": 32,
            "depths": [1, 2, 1],
            "num_heads": [2, 4, 8],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
    ),
    "swinv2": (
        64,
        {
            "image_size": 64,
            "embed_dim": 32,
            "depths": [1, 2, 1],
            "num_heads": [2, 4, 8],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
    ),
    "vit": (32, VIT),
    "vit_msn": (32, VIT),
}
# Types of the same registry that do not use images, or cannot run here.
NOT_IMAGES = {
    "dinat": "needs the natten package, which builds only with CUDA",
    "imagegpt": "takes ids of colour clusters, not pixels",
    "shieldgemma2": "a text generator on top of an image tower",
    "siglip2": "takes flattened patches, a mask and shapes, not images",
    "timm_wrapper": "wraps a timm model, and is tried as that",
}
