"""The library: multi-token objectives on stock causal language models. Needs torch, transformers and numpy."""
