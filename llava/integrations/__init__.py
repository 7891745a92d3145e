"""Pruning inside other people's evaluation programs: lmms-eval and VLMEvalKit."""
