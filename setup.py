"""Packaging: everything that changes lives in settings.ini, which nbdev reads as well."""
import configparser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
missing = [k for k in "lib_name version min_python description author requirements git_url".split() if not cfg.get(k)]
if missing: raise ValueError(f"settings.ini lacks {missing}")

lib, stages = cfg["lib_name"], {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
min_python = tuple(map(int, cfg["min_python"].split(".")))

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8") if (here/"README.md").exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {stages[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *[f"Programming Language :: Python :: 3.{i}" for i in range(min_python[1], 15)],
    ],
    packages=[lib],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],   # lets other nbdev projects link to these pages
    },
    zip_safe=False,
)
