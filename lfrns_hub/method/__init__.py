"""The method, one file per step; docs/method.md has the equations. A file imports only those above; slim.py runs them.

| step | file | in the paper's words |
|---|---|---|
| the layers that read a group, and hooks on their inputs | taps | |
| moments of their inputs, Fisher weights of their outputs | responses | feature maps |
| which units can be replaced by others: functional distance, elimination | redundancy | feature clustering |
| how far kept units express cut ones, by least squares; integrity | fold | integrity of features' functions |
| one gate per unit | gates | FCR unit |
| the cost of a merge in loss | costs | |
| the cost of the network at its present widths, against its budgets | ledger | |
| clusters: the units to be removed | pruning_set | pruning set |
| the gates' training, each unit's contribution | fcr | feature contribution ranking |
| the units of the pruning set to restore, by contribution per cost | restore | restore |
| folding layer after layer | reconstruct | |
| BatchNorm statistics; which candidate is nearest to the dense model | recalibrate | |
| report of a run | report | |
| record of a run for checkpoint and card | provenance | |
"""
