"""Builds megalite: pure Python plus one small C++ extension that builds sample indices.

`kernels/` is installed as `megalite.kernels`: a top-level package named `kernels` would collide with another project's.
"""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megalite", "megalite.*"]), "megalite.kernels"],
    package_dir={"megalite.kernels": "kernels"},
    package_data={"": ["*.pyi", "*.toml", "*.html"]},
    ext_modules=[Pybind11Extension("megalite.data._index", ["megalite/data/_index.cpp"], cxx_std=17)],
    cmdclass={"build_ext": build_ext},
)
