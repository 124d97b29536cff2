"""The registry: what is installed, what is broken, what is typed wrongly."""

import ast
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


def test_every_first_party_encoder_is_registered_by_its_file():
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
def test_a_module_that_does_not_import_is_reported_with_its_distribution(plant, source):
    plant("sunny-encoders", {"sunny": "raises_sunny:Sunny"}, raises_sunny=source)
    with pytest.raises(
        BrokenPlugin, match=r"'sunny' of sunny-encoders 1\.2 \(raises_sunny:Sunny\)"
    ) as caught:
        find_encoder("sunny")
    assert caught.value.__cause__ is not None
    assert find_encoder("fake").__name__ == "Fake"  # and hides nothing


def test_an_interrupt_during_an_import_is_the_users(plant):
    plant("sunny-encoders", {"sunny": "raises_sunny:Sunny"}, raises_sunny="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        find_encoder("sunny")


@pytest.mark.parametrize("value", ["no path!", "sunny-module:Good", "sunny_module:Good()"])
def test_a_malformed_entry_is_refused(plant, value):
    plant("sunny-encoders", {"sunny": value}, sunny_module=GOOD)
    with pytest.raises(
        BrokenPlugin, match=r'of sunny-encoders 1.2 .* is no path to a class; wanted "module:Class"'
    ):
        find_encoder("sunny")


def test_a_module_instead_of_a_class_is_refused(plant):
    plant("sunny-encoders", {"sunny": "sunny_module"}, sunny_module=GOOD)
    with pytest.raises(
        BrokenPlugin, match=r"is <module 'sunny_module' .*; wanted a subclass of merv.Encoder"
    ):
        find_encoder("sunny")


def test_a_slow_import_is_told_with_its_distribution(plant, monkeypatch, caplog):
    monkeypatch.setattr("merv.utils.plugins.SLOW_S", 0.01)
    plant(
        "sunny-encoders", {"sunny": "sunny_module:Good"}, sunny_module="import time; time.sleep(0.02)" + GOOD
    )
    assert find_encoder("sunny").__name__ == "Good"
    (record,) = caplog.records
    assert "Encoder 'sunny' of sunny-encoders 1.2 (sunny_module:Good) took 0." in record.getMessage()
    assert "s to import; wanted: under 0.01 s." in record.getMessage()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("entry_points.txt", "[merv.encoders]\nsunny is sunny_module:Good", "TypeError"),
        ("METADATA", "", "its METADATA has no name or no version"),
    ],
)
def test_a_damaged_distribution_is_told_and_hides_nothing(plant, tmp_path, caplog, file, text, said):
    plant("sunny-encoders", {"sunny": "sunny_module:Good"}, sunny_module=GOOD)
    (tmp_path / "sunny_encoders-1.2.dist-info" / file).write_text(text)
    names = [e.name for e in list_encoders()]
    assert "fake" in names
    assert "sunny" not in names
    assert "sunny_encoders-1.2.dist-info cannot be read" in caplog.text
    assert said in caplog.text


@pytest.mark.parametrize("name", ["sunny/vit", "sunny:vit"])
def test_a_name_that_cannot_be_typed_is_told_and_hides_nothing(plant, caplog, name):
    plant("sunny-encoders", {"sunny": "sunny_module:Good", name: "sunny_module:Good"}, sunny_module=GOOD)
    assert [e.name for e in list_encoders() if e.distribution == "sunny-encoders"] == ["sunny"]
    assert (
        f"Encoder '{name}' of sunny-encoders 1.2 is not listed: / and : cannot be in a name." in caplog.text
    )


