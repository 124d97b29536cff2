"""Test third-party encoders as wheels, next to merv's wheel, in an environment outside the checkout.

One plug-in works (examples/third_party_encoder). Each of the others has one fault. The test passes if listing
imports nothing, each error names the distribution at fault, and no plug-in affects another. The exit status
is 1 otherwise.

    python benchmarks/plugins/wheels.py [--python PYTHON] [--out FILE]

Without --python, the script creates an environment of 5 GB and installs merv's wheel there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "third_party_encoder"
UV = str(Path(sys.executable).with_name("uv"))
PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "other-{name}"
version = "1.0"

[project.entry-points."merv.encoders"]
{encoder} = "other_{module}:Plugin"

[tool.setuptools]
py-modules = ["other_{module}"]
"""
FAKE = "from merv.encoders.fake import Fake\n\nclass Plugin(Fake):\n    "
# Name of the distribution without "other-" → name of the encoder, and a module with the class Plugin.
PLUGINS = {
    "import-error": ("import_error", "import a_package_that_nobody_has"),
    "exit": ("exits", "import sys\nsys.exit('good-bye')"),
    "wrong-class": ("wrong_class", "class Plugin:\n    pass"),
    "broken": ("broken", FAKE + "def build(self):\n        raise RuntimeError('no sun today')"),
    "collision": ("fake", FAKE + "pass"),
}
NOT_LOADED = ("import-error", "exit", "wrong-class")
# Name of an encoder → regular expression for the result of creating it.
EXPECTED = {
    "color_histogram": "works: color_histogram",
    "import_error": r"BrokenPlugin: .*other-import-error 1\.0.*ModuleNotFoundError: .*that_nobody_has.*",
    "exits": r"BrokenPlugin: .*other-exit 1\.0.*SystemExit: good-bye.*",
    "wrong_class": r"BrokenPlugin: .*other-wrong-class 1\.0.*<class .*",
    "broken": r"BrokenPlugin: .*other-broken 1\.0.*RuntimeError: no sun today.*",
    "fake": r"AmbiguousPlugin: .*other-collision 1\.0.*'merv:fake' or '.*:fake'.*",
    "other-collision:fake": "works: other_collision",
    "merv:fake": "works: merv.encoders.fake",
}
USE_PLUGINS = """
import json
import merv
from merv import MervError, MultiEncoder, create_encoder
from merv.testing import check_encoder, make_video

def create(name):
    try:
        return f"works: {type(create_encoder(name, weights=None)).__module__}"
    except MervError as error:
        return f"{type(error).__name__}: {error}"

results = {name: create(name) for name in NAMES}
vision = MultiEncoder(["color_histogram", "merv:fake"], grid=(4, 7, 7))
results["tokens"] = str(list(vision(make_video("square.mp4")).tokens.shape))
results["merv"] = merv.__file__
findings = check_encoder(merv.find_encoder("color_histogram"))
results["failed checks"] = "; ".join(str(finding) for finding in findings if not finding.passed)
print("RESULTS" + json.dumps(results))
"""
Row = tuple[bool, str, str]  # passed, what was tried, what happened


def main() -> int:
    """Build and install the plug-ins, try them, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="Python of an environment that has merv's wheel")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        work = Path(folder)
        # absolute() and not resolve(): the Python of an environment is a link.
        python = str(args.python.absolute() if args.python else create_environment(work))
        install(python, [build_wheel(source, work) for source in (*write_plugins(work), EXAMPLE)])
        rows = check(*try_plugins(python, work))
        seconds = time.perf_counter() - start
    passed = sum(row[0] for row in rows)
    text = "\n".join(f"{'ok  ' if row[0] else 'FAIL'}  {row[1]:26} {row[2]}" for row in rows)
    text += f"\n{passed} of {len(rows)} passed\n"
    print(f"{text}{seconds:.0f} s")
    if args.out:
        versions = f"merv {version('merv')}, Python {platform.python_version()}, {platform.system()}"
        args.out.write_text(f"benchmarks/plugins/wheels.py: {versions}\n\n{text}")
    return int(passed < len(rows))


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command without the checkout on its path; return its stdout and stderr."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} {command[1]} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return f"{done.stdout}\n{done.stderr}"


def create_environment(work: Path) -> Path:
    """Create an environment with merv's wheel; return its Python."""
    run(UV, "build", "--quiet", "--out-dir", work / "merv", ROOT)
    run(UV, "venv", "--quiet", "--python", sys.executable, work / "env")
    python = work / "env" / "bin" / "python"
    merv = next((work / "merv").glob("*.whl"))
    run(UV, "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt", merv)
    return python


def write_plugins(work: Path) -> list[Path]:
    """Write the source folder of each plug-in."""
    folders = []
    for name, (encoder, source) in PLUGINS.items():
        folder = work / name
        folder.mkdir()
        module = name.replace("-", "_")
        pyproject = PYPROJECT.format(name=name, module=module, encoder=encoder)
        (folder / "pyproject.toml").write_text(pyproject)
        (folder / f"other_{module}.py").write_text(f"print('imported {name}')\n{source}\n")
        folders.append(folder)
    return folders


def build_wheel(source: Path, work: Path) -> Path:
    """Build the wheel of a source folder."""
    out = work / "wheels" / source.name
    options = ["--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", out]
    run(UV, "build", *options, source)
    return next(out.glob("*.whl"))


def install(python: str, wheels: list[Path]) -> None:
    """Install wheels into the environment, which has merv already."""
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", python, *wheels)


def try_plugins(python: str, work: Path) -> tuple[str, str, dict[str, str]]:
    """Run `merv encoders`, `merv encoders --long` and USE_PLUGINS in an empty folder; return the outputs."""
    folder = work / "empty"
    folder.mkdir()
    merv = Path(python).with_name("merv")
    plain = run(merv, "encoders", cwd=folder)
    long = run(merv, "encoders", "--long", cwd=folder)
    output = run(python, "-c", USE_PLUGINS.replace("NAMES", repr(list(EXPECTED))), cwd=folder)
    results = next(line for line in output.splitlines() if line.startswith("RESULTS"))
    return plain, long, json.loads(results.removeprefix("RESULTS"))


def check(plain: str, long: str, results: dict[str, str]) -> list[Row]:
    """Compare the outputs with what is expected."""
    rows: list[Row] = [("imported" not in plain, "merv encoders", "imports nothing")]
    for name, (encoder, _) in PLUGINS.items():
        listed = re.search(rf"^{encoder} +other-{name} +1\.0$", plain, re.MULTILINE)
        rows.append((bool(listed), "merv encoders", f"lists {encoder} of other-{name}"))
    for name in NOT_LOADED:
        line = re.search(rf"^{PLUGINS[name][0]} +other-{name} +1\.0 +broken: .*$", long, re.MULTILINE)
        rows.append((bool(line), "merv encoders --long", line[0] if line else long))
    works = re.search(r"^color_histogram/base .* ok ", long, re.MULTILINE)
    rows.append((bool(works), "merv encoders --long", "lists the working plug-in"))
    for name, pattern in EXPECTED.items():
        rows.append((bool(re.fullmatch(pattern, results[name], re.DOTALL)), name, results[name]))
    rows.append((results["tokens"] == "[1, 196, 32]", "MultiEncoder", f"tokens {results['tokens']}"))
    rows.append((str(ROOT) not in results["merv"], "merv", "is the wheel, not the checkout"))
    failed = results["failed checks"]
    rows.append((not failed, "check color_histogram", failed or "all checks pass"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
