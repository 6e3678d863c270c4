"""Several processes and devices: who samples what, sums over all, weights in parts, where a model lies."""
