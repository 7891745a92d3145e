"""What pyproject.toml cannot say: packages that lie elsewhere in the repository, and the README for a package index."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Package -> folder, files beside its modules. The small model, the generator of its benchmarks and the scripts are
# outside of `llava` in the repository and inside of it in an installation.
ELSEWHERE = {
    "llava.tiny.build": ("playground/tiny/build", ["checksums.txt", "checksums_crowded.txt"]),
    "llava.tiny.world": ("playground/tiny/world", []),
    "llava.tiny.models": ("playground/tiny/models", ["tiny-llava-v1.5/*.*", "tiny-llava-v1.5/vision_tower/*"]),
    "llava.scripts": ("scripts", ["common.sh", "v1_5/eval/*.sh", "v1_6/eval/*.sh"]),
}


def for_an_index(text: str) -> str:
    """The README where there is no repository around it: relative pictures and links become their text."""
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    packages=[*find_packages(include=["llava", "llava.*"]), *ELSEWHERE],
    package_dir={name: folder for name, (folder, _) in ELSEWHERE.items()},
    package_data={
        "llava": ["py.typed", "eval/reports/look/page/*"],
        **{name: files for name, (_, files) in ELSEWHERE.items()},
    },
    py_modules=["autoprune_llava"],
    long_description=for_an_index(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