def test_of_two_copies_of_a_distribution_the_first_on_the_path_counts(plant, tmp_path, monkeypatch):
    plant("sunny-encoders", {"sunny": "sunny_module:Good"}, sunny_module=GOOD)
    older = tmp_path / "older" / "sunny_encoders-1.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: Sunny_Encoders\nVersion: 1.1\n")
    (older / "entry_points.txt").write_text("[merv.encoders]\nsunny = sunny_module:Good")
    monkeypatch.syspath_prepend(tmp_path / "older")
    assert [e.version for e in list_encoders() if e.name == "sunny"] == ["1.1"]


@pytest.mark.parametrize(
    ("contract", "fault"),
    [
        ("2.0", "was made for contract 2.0 of encoders; merv .* has 1.0. Upgrade merv, or"),
        ("1.1", "was made for contract 1.1 of encoders; merv .* has 1.0. Upgrade merv, or"),
        ("0.9", "was made for contract 0.9 of encoders; merv .* has 1.0. Upgrade the plug-in, or"),
        (1, 'has contract = 1; wanted "major.minor", as in "1.0"'),
    ],
)
def test_what_was_made_for_another_contract_is_refused(plant, contract, fault):
    plant(
        "sunny-encoders",
        {"sunny": "sunny_module:Good"},
        sunny_module=GOOD.replace("    pass", f"    contract = {contract!r}", 1),
    )
    with pytest.raises(BrokenPlugin, match=f"sunny-encoders 1.2.*{fault}"):
        find_encoder("sunny")


def test_what_was_made_for_an_earlier_minor_contract_fits(plant, monkeypatch):
    monkeypatch.setattr("merv.encoding.base.CONTRACT", "1.3")
    plant("sunny-encoders", {"sunny": "sunny_module:Good"}, sunny_module=GOOD)
    assert find_encoder("sunny").contract == "1.0"


@pytest.mark.parametrize(
    ("attribute", "fault"),
    [
        ("absent", "AttributeError"),
        ("not_a_class", "is 3; wanted a subclass of merv.Encoder"),
        ("Encoder", "wanted a dict of name → merv.EncoderSpec"),
        ("NoVariants", r"has variants = \{\}"),
        ("WrongVariants", "declares 'base' as no merv.EncoderSpec"),
    ],
)
def test_what_is_no_encoder_is_refused_on_arrival(plant, attribute, fault):
    plant("sunny-encoders", {"sunny": f"sunny_module:{attribute}"}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match=f"sunny-encoders 1.2.*{fault}"):
        find_encoder("sunny")


def test_an_encoder_that_cannot_be_created_is_reported_with_its_distribution(plant):
    plant("sunny-encoders", {"sunny": "sunny_module:Fussy"}, sunny_module=GOOD)
    with pytest.raises(
        BrokenPlugin, match=r"sunny-encoders 1.2.*cannot be created: RuntimeError: no sun today"
    ):
        create_encoder("sunny")


def test_a_name_registered_twice_wants_its_distribution(plant):
    plant("Sunny.Encoders", {"fake": "sunny_module:Good"}, sunny_module=GOOD)
    assert sum(e.name == "fake" for e in list_encoders()) == 2
    with pytest.raises(AmbiguousPlugin) as caught:
        find_encoder("fake")
    assert "Sunny.Encoders 1.2" in str(caught.value)
    assert "Type 'Sunny.Encoders:fake' or 'merv:fake'." in str(caught.value)
    assert find_encoder("merv:fake").__name__ == "Fake"
    assert find_encoder("sunny-encoders:fake").__name__ == "Good"  # spelt as pip would accept it


def test_an_unpackaged_class_goes_by_its_path(plant):
    plant("unrelated", {}, sunny_module=GOOD)
    assert isinstance(create_encoder("sunny_module:Good", weights=None), Encoder)


def test_a_path_wins_over_nothing_when_a_distribution_has_the_modules_name(plant):
    plant("sunny-module", {"good": "sunny_module:Good"}, sunny_module=GOOD)
    assert find_encoder("sunny_module:good") is find_encoder("sunny_module:Good")


