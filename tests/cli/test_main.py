"""The command line: fast help, exit statuses, errors without a traceback, listing and checking encoders."""

import subprocess
import sys

import pytest

from merv.cli import main as cli
from merv.encoding.registry import ENCODERS
from merv.errors import MervError
from merv.testing.encoder_checks import ENCODER_CHECKS


def merv(*arguments: str) -> int:
    """Run `merv` and return its exit status, also when argparse exits."""
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        return exit.code or 0


FUSSY = """
from merv.encoders.fake import Fake

class Fussy(Fake):
    def build(self):
        raise RuntimeError("out of paint")
"""


@pytest.fixture
def command(monkeypatch):
    """Add a command `try` that runs the given function."""

    def add(run, add_arguments=lambda parser: None):
        module = type(sys)("merv.cli.try")
        module.run = run
        if add_arguments is not None:
            module.add_arguments = add_arguments
        monkeypatch.setitem(sys.modules, "merv.cli.try", module)
        monkeypatch.setitem(cli.COMMANDS, "try", "Try.")

    return add


def test_help_lists_every_command(capsys):
    assert merv("--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and summary in text for name, summary in cli.COMMANDS.items())


def test_no_arguments_show_the_help(capsys):
    assert merv() == 0
    assert "usage: merv COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["encoders"], ["encoders", "--help"], ["download", "--help"]]
)
def test_fast_commands_import_nothing_heavy(arguments):
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print({'torch', 'lightning', 'transformers', 'av'} & set(sys.modules)))\n"
        f"from merv.cli.main import main; main({arguments})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_has_an_example(name, capsys):
    assert merv(name, "--help") == 0
    assert "merv " in capsys.readouterr().out.partition("\n")[2]


@pytest.mark.parametrize("name", ["ask", "average", "convert"])
def test_command_that_loads_models_imports_nothing_from_the_current_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert merv(name, "--help") == 0
    assert str(tmp_path) not in sys.path
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert merv("encoders", "--help") == 0
    assert str(tmp_path) in sys.path


def test_unknown_command_suggests_the_nearest(capsys):
    assert merv("encoder") == 2
    assert "'encoders'" in capsys.readouterr().err


def test_merv_error_is_a_message_and_status_2(command, capsys):
    command(lambda args: (_ for _ in ()).throw(MervError("clip.mp4 is empty")))
    assert merv("try") == 2
    assert capsys.readouterr().err == "merv: clip.mp4 is empty\n"


def test_merv_debug_shows_the_traceback(command, monkeypatch):
    monkeypatch.setenv("MERV_DEBUG", "1")
    command(lambda args: (_ for _ in ()).throw(MervError("clip.mp4 is empty")))
    with pytest.raises(MervError):
        merv("try")


def test_interrupt_is_status_130(command):
    command(lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert merv("try") == 130


def test_raw_command_gets_its_arguments_unparsed(command):
    arguments = []
    command(arguments.extend, add_arguments=None)
    assert merv("try", "--config", "demo", "--help", "--", "-x") == 0
    assert arguments == ["--config", "demo", "--help", "--", "-x"]


def test_command_gets_parsed_arguments_and_returns_its_status(command):
    command(lambda args: args.number, add_arguments=lambda parser: parser.add_argument("number", type=int))
    assert merv("try", "7") == 7


def test_encoders_lists_name_distribution_and_version(capsys):
    assert merv("encoders") == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["name", "distribution", "version"]
    assert {"dinov2", "siglip", "clip", "vivit", "languagebind", "fake"} <= {row[0] for row in rows}


@pytest.fixture
def long_rows(plant, monkeypatch, capsys):
    """Return the rows of `merv encoders --long` for `fake` and the encoders of a module, by name."""

    def run(module, **classes):
        entries = {name: f"sunny_module:{value}" for name, value in classes.items()}
        plant("sunny-encoders", entries, sunny_module=module)
        plugins = [plugin for plugin in ENCODERS.plugins() if plugin.name in ("fake", *classes)]
        monkeypatch.setattr("merv.utils.plugins.Registry.plugins", lambda self: plugins)
        assert merv("encoders", "--long") == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        return {row[0]: row[1:] for row in rows}

    return run


def test_encoders_long_shows_variants_and_broken_plug_ins(long_rows):
    rows = long_rows("raise OSError('no\\nsun')", sunny="Sunny")
    assert rows["sunny"] == ["sunny-encoders", "1.2", "broken:", "no", "sun"]
    assert rows["fake/video"][0] == "merv"
    assert rows["fake/video"][2:5] == ["ok", "16", "8×2×2"]


NEEDY = """
from merv.encoders.fake import Fake
from merv.errors import MissingDependency

class Needy(Fake):
    def build(self):
        import a_package_that_nobody_has

class Extra(Fake):
    def build(self):
        raise MissingDependency("pip install 'package[extra]'")

class Picky(Fake):
    def __init__(self, taste, **options):
        super().__init__(**options)
"""


def test_encoders_long_shows_that_a_package_is_missing(long_rows):
    rows = long_rows(NEEDY, needy="Needy", extra="Extra", picky="Picky")
    assert rows["needy"][2] == "broken:"
    assert "'a_package_that_nobody_has'" in rows["needy"]
    assert rows["extra"][2:5] == ["missing:", "pip", "install"]
    assert rows["picky"][2:4] == ["not", "created:"]
    assert "'taste'" in rows["picky"]


def test_check_of_a_correct_encoder_is_status_0(capsys):
    assert merv("encoders", "check", "fake", "fake/video") == 0
    assert "FAIL" not in capsys.readouterr().out


def test_check_of_a_faulty_encoder_is_status_1_and_names_its_distribution(plant, capsys):
    plant("sunny-encoders", {"fussy": "sunny_module:Fussy"}, sunny_module=FUSSY)
    assert merv("encoders", "check", "fussy", "fake") == 1
    report = capsys.readouterr().out
    assert "sunny-encoders" in report
    assert f"fails 1 of {len(ENCODER_CHECKS)} checks" in report


def test_check_of_an_encoder_that_cannot_be_imported_names_its_distribution(plant, capsys):
    plant("sunny-encoders", {"absent": "nowhere:X"})
    assert merv("encoders", "check", "absent") == 2
    assert "sunny-encoders" in capsys.readouterr().err


def test_check_without_a_name_is_an_error(capsys):
    assert merv("encoders", "check") == 2
    assert "encoders" in capsys.readouterr().err


def test_check_of_an_unknown_encoder_is_status_2(capsys):
    assert merv("encoders", "check", "siglp") == 2
    assert "'siglip'" in capsys.readouterr().err


def test_version_is_that_of_the_distribution(capsys):
    import merv as package

    assert merv("--version") == 0
    assert capsys.readouterr().out == f"merv {package.__version__}\n"
