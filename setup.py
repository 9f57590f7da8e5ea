"""The repository's root is the package `wanvideo_wrapper`; its folders are found, so that a new system lists itself."""

from setuptools import find_packages, setup

LEFT_OUT = ("tests*", "benchmarks*", "docs*", "web*", "example_workflows*")

setup(
    package_dir={"wanvideo_wrapper": "."},
    py_modules=["wanvideo_command"],
    packages=["wanvideo_wrapper", *(f"wanvideo_wrapper.{name}" for name in find_packages(exclude=LEFT_OUT))],
)
