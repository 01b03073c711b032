"""The torch, transformers, vLLM and Ray Data code that the scripts in `jobs/` compose."""
