"""Stands in for the package when a file of this folder is run by its path: `python llava/eval/eval_pope.py`.

Python then looks here first, where the package is not. The folder gives way to the checkout's root, so that neither an
installation nor a working directory is needed and no file here hides a module of that name.
"""

import sys
from pathlib import Path

if __name__ == "llava":
    _here = Path(__file__).resolve().parent
    _root = next(folder for folder in _here.parents if (folder / "llava" / "__init__.py").is_file())
    sys.path[:] = [str(_root), *(entry for entry in sys.path if Path(entry or ".").resolve() != _here)]
    del sys.modules["llava"]
    from llava.launch import explain_missing_packages

    explain_missing_packages()
