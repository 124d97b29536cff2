"""Strangers' plug-ins as wheels, beside merv's wheel, in an environment outside the checkout: one that
works, and one for each way not to. Nothing is imported by a list, each fault is said with its
distribution, and none hides another. Exits with 1 where anything is otherwise.

    python benchmarks/plugins/wheels.py [--python PYTHON] [--out FILE]

--python is that of an environment which has merv's wheel; without it one is made, of 5 GB.
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
UV = str(Path(sys.executable).with_name("uv"))
PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "stranger-{name}"
version = "1.0"

[project.entry-points."merv.encoders"]
{entry} = "stranger_{module}:Plugin"

[tool.setuptools]
py-modules = ["stranger_{module}"]
"""
FAKE = "from merv.encoders.fake import Fake\n\nclass Plugin(Fake):\n    "
# name of the distribution → name of the encoder, and a module whose class is Plugin.
STRANGERS = {
    "import-error": ("import_error", "import a_package_that_nobody_has"),
    "exit": ("exits", "import sys\nsys.exit('good-bye')"),
    "wrong-class": ("wrong_class", "class Plugin:\n    pass"),
    "broken": ("broken", FAKE + "def build(self):\n        raise RuntimeError('no sun today')"),
    "contract": ("contract", FAKE + "contract = '2.0'"),
    "slow": ("slow", f"import time\ntime.sleep(3.5)\n{FAKE}pass"),
    "collision": ("fake", FAKE + "pass"),
}
USE = """
import json, logging
import merv
from merv import MervError, MultiEncoder, create_encoder
from merv.testing import check_encoder, make_video

logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("merv").addHandler(handler)

def said(name):
    try:
        return f"works: {type(create_encoder(name, weights=None)).__module__}"
    except MervError as error:
        return f"{type(error).__name__}: {error}"

came = {name: said(name) for name in NAMES}
came["slow, log"] = " ".join(logged)
both = MultiEncoder(["color_histogram", "merv:fake"], grid=(4, 7, 7))
came["tokens"] = str(list(both(make_video("square.mp4")).tokens.shape))
came["installed"] = merv.__file__
findings = check_encoder(merv.find_encoder("color_histogram"))
came["checks"] = "; ".join(str(finding) for finding in findings if not finding.passed)
print("CAME" + json.dumps(came))
"""
OWNER = r"Encoder '{0}' of stranger-{1} 1\.0 \(stranger_{2}:Plugin\) "
# What is typed → what has to be said, as a regular expression for all of it.
SAID = {
    "color_histogram": "works: color_histogram",
    "import_error": "BrokenPlugin: {owner}cannot be imported: ModuleNotFoundError: .*that_nobody_has.*",
    "exits": "BrokenPlugin: {owner}cannot be imported: SystemExit: good-bye.*",
    "wrong_class": "BrokenPlugin: {owner}is <class .*>; wanted a subclass of merv.Encoder.*",
    "broken": "BrokenPlugin: {owner}cannot be created: RuntimeError: no sun today.*",
    "contract": "BrokenPlugin: {owner}was made for contract 2.0 of encoders; merv .* Upgrade merv.*",
    "slow": "works: stranger_slow",
    "fake": "AmbiguousPlugin: .* by merv [^ ]+ and stranger-collision 1.0. Type 'merv:fake' or '.*:fake'.",
    "stranger-collision:fake": "works: stranger_collision",
    "merv:fake": "works: merv.encoders.fake",
}


def main() -> int:
    """Build, install, try; the number of rows that are not as they should be decides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="of an environment that has merv's wheel")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        work = Path(folder)
        python = str(
            args.python.absolute() if args.python else new_environment(work)
        )  # not resolve()d: a link
        install(python, [wheel(source, work) for source in (*strangers(work), EXAMPLE)])
        rows = judge(*attempt(python, work))
        took_s = time.perf_counter() - start
    good = sum(row[0] for row in rows)
    text = "\n".join(f"{'ok  ' if row[0] else 'FAIL'}  {row[1]:26} {row[2]}" for row in rows)
    text += f"\n{good} of {len(rows)} as they should be\n"
    print(f"{text}{took_s:.0f} s")
    if args.out:
        versions = f"merv {version('merv')}, Python {platform.python_version()}, {platform.system()}"
        args.out.write_text(f"benchmarks/plugins/wheels.py: {versions}\n\n{text}")
    return int(good < len(rows))


EXAMPLE = ROOT / "examples" / "third_party_encoder"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints, stdout first; without the checkout on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} {command[1]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return f"{done.stdout}\n{done.stderr}"


def new_environment(work: Path) -> Path:
    """An environment with merv's wheel in it; its Python."""
    run(UV, "build", "--quiet", "--out-dir", work / "merv", ROOT)
    run(UV, "venv", "--quiet", "--python", sys.executable, work / "env")
    python = work / "env" / "bin" / "python"
    merv = next((work / "merv").glob("*.whl"))
    run(UV, "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt", merv)
    return python


