"""One file per pruning method; see :mod:`llava.pruning.registry`."""
