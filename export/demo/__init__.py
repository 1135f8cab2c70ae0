"""The demo model: a synthetic world, a tokenizer of its own, its training and its scoring."""
