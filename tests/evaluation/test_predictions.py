"""Kept answers: reading, scoring and comparing them."""

import json
import re

import pytest

from merv.cli.main import main
from merv.errors import DataError
from merv.evaluation.predictions import parse, read_predictions, table

OPEN = {"answer": ["2", "two"], "output": "Two.", "video": "a.mp4", "kind": "count"}
CHOICE = {"options": ["a dog", "a cat"], "answer": 1, "output": "B", "video": "a.mp4"}


def write(path, rows):
    path.write_text("\n".join(json.dumps({"id": n, **row}) for n, row in enumerate(rows)))
    return str(path)


@pytest.mark.parametrize("answer", [1, "B", "a cat"])
def test_right_option_is_a_number_a_letter_or_a_text(answer):
    assert parse({**CHOICE, "answer": answer}, "line").right == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "one of the 2 options"),
        ({"answer": "C"}, "one of the 2 options"),
        ({"answer": True}, "one of the 2 options"),
        ({"log_likelihoods": [0.5]}, "a number for each option"),
        ({"log_likelihoods": [0.5, float("nan")]}, "a number for each option"),
        ({"log_likelihoods": [0.5, 10**400]}, "a number for each option"),
        ({"output": 3}, "a text or null"),
        ({"options": [{}]}, "options to be a text"),
    ],
)
def test_malformed_row_is_named(tmp_path, change, message):
    path = write(tmp_path / "p.jsonl", [CHOICE, {**CHOICE, **change}])
    with pytest.raises(DataError, match=f"p.jsonl:2: .*{message}"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prediction"),
        ('{"answer": "a"}', "p.jsonl:1: output missing"),
        ("[1]", "p.jsonl:1: expected a JSON object, got list"),
        ("{", "p.jsonl:1: expected a JSON object"),
        ('{"id": 1, "answer": "a", "output": ""}\n' * 2, "p.jsonl:2: the id '1' occurs twice"),
        ('{"answer": [], "output": ""}', "at least one answer"),
    ],
)
def test_malformed_file_is_an_error(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path / "p.jsonl")


def test_file_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["score", str(tmp_path / "p.jsonl")]) == 2
    assert "p.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["", None, "(", ")", "I cannot tell."])
def test_answers_that_choose_nothing_stay_in_the_denominator(output):
    (row,) = table([parse(CHOICE, "line"), parse({**CHOICE, "output": output}, "line")])
    assert (row.metrics["score"].mean, row.metrics["score"].items) == (0.5, 2)
    assert row.not_parsed == 0.5


def test_table_has_a_row_for_each_kind(tmp_path):
    rows = table([parse(row, "line") for row in (OPEN, {**OPEN, "output": "three"}, CHOICE)])
    assert [row.name for row in rows] == ["all", "count"]
    assert rows[0].metrics["score"].mean == pytest.approx(2 / 3)
    assert rows[0].metrics["choice"].items == 1
    assert rows[1].metrics["normalized"].mean == 0.5
    assert rows[1].metrics["exact"].mean == 0


def test_likelihoods_are_the_score_and_disagreement_is_counted():
    item = {**CHOICE, "log_likelihoods": [-1.0, -2.0]}
    (row,) = table([parse(item, "line"), parse({**item, "output": "A"}, "line")])
    assert row.metrics["score"].mean == row.metrics["likelihood"].mean == 0
    assert row.metrics["choice"].mean == 0.5
    assert row.disagreement == 0.5


def test_missing_names_and_other_line_separators_are_read(tmp_path):
    rows = [{**OPEN, "video": None, "question": "line\u2028separator"} for _ in range(2)]
    text = "\n".join(json.dumps({"id": None, **row}, ensure_ascii=False) for row in rows)
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    assert [(item.id, item.video) for item in read_predictions(tmp_path / "p.jsonl")] == [
        ("1", "1"),
        ("2", "2"),
    ]


def test_a_kind_may_be_called_all():
    rows = table([parse({**OPEN, "kind": "all"}, "line"), parse({**OPEN, "output": ""}, "line")])
    assert [(row.name, row.metrics["score"].items) for row in rows] == [("all", 2), ("all", 1), ("count", 1)]


def test_runs_with_other_scores_are_not_compared(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", [CHOICE])
    second = write(tmp_path / "b.jsonl", [{**CHOICE, "log_likelihoods": [-1, -2]}])
    assert main(["compare", first, second]) == 2
    assert "in one run only" in capsys.readouterr().err


def test_score_prints_a_table(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", [OPEN, CHOICE, {**CHOICE, "video": "b.mp4", "output": ""}])
    assert main(["score", path]) == 0
    first, line, kind = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["items", "videos", "score"]
    assert line.split()[:4] == ["all", "3", "2", "66.7%"]
    assert kind.split()[0] == "count"
    assert main(["score", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["not_parsed"] == pytest.approx(1 / 3)


def test_compare_prints_the_difference_and_the_flips(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", [{**OPEN, "video": f"{n}.mp4", "output": "one"} for n in range(8)])
    second = write(tmp_path / "b.jsonl", [{**OPEN, "video": f"{n}.mp4"} for n in range(8)])
    assert main(["compare", first, second, "--flips", "1"]) == 0
    out = capsys.readouterr().out
    assert "+100.0%" in out
    assert "8 better, 0 worse" in out
    assert out.count("better in B:") == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([OPEN], r"1 are only in .*a\.jsonl, such as 1; 0 only in .*, such as -"),
        ([OPEN, {**OPEN, "answer": "x"}], "The item 1 has another video, options or answer"),
    ],
)
def test_runs_with_other_questions_are_not_compared(tmp_path, capsys, second, message):
    first = write(tmp_path / "a.jsonl", [OPEN, OPEN])
    assert main(["compare", first, write(tmp_path / "b.jsonl", second)]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
