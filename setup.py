"""What pyproject.toml can't say: `data/` travels in the wheel as the package `triscope_data`, kernels are compiled.

Without a C compiler the installation goes on, and `triscope doctor` says what is missing.
"""

import sys

from setuptools import Extension, find_packages, setup

WINDOWS = sys.platform == "win32"
KERNELS = [
    Extension(
        "shared_runtime.kernels.trees._cpu",
        ["shared_runtime/kernels/trees/_cpu.c"],
        extra_compile_args=["/O2"] if WINDOWS else ["-O3", "-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
        libraries=[] if WINDOWS else ["m"],
        py_limited_api=True,
        optional=True,
    )
]

setup(
    ext_modules=KERNELS,
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    packages=[*find_packages(include=["apps*", "shared_runtime*", "pipelines*"]), "triscope_data"],
    package_dir={"triscope_data": "data"},
    package_data={
        "triscope_data": ["models/*/*", "samples/*", "samples/*/*", "datasets/*"],
        "apps": ["**/*.toml", "**/*.js", "**/*.css", "**/*.html", "**/*.mako"],
        "shared_runtime": ["py.typed", "kernels/**/*.pyi"],
        "pipelines": ["py.typed"],
    },
)
