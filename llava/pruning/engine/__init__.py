"""The pruned prefill and the decoding behind it; :mod:`llava.pruning.engine.run` is where it starts."""
