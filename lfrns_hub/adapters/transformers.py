"""transformers: attention reads its widths from the weights; the number of heads is set all the same.

In older releases these classes state none: the modules in them do, and use it, as the graph shows.
"""

from lfrns_hub.adapters.registry import ADAPTERS, Adapter, widths

for model, prefix in (("vit", "ViT"), ("deit", "DeiT"), ("dinov2", "Dinov2")):
    cls = f"transformers.models.{model}.modeling_{model}.{prefix}Attention"
    ADAPTERS[cls] = Adapter(cls, widths("num_attention_heads"), if_stated=True)
