"""The method, a file a step; docs/method.md has the equations. Each file reads those above it alone; slim.py runs them.

| step | file | in the paper's words |
|---|---|---|
| the layers that read a group, and how they are watched | taps | |
| moments of what they read, Fisher weights of what they answer | responses | feature maps |
| which units others stand in for: functional distance, elimination | redundancy | feature clustering |
| what kept units express of cut ones, by least squares; integrity | fold | integrity of features' functions |
| a gate a unit | gates | FCR unit |
| what a merge costs in loss | costs | |
| what the network costs at its present widths, against its budgets | ledger | |
| clusters: the units that leave | pruning_set | pruning set |
| the gates' training, each unit's contribution | fcr | feature contribution ranking |
| what comes back of the pruning set, by contribution per cost | restore | restore |
| folding layer after layer | reconstruct | |
| BatchNorm statistics; which candidate is nearest to the dense model | recalibrate | |
| what was found, kept and lost | report | |
| what checkpoint and card say of it | provenance | |
"""
