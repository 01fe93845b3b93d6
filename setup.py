"""Packages that pyproject.toml can't say: `data/` travels in the wheel as the package `triscope_data`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["apps*", "shared_runtime*", "pipelines*"]), "triscope_data"],
    package_dir={"triscope_data": "data"},
    package_data={
        "triscope_data": ["models/*/*", "samples/*", "samples/*/*", "datasets/*"],
        "apps": ["**/*.toml", "**/*.js", "**/*.css", "**/*.html", "**/*.mako"],
        "shared_runtime": ["py.typed"],
        "pipelines": ["py.typed"],
    },
)
