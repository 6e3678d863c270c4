"""Parts of the training loop, which itself stands in :mod:`tgpo_lab.training`."""
