"""The method, one file a step, in the order of docs/method.md; nothing is imported here.

| step | file |
|---|---|
| what the layers around a group read, and the modules that hook them | taps |
| moments of those inputs, Fisher weights of the outputs | responses |
| functional distance, elimination, clusters by correlation | redundancy |
| what a merge costs at the network's answers | costs |
| the FCR unit: gates, their training, the contributions | fcr |
| clusters, the pruning set, what is restored | select |
| fold layer after layer | reconstruct |
| BatchNorm statistics, where that is better | recalibrate |
| what was found, kept and lost | report |
"""
