"""Base models from files that people have: a GGUF or a model folder becomes a base with a name of its own."""
