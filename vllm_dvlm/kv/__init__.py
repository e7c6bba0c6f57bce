"""KV rows of pruned requests: move the survivors together, give the rest back."""
