"""Wheels for a machine with a card and without a network: what this project needs and such an image does not have.

The needs are those of pyproject.toml and, of each wheel that is fetched, its own: so the set is closed when nothing is
left to fetch.
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
THERE = frozenset(
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
"""What an image for PyTorch has, of what may be asked for."""
LARGEST_MB = 60
PLATFORMS = ("2_28", "2_27", "2_17", "2014", "2_24", "2_31", "2_34", "2_35", "2_12", "2_5", "1")
TARGET = {
    **{"python_version": "3.12", "python_full_version": "3.12.3", "implementation_name": "cpython"},
    **{"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    **{"platform_python_implementation": "CPython", "extra": ""},
}


def needs(metadata: str) -> list[Requirement]:
    """What a wheel's METADATA asks for on the machine with the card, extras left out."""
    asked = Parser().parsestr(metadata).get_all("Requires-Dist") or []
    return [one for one in map(Requirement, asked) if one.marker is None or one.marker.evaluate(TARGET)]


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return archive.read(name).decode()


def found_in(folder: Path) -> dict[str, Path]:
    """The wheels of a folder by canonical name.

    Raises:
        SystemExit: two versions of one package, of which pip would install neither.
    """
    found: dict[str, Path] = {}
    for wheel in sorted(folder.glob("*.whl")):
        name = canonicalize_name(wheel.name.split("-")[0])
        if name in found:
            raise SystemExit(f"{folder} has two versions of {name}: {found[name].name}, {wheel.name}. Delete one.")
        found[name] = wheel
    return found


def missing(folder: Path, roots: Iterable[Requirement]) -> list[Requirement]:
    """Requirements of the roots and of all wheels that neither the folder nor the machine has."""
    wheels = found_in(folder)
    asked = [*roots, *(need for wheel in wheels.values() for need in needs(metadata_of(wheel)))]
    unmet: dict[str, Requirement] = {}
    for one in asked:
        name = canonicalize_name(one.name)
        if name in wheels:
            version = wheels[name].name.split("-")[1]
            if not one.specifier.contains(version, prereleases=True):
                raise SystemExit(f"{wheels[name].name} does not satisfy {one}. Delete it and repeat the call.")
        elif name not in THERE:
            both = unmet[name].specifier & one.specifier if name in unmet else one.specifier
            unmet[name] = Requirement(f"{one.name}{both}")
    return list(unmet.values())


def download(requirement: Requirement, folder: Path) -> None:
    platforms = [
        word
        for tag in PLATFORMS
        for word in ("--platform", f"manylinux{tag if tag in ('1', '2014') else '_' + tag}_x86_64")
    ]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--python-version", "3.12", "--implementation", "cp", "-d", str(folder), str(requirement)]
    subprocess.run(command, check=True)


def fetch(folder: Path) -> None:
    """Everything that is missing, until nothing is.

    Raises:
        SystemExit: the wheels are larger than what may travel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [*map(Requirement, project["dependencies"])]
    while unmet := missing(folder, roots):
        for one in unmet:
            print(f"fetching {one}", flush=True)
            download(one, folder)
    wheels = found_in(folder)
    size_mb = sum(wheel.stat().st_size for wheel in wheels.values()) / 2**20
    print(f"{len(wheels)} wheels, {size_mb:.1f} MB, nothing missing; taken to be there: {', '.join(sorted(THERE))}")
    if size_mb > LARGEST_MB:
        raise SystemExit(f"{folder} holds {size_mb:.0f} MB, more than {LARGEST_MB}.")
