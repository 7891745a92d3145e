"""Families of vision-language models of transformers: one small file per family, with what the engine must know of it.

Nobody has to import this package: ``attach(model)`` asks it for a reader by the class of the model.
"""

from llava.families.base import Call, Family, Placed
from llava.families.registry import family_of, list_families, reader_of, register_family

__all__ = ["Call", "Family", "Placed", "family_of", "list_families", "reader_of", "register_family"]
