"""Between Ray Serve and vLLM: what a replica needs that neither brings."""
