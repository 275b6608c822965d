"""Model inputs and outputs: running a model, its batches, its answers and their meaning."""
