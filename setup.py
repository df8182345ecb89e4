"""Maps the top-level folders onto one namespace: `passes/` is imported as `irc.passes`, and so on.

Everything else stands in pyproject.toml; only the list of packages has to be computed.
"""

from setuptools import find_packages, setup

FOLDERS = ("passes", "lowering", "runtime")

packages = find_packages(include=["irc", "irc.*"])
for folder in FOLDERS:
    packages += [f"irc.{folder}", *(f"irc.{folder}.{name}" for name in find_packages(folder))]

setup(packages=packages, package_dir={"irc": "irc", **{f"irc.{folder}": folder for folder in FOLDERS}})
