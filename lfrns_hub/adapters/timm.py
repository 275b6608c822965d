"""timm: which attributes of its attention classes state a width."""

from lfrns_hub.adapters.registry import register_adapter, widths

register_adapter("timm.layers.attention.Attention", heads=widths("num_heads", "attn_dim"))
register_adapter("timm.layers.attention.AttentionRope", heads=widths("num_heads", "attn_dim"))