def strangers(work: Path) -> list[Path]:
    """The sources of all STRANGERS."""
    folders = []
    for name, (entry, source) in STRANGERS.items():
        folder = work / name
        folder.mkdir()
        module = name.replace("-", "_")
        project = PROJECT.format(name=name, module=module, entry=entry)
        (folder / "pyproject.toml").write_text(project)
        (folder / f"stranger_{module}.py").write_text(f"print('imported {name}')\n{source}\n")
        folders.append(folder)
    return folders


def wheel(source: Path, work: Path) -> Path:
    """The wheel of a project."""
    out = work / "wheels" / source.name
    run(
        UV,
        "build",
        "--quiet",
        "--wheel",
        "--no-build-isolation",
        "--python",
        sys.executable,
        "--out-dir",
        out,
        source,
    )
    return next(out.glob("*.whl"))


def install(python: str, wheels: list[Path]) -> None:
    """As pip would; merv is there already."""
    run(UV, "pip", "install", "--quiet", "--no-deps", "--python", python, *wheels)


def attempt(python: str, work: Path) -> tuple[str, str, dict[str, str]]:
    """What `merv encoders`, `merv encoders --long` and the use of each plug-in print, in another folder."""
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    merv = Path(python).with_name("merv")
    plain = run(merv, "encoders", cwd=elsewhere)
    long = run(merv, "encoders", "--long", cwd=elsewhere)
    used = run(python, "-c", USE.replace("NAMES", repr(list(SAID))), cwd=elsewhere)
    came = json.loads(next(line for line in used.splitlines() if line.startswith("CAME"))[4:])
    return plain, long, came


def judge(plain: str, long: str, came: dict[str, str]) -> list[tuple[bool, str, str]]:
    """(as it should be, what was tried, what came) of everything."""
    rows = [("imported" not in plain, "merv encoders", "imports nothing")]
    for name, (entry, _) in STRANGERS.items():
        line = rf"^{entry} +stranger-{name} +1\.0$"
        rows.append((bool(re.search(line, plain, re.MULTILINE)), "merv encoders", f"lists {entry} of {name}"))
    for name in ("import-error", "exit", "wrong-class", "contract"):
        found = re.search(rf"^{STRANGERS[name][0]} +stranger-{name} +1\.0 +broken: .*$", long, re.MULTILINE)
        rows.append((bool(found), "merv encoders --long", found[0] if found else long))
    rows.append(
        (
            bool(re.search(r"^color_histogram/base .* ok ", long, re.M)),
            "merv encoders --long",
            "hides nothing",
        )
    )
    owners = {
        entry: OWNER.format(entry, name, name.replace("-", "_")) for name, (entry, _) in STRANGERS.items()
    }
    for typed, wanted in SAID.items():
        pattern = wanted.replace("{owner}", owners.get(typed, ""))
        rows.append((bool(re.fullmatch(pattern, came[typed], re.DOTALL)), typed, came[typed]))
    slow = owners["slow"] + r"took \d+\.\d s to import; wanted: under 3 s\..*"
    rows.append((bool(re.search(slow, came["slow, log"])), "slow, its warning", came["slow, log"]))
    rows.append((came["tokens"] == "[1, 196, 32]", "MultiEncoder", f"tokens {came['tokens']}"))
    rows.append((str(ROOT) not in came["installed"], "merv", "is the wheel, not the checkout"))
    rows.append((not came["checks"], "color_histogram, checked", came["checks"] or "keeps the contract"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