def test_an_unpackaged_class_that_is_not_there_is_broken(plant):
    plant("unrelated", {}, sunny_module=GOOD)
    with pytest.raises(BrokenPlugin, match=r"Encoder 'Bad' \(sunny_module:Bad\) cannot be imported"):
        find_encoder("sunny_module:Bad")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownPlugin) as caught:
        find_encoder("siglp")
    assert str(caught.value).startswith(
        "Unknown encoder 'siglp'. Did you mean 'siglip'? Installed: clip, dinov2, "
    )
    assert str(caught.value).endswith(". See `merv plugins encoders`.")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:Own", "no module 'nowhere' can be imported from here"),
        ("sunny_module.Good", "A class goes by module:Class: 'sunny_module:Good'"),
        ("plug/own.py:Own", "'plug/own.py:Own' is a file; wanted module:Class, as 'own:Own'"),
        ("/plug/own.py", "is a file; wanted module:Class, as 'own:Class'"),
    ],
)
def test_a_class_that_is_typed_in_another_way_is_told_how(plant, name, said):
    plant("unrelated", {}, sunny_module=GOOD)
    with pytest.raises(UnknownPlugin, match=said):
        create_encoder(name)


@pytest.mark.parametrize("name", ["", ":", "nowhere:Encoder", "nowhere.at_all:Encoder", "merv-:fake/"])
def test_no_name_crashes_the_search(name):
    with pytest.raises(UnknownPlugin, match="Installed: clip"):
        find_encoder(name)


def test_a_name_may_carry_a_variant():
    assert create_encoder("fake/video").variant == "video"
    assert create_encoder("merv:fake/video").variant == "video"
    with pytest.raises(
        EncoderError, match=r"Two variants of 'fake': 'video' in its name and 'image'. Give one."
    ):
        create_encoder("fake/video", variant="image")


def test_no_variant_beside_that_of_the_name_is_no_second_one():
    assert create_encoder("fake/video", variant=None).variant == "video"
    assert create_encoder("fake/video", variant="video").variant == "video"


def test_a_slash_without_a_variant_is_refused():
    with pytest.raises(EncoderError, match=r"No variant after the / of 'fake/'. Type 'fake' for the default"):
        create_encoder("fake/")


def test_an_option_that_no_encoder_has_is_the_callers_mistake():
    with pytest.raises(PluginError) as caught:
        create_encoder("fake", pretrained=False)
    assert str(caught.value) == "Encoder 'fake' has no option 'pretrained'. It has: variant, weights, preset."
    assert not isinstance(caught.value, BrokenPlugin)


def test_an_option_that_an_encoder_ought_to_have_is_its_own_fault(plant):
    source = GOOD + "\nclass Stubborn(Fake):\n    def __init__(self):\n        super().__init__()\n"
    plant("sunny-encoders", {"sunny": "sunny_module:Stubborn"}, sunny_module=source)
    assert create_encoder("sunny").variant == "image"
    with pytest.raises(BrokenPlugin, match=r"sunny-encoders 1.2.*unexpected keyword argument 'weights'"):
        create_encoder("sunny", weights=None)


@pytest.mark.parametrize("weights", [False, True, "", 3])
def test_weights_that_name_nothing_are_the_callers_mistake(weights):
    with pytest.raises(WeightsError, match=f"weights={weights!r} names none. Wanted: 'pretrained', a folder"):
        create_encoder("fake", weights=weights)


def test_an_unknown_variant_names_the_ones_there_are():
    with pytest.raises(EncoderError, match=r"'vidio'.* Did you mean 'video'. There are: image, video"):
        create_encoder("fake/vidio")


def core_files() -> list[Path]:
    return sorted((ROOT / "merv").rglob("*.py"))


def imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_encoder(path):
    assert not [name for name in imported_by(path) if f"{name}.".startswith(("merv.encoders.", "encoders."))]


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_decides_nothing_by_the_name_of_an_encoder(path):
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
