"""What pyproject.toml can't say: `data/` travels in the wheel as the package `triscope_data`, kernels are compiled.

Without a C compiler the installation goes on, and `triscope doctor` says what is missing.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

UNIX = ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
UNIX += ["-Wno-unused-parameter", "-Wno-psabi"]
WINDOWS = sys.platform == "win32"


def kernel(name: str, *sources: str) -> Extension:
    """The extension `_cpu` of a folder of kernels, and the files it is compiled from."""
    folder = f"shared_runtime/kernels/{name}"
    return Extension(
        f"shared_runtime.kernels.{name}._cpu",
        [f"{folder}/{source}" for source in sources],
        depends=[f"{folder}/{header}" for header in sorted(p.name for p in Path(folder).glob("*.h"))],
        extra_compile_args=["/O2"] if WINDOWS else UNIX,
        libraries=[] if WINDOWS else ["m"],
        py_limited_api=True,
        optional=True,
    )


setup(
    ext_modules=[kernel("trees", "_cpu.c"), kernel("fused", "_cpu.c", "_any.c", "_avx2.c", "_avx512.c")],
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
