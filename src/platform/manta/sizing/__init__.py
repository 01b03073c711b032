"""Whether a model fits an accelerator: weights, KV cache, reading speed. Arithmetic only."""
