"""Builds megalite: Python, small C++ extensions for sample indices and byte-pair merges, and one of kernels for CPUs.

`kernels/` is installed as `megalite.kernels`: a top-level package named `kernels` would collide with another project's.
"""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# Threads by OpenMP, where the compiler brings it along; arithmetic as written, but for traps and errno that none reads.
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", *(["-fopenmp"] if sys.platform == "linux" else [])]

extensions = [
    Pybind11Extension("megalite.data._index", ["megalite/data/_index.cpp"], cxx_std=17),
    Pybind11Extension("megalite.text._bpe", ["megalite/text/_bpe.cpp"], cxx_std=17),
    Pybind11Extension(
        "megalite.kernels._cpu",
        ["kernels/cpu/kernels.cpp"],
        depends=sorted(map(str, Path("kernels/cpu").glob("*.h"))),
        cxx_std=17,
        extra_compile_args=CPU_FLAGS,
        extra_link_args=[flag for flag in CPU_FLAGS if flag == "-fopenmp"],
        optional=True,  # without it the plain PyTorch forms run, and the start-up log says so
    ),
]

setup(
    packages=[*find_packages(include=["megalite", "megalite.*"]), "megalite.kernels", "megalite.kernels.attention"],
    package_dir={"megalite.kernels": "kernels"},
    package_data={"": ["*.pyi", "*.toml", "*.html", "*.css", "*.yaml"]},
    ext_modules=extensions,
    cmdclass={"build_ext": build_ext},
)
