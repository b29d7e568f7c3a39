// Sample-index builders of megalite (see megalite/data).
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_index, module) { module.doc() = "Builders of sample and blend indices"; }
