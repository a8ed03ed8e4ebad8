"""Whether wheels and the archive of the sources are what a release needs: all that belongs, nothing else, and working.

check_wheel.py dist/*            # a wheel also, where this Python has torch, in a virtual environment of its own
check_wheel.py --installed       # the steepest that this Python has installed
"""

from __future__ import annotations

import email.message
import email.parser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    if arguments == ["--installed"]:
        works()
        return 0
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path in map(Path, arguments):
        if path.name.endswith(".tar.gz"):
            check_sources(path)
        else:
            check(path)
            if importlib.util.find_spec("torch") is not None:
                install(path)
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MB, as it must be")
    return 0


def check(path: Path) -> None:
    """Name, files, metadata and symbols; AssertionError with what is wrong."""
    match = re.fullmatch(r"steepest-([^-]+)-py3-none-(\w+linux\w+|linux_\w+)(\.\w+)*\.whl", path.name)
    assert match, f"{path.name} is not steepest-VERSION-py3-none-PLATFORM.whl"
    info = f"steepest-{match[1]}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata = email.parser.Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        tags = email.parser.Parser().parsestr(wheel.read(f"{info}/WHEEL").decode())
        library = wheel.read("steepest/libsteepest.so")

    assert all(tag.startswith("py3-none-") for tag in tags.get_all("Tag", [])), tags
    assert tags["Root-Is-Purelib"] == "false", "a wheel with a library goes into platlib"
    wanted = {f"steepest/{file.relative_to(ROOT / 'python/steepest')}" for file in ROOT.glob("python/steepest/**/*.py")}
    wanted |= {f"steepest/kernels/{file.name}" for file in ROOT.glob("kernels/*.py")}
    wanted |= {"steepest/py.typed", "steepest/libsteepest.so"}
    package = {name for name in names if not name.startswith(f"{info}/")}
    assert package == wanted, f"too many: {sorted(package - wanted)}, too few: {sorted(wanted - package)}"
    beside = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/licenses/CUTLASS.txt"}
    assert {f"{info}/{name}" for name in beside} <= names, names - package
    check_metadata(metadata, match[1])
    knows_no_python(library)


def check_metadata(metadata: email.message.Message, version: str) -> None:
    """What an index shows and what pip reads; no link in the description leads into a folder that is not there."""
    fields = {"Name": "steepest", "Version": version, "Requires-Python": ">=3.10", "License-Expression": "Apache-2.0"}
    assert {name: metadata[name] for name in fields} == fields, dict(metadata)
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = str(metadata.get_payload())
    assert description.startswith("# steepest")
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", description)
    assert not relative, relative
    assert "torch>=2.10" in metadata.get_all("Requires-Dist", [])
    assert {"LICENSE", "licenses/CUTLASS.txt"} <= set(metadata.get_all("License-File", []))
    assert "Programming Language :: Python :: 3 :: Only" in metadata.get_all("Classifier", [])
    assert any("arxiv.org" in url for url in metadata.get_all("Project-URL", []))


def check_sources(path: Path) -> None:
    """The archive has what is under version control, and what setuptools adds: no more, and little less."""
    match = re.fullmatch(r"steepest-([^-+]+)\.tar\.gz", path.name)
    assert match, f"{path.name} is not steepest-VERSION.tar.gz with a version that an index takes"
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in (each.name for each in archive if each.isfile())}
        information = archive.extractfile(f"steepest-{match[1]}/PKG-INFO")
        assert information is not None
        check_metadata(email.parser.Parser().parsestr(information.read().decode()), match[1])
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = set(listed.split("\0")) - {""}
    assert names - known == {"PKG-INFO", "setup.cfg"}, f"too many: {sorted(names - known - {'PKG-INFO', 'setup.cfg'})}"
    few = {name for name in known - names if not name.startswith((".github/", ".gitignore"))}
    assert not few, f"too few: {sorted(few)}"


def knows_no_python(library: bytes) -> None:
    """No symbol and no library of Python's, and of torch's nothing but its CPU libraries by their names."""
    readelf = shutil.which("readelf")
    assert readelf, "readelf (binutils) reads the library's symbols"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "libsteepest.so"
        file.write_bytes(library)
        command = [readelf, "--wide", "--dynamic", "--dyn-syms", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    unwanted = re.findall(r" _?Py[A-Z_]\w*|libpython\S*|\(RPATH\).*|\(RUNPATH\).*", text)
    assert not unwanted, unwanted
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
    assert {"libtorch_cpu.so", "libc10.so"} <= needed, needed
    assert not [name for name in needed if re.search("cuda|nv", name)], needed


def install(path: Path) -> None:
    """Into a virtual environment that has this Python's torch, from where its steepest is used."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder) / "bin" / "python"
        (site,) = Path(folder).glob("lib/python3*/site-packages")
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*command, str(path)], check=True)
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.origin is not None
        # Behind the folder with the wheel; a path in such a file brings no other such files, thus no editable steepest.
        (site / "torch.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
        subprocess.run([python, Path(__file__).resolve(), "--installed"], check=True, cwd=folder)


def works() -> None:
    """Steps on the compiled route, plans and facts, without the module for developers."""
    import torch

    import steepest
    from steepest.ops import backend
    from steepest.tools import planner

    assert backend.extension is not None, backend.extension_reason
    assert ROOT not in Path(steepest.__file__).parents, steepest.__file__
    assert importlib.util.find_spec("steepest._C") is None
    assert steepest.backends()["cpu"][0]
    assert "\n    max_workspace_bytes=" in (steepest.MuAdam.__doc__ or ""), "help lists no arguments"
    weights = [torch.nn.Parameter(torch.ones(8, 16)), torch.nn.Parameter(torch.ones(16))]
    optimizer = steepest.MuAdam([{"params": weights[:1]}, {"params": weights[1:], "use_muon": False}], adamw_lr=0.5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(weight.isfinite().all() and (weight < 1).all() for weight in weights), weights
    assert "tile" in planner.describe(planner.plan([planner.parse("24x1024x4096")], "auto"))
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"steepest {steepest.__version__} works in Python {version} with torch {torch.__version__}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main(sys.argv[1:]))
