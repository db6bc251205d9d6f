"""Hand settings.ini, the one place for the version and the requirements, to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = ("cpu", "cuda12", "cuda13", "openblas", "mkl", "torch", "zoo", "lab", "dev")

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    license="Apache-2.0",
    packages=find_packages(include=[settings["lib_name"], settings["lib_name"] + ".*"]),
    package_data={settings["lib_name"] + ".kernels": ["cpp/*.h", "cpp/*.cpp"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[name + "_requirements"].split() for name in extras},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    entry_points={"nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"]},
)
