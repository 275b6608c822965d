"""transformers: attention reads its widths from the weights; the number of heads is set all the same."""

from lfrns_hub.adapters.registry import register_adapter, widths

for model, prefix in (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2")):
    register_adapter(
        f"transformers.models.{model}.modeling_{model}.{prefix}Attention", heads=widths("num_attention_heads")
    )
