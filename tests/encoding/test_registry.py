"""The registry of encoders: installed plug-ins, broken plug-ins and unknown names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from merv.encoding.base import Encoder
from merv.encoding.registry import ENCODERS, create_encoder, find_encoder, list_encoders
from merv.errors import (
    AmbiguousPlugin,
    BrokenPlugin,
    EncoderError,
    PluginError,
    UnknownPlugin,
    WeightsError,
)
from merv.utils.plugins import Plugin

ROOT = Path(__file__).parents[2]
GOOD = """
from merv.encoding.base import Encoder
from merv.encoders.fake import Fake

class Good(Fake):
    pass

class NoVariants(Encoder):
    variants = {}

class WrongVariants(Encoder):
    variants = {"base": "a spec"}

class Fussy(Fake):
    def build(self):
        raise RuntimeError("no sun today")

not_a_class = 3
"""


def test_every_file_in_encoders_is_registered():
    files = {path.stem for path in (ROOT / "encoders").glob("[!_]*.py")}
    listed = {e.name: e.value.partition(":")[0] for e in list_encoders() if e.distribution == "merv"}
    assert listed == {name: f"merv.encoders.{name}" for name in files}


def test_listing_imports_nothing(plant):
    plant("sunny-encoders", {"sunny": "raises_sunny:Sunny"}, raises_sunny="raise OSError('no sun today')")
    assert Plugin("sunny", "sunny-encoders", "1.2", "raises_sunny:Sunny", ENCODERS) in list_encoders()
    assert "raises_sunny" not in sys.modules


@pytest.mark.parametrize(
    "source",
    [
        "raise OSError('no sun today')",
        "import sys; sys.exit('no sun today')",
        "x = no sun today",
        "raise BaseException('no sun today')",
        "import no.sun.today",
    ],
)
def test_failed_import_names_the_distribution(plant, source):
    plant("sunny-encoders", {"sunny": "raises_sunny:Sunny"}, raises_sunny=source)
    with pytest.raises(
        BrokenPlugin, match=r"'sunny' of sunny-encoders 1\.2 \(raises_sunny:Sunny\)"
    ) as caught:
        find_encoder("sunny")
    assert caught.value.__cause__ is not None
    assert find_encoder("fake").__name__ == "Fake"  # other encoders still work


def test_keyboard_interrupt_during_import_is_raised(plant):
    plant("sunny-encoders", {"sunny": "raises_sunny:Sunny"}, raises_sunny="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        find_encoder("sunny")


@pytest.mark.parametrize("value", ["no path!", "sunny-module:Good", "sunny_module:Good()"])
def test_malformed_path_names_the_distribution(plant, value):
    plant("sunny-encoders", {"sunny": value}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match=rf"sunny-encoders 1\.2 \({re.escape(value)}\)"):
        find_encoder("sunny")


def test_module_instead_of_class_is_refused(plant):
    plant("sunny-encoders", {"sunny": "sunny_module"}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match="<module 'sunny_module' "):
        find_encoder("sunny")


def test_first_copy_of_a_distribution_on_the_path_is_used(plant, tmp_path, monkeypatch):
    plant("sunny-encoders", {"sunny": "sunny_module:Good"}, sunny_module=GOOD)
    older = tmp_path / "older" / "sunny_encoders-1.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: Sunny_Encoders\nVersion: 1.1\n")
    (older / "entry_points.txt").write_text("[merv.encoders]\nsunny = sunny_module:Good")
    monkeypatch.syspath_prepend(tmp_path / "older")
    assert [e.version for e in list_encoders() if e.name == "sunny"] == ["1.1"]


@pytest.mark.parametrize(
    ("attribute", "fault"),
    [
        ("absent", "AttributeError"),
        ("not_a_class", r"\b3\b"),
        ("Encoder", "variants = None"),
        ("NoVariants", r"has variants = \{\}"),
        ("WrongVariants", r"variants\['base'\] = 'a spec'"),
    ],
)
def test_invalid_encoder_class_is_refused(plant, attribute, fault):
    plant("sunny-encoders", {"sunny": f"sunny_module:{attribute}"}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match=f"sunny-encoders 1.2.*{fault}"):
        find_encoder("sunny")


def test_failed_creation_names_the_distribution(plant):
    plant("sunny-encoders", {"sunny": "sunny_module:Fussy"}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match=r"sunny-encoders 1\.2.*RuntimeError: no sun today"):
        create_encoder("sunny")


def test_name_registered_twice_needs_its_distribution(plant):
    plant("Sunny.Encoders", {"fake": "sunny_module:Good"}, sunny_module=GOOD)
    assert sum(e.name == "fake" for e in list_encoders()) == 2
    with pytest.raises(AmbiguousPlugin) as caught:
        find_encoder("fake")
    assert "Sunny.Encoders 1.2" in str(caught.value)
    assert "'Sunny.Encoders:fake' or 'merv:fake'" in str(caught.value)
    assert find_encoder("merv:fake").__name__ == "Fake"
    assert find_encoder("sunny-encoders:fake").__name__ == "Good"  # normalized as by pip


def test_class_without_distribution_is_found_by_its_path(plant):
    plant("unrelated", {}, sunny_module=GOOD)
    assert isinstance(create_encoder("sunny_module:Good", weights=None), Encoder)


def test_path_is_found_if_a_distribution_has_the_name_of_the_module(plant):
    plant("sunny-module", {"good": "sunny_module:Good"}, sunny_module=GOOD)
    assert find_encoder("sunny_module:good") is find_encoder("sunny_module:Good")


def test_missing_class_of_a_module_is_broken(plant):
    plant("unrelated", {}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match=r"'Bad' \(sunny_module:Bad\)"):
        find_encoder("sunny_module:Bad")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownPlugin, match=r"'siglp'.*'siglip'.*clip, dinov2, .*merv plugins encoders"):
        find_encoder("siglp")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nowhere:Custom", UnknownPlugin),
        ("sunny_module.Good", UnknownPlugin),
        ("folder/custom.py:Custom", EncoderError),
        ("/folder/custom.py", EncoderError),
    ],
)
def test_error_for_a_wrong_class_path_explains_module_class(plant, name, error):
    plant("unrelated", {}, sunny_module=GOOD)
    with pytest.raises(error, match=rf"{re.escape(name)}.*module:Class"):
        create_encoder(name)


@pytest.mark.parametrize("name", ["", ":", "nowhere:Encoder", "nowhere.at_all:Encoder", "merv-:fake/"])
def test_every_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UnknownPlugin, match="clip, dinov2"):
        find_encoder(name)


def test_name_can_contain_a_variant():
    assert create_encoder("fake/video").variant == "video"
    assert create_encoder("merv:fake/video").variant == "video"
    with pytest.raises(EncoderError, match=r"'fake'.*'video'.*'image'"):
        create_encoder("fake/video", variant="image")


def test_variant_argument_may_repeat_that_of_the_name():
    assert create_encoder("fake/video", variant=None).variant == "video"
    assert create_encoder("fake/video", variant="video").variant == "video"


def test_slash_without_variant_is_refused():
    with pytest.raises(EncoderError, match="'fake/'"):
        create_encoder("fake/")


def test_unknown_option_raises_plugin_error():
    with pytest.raises(PluginError, match=r"'fake'.*'pretrained'.*variant, weights, preset") as caught:
        create_encoder("fake", pretrained=False)
    assert not isinstance(caught.value, BrokenPlugin)


@pytest.mark.parametrize("weights", [False, True, "", 3])
def test_invalid_weights_argument_raises_weights_error(weights):
    with pytest.raises(WeightsError, match=f"weights={weights!r}"):
        create_encoder("fake", weights=weights)


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(EncoderError, match=r"'vidio'.*'video'.*image, video"):
        create_encoder("fake/vidio")


def core_files() -> list[Path]:
    return sorted((ROOT / "merv").rglob("*.py"))


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_no_encoder(path):
    assert not [name for name in imported_by(path) if f"{name}.".startswith(("merv.encoders.", "encoders."))]


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_does_not_compare_encoder_names(path):
    names = {e.name for e in list_encoders() if e.distribution == "merv"}
    compared = {
        constant.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    assert not names & compared


def test_import_merv_imports_nothing_heavy():
    code = (
        "import merv, sys; print(sorted({'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
