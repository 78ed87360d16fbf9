"""Downloads wheels for a machine with a card and without a network: what this project needs and its image lacks.

The requirements are those of pyproject.toml and of each downloaded wheel, until none is missing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
PREINSTALLED = frozenset(
    {
        *(
            "annotated-doc",
            "certifi",
            "click",
            "contourpy",
            "filelock",
            "fsspec",
            "huggingface-hub",
            "hypothesis",
            "idna",
        ),
        *("jinja2", "joblib", "markdown-it-py", "markupsafe", "mdurl", "mpmath", "narwhals", "networkx", "numpy"),
        *("nvidia-ml-py", "onnxruntime", "packaging", "pandas", "pillow", "pygments", "pytest", "pytest-timeout"),
        *(
            "python-dateutil",
            "pyyaml",
            "rich",
            "safetensors",
            "scikit-learn",
            "scipy",
            "setuptools",
            "shellingham",
            "six",
        ),
        *("sympy", "threadpoolctl", "timm", "torch", "torchvision", "tqdm", "triton"),
    }
)
"""Packages that a PyTorch image has, among those that may be required."""
LARGEST_MB = 60
PLATFORMS = ("2_28", "2_27", "2_17", "2014", "2_24", "2_31", "2_34", "2_35", "2_12", "2_5", "1")
TARGET = {
    **{"python_version": "3.12", "python_full_version": "3.12.3", "implementation_name": "cpython"},
    **{"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    **{"platform_python_implementation": "CPython", "extra": ""},
}


def needs(metadata: str) -> list[Requirement]:
    """The requirements in a wheel's METADATA that apply to the machine with the card, without extras."""
    requirements = Parser().parsestr(metadata).get_all("Requires-Dist") or []
    return [
        requirement
        for requirement in map(Requirement, requirements)
        if requirement.marker is None or requirement.marker.evaluate(TARGET)
    ]


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return archive.read(name).decode()


def wheels_in(folder: Path) -> dict[str, Path]:
    """The wheels of a folder by canonical name.

    Raises:
        SystemExit: there are two versions of one package, which pip would refuse.
    """
    wheels: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*.whl")):
        name = canonicalize_name(wheel.name.split("-")[0])
        if name in wheels:
            raise SystemExit(f"{folder} has two versions of {name}: {wheels[name].name}, {wheel.name}. Delete one.")
        wheels[name] = wheel
    return wheels


def missing(folder: Path, roots: Iterable[Requirement]) -> list[Requirement]:
    """Requirements of the roots and of all wheels in the folder that are neither there nor preinstalled."""
    wheels = wheels_in(folder)
    requirements = [*roots, *(need for wheel in wheels.values() for need in needs(metadata_of(wheel)))]
    unmet: dict[str, Requirement] = {}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name in wheels:
            version = wheels[name].name.split("-")[1]
            if not requirement.specifier.contains(version, prereleases=True):
                raise SystemExit(f"{wheels[name].name} does not satisfy {requirement}. Delete it and repeat the call.")
        elif name not in PREINSTALLED:
            specifier = unmet[name].specifier & requirement.specifier if name in unmet else requirement.specifier
            unmet[name] = Requirement(f"{requirement.name}{specifier}")
    return list(unmet.values())


def download(requirement: Requirement, folder: Path) -> None:
    platforms = [
        argument
        for tag in PLATFORMS
        for argument in ("--platform", f"manylinux{tag if tag in ('1', '2014') else '_' + tag}_x86_64")
    ]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", "3.12", "--implementation", "cp", "-d", str(folder), str(requirement)]
    subprocess.run(command, check=True)


def fetch(folder: Path) -> None:
    """Download all missing wheels.

    Raises:
        SystemExit: the wheels are too large in total.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [*map(Requirement, project["dependencies"])]
    while unmet := missing(folder, roots):
        for requirement in unmet:
            print(f"fetching {requirement}", flush=True)
            download(requirement, folder)
    wheels = wheels_in(folder)
    size_mb = sum(wheel.stat().st_size for wheel in wheels.values()) / 2**20
    print(f"{len(wheels)} wheels, {size_mb:.1f} MB, nothing missing; preinstalled: {', '.join(sorted(PREINSTALLED))}")
    if size_mb > LARGEST_MB:
        raise SystemExit(f"{folder} holds {size_mb:.0f} MB, more than {LARGEST_MB}.")
