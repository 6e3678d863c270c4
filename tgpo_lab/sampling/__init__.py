"""Responses of a model, by its own cached decoding or by vLLM."""
