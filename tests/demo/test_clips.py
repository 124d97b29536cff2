"""The demo's clips and questions: exact plans, disjoint splits, correct and balanced answers."""

import random
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageChops

from merv.demo import clips, material, questions
from merv.demo.clips import FPS, SIZE, ClipPlan, Shot, View, make_clips, plan_clip, plan_clips, split_of
from merv.demo.material import Thing
from merv.errors import DataError, MissingDependency

NAMES = ("red", "green", "blue", "white", "black", "gray")
SPLITS = ("train", "held_out", "unseen")


@pytest.fixture
def things(tmp_path) -> list[Thing]:
    """Six files of one color each; the last one is unseen."""
    result = []
    for name in NAMES:
        Image.new("RGB", (300, 240), name).save(tmp_path / f"{name}.png")
        result.append(Thing(name, "photograph", tmp_path / f"{name}.png", "credit", unseen=name == "gray"))
    return result


def still(name: str, start_s: float, end_s: float, **other) -> Shot:
    view = View(0.5, 0.5, 1.0)
    defaults = {"move": "still", "begin": view, "end": view, "fade_s": 0.0, "brightness": 1.0}
    return Shot(name, start_s, end_s, **{**defaults, "mirrored": False, "excerpt": 0.0, **other})


def solid(*names: str) -> dict[str, list[Image.Image]]:
    return {name: [Image.new("RGB", (300, 240), name)] for name in names}


def decode(path: Path) -> tuple[list[float], np.ndarray]:
    """Times in seconds and the mean color of every frame, [T, 3]."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [time for time, _ in frames], np.stack([pixels.mean((0, 1)) for _, pixels in frames])


def fake_things(count: int = 12, unseen: int = 2) -> list[Thing]:
    return [Thing(f"thing{i}", "photograph", Path("nowhere"), "", unseen=i < unseen) for i in range(count)]


# Plans


def test_shots_have_no_gaps_and_fades_do_not_overlap():
    for plan in plan_clips("train", 60, 0, fake_things()):
        assert plan.shots[0].start_s == 0
        assert plan.shots[0].fade_s == 0
        assert clips.FRAMES[0] <= plan.frames <= clips.FRAMES[1]
        for shot, following in zip(plan.shots, plan.shots[1:], strict=False):
            assert shot.end_s == following.start_s
            assert shot.end_s - shot.start_s > (shot.fade_s + following.fade_s) / 2
        assert len(set(plan.names)) == len(plan.names)


def test_views_stay_inside_the_picture():
    for plan in plan_clips("train", 40, 1, fake_things()):
        for shot in plan.shots:
            for view in (shot.begin, shot.end):
                left, top, right, bottom = view.box((384, 288))
                assert 0 <= left < right <= 384
                assert 0 <= top < bottom <= 288
                assert (right - left) / (bottom - top) == pytest.approx(SIZE[0] / SIZE[1], rel=1e-3)


def test_plan_depends_only_on_seed_split_and_index():
    things = fake_things()
    longer = plan_clips("train", 12, 5, things)
    assert plan_clips("train", 8, 5, things) == longer[:8]
    assert plan_clips("train", 8, 6, things) != longer[:8]
    assert len({plan.key for plan in longer}) == 12


def test_train_and_held_out_share_no_sequence_of_things():
    things = fake_things(8)
    orders = {s: {plan.names for plan in plan_clips(s, 400, 0, things)} for s in ("train", "held_out")}
    assert orders["train"].isdisjoint(orders["held_out"])
    train, held_out = ({name for order in orders[s] for name in order} for s in ("train", "held_out"))
    assert train == held_out


def test_unseen_things_are_in_every_unseen_clip_and_in_no_other():
    things = fake_things()
    unseen = {thing.name for thing in things if thing.unseen}
    for split in SPLITS:
        for plan in plan_clips(split, 40, 0, things):
            assert bool(unseen & set(plan.names)) == (split == "unseen")


def test_impossible_split_is_an_error():
    with pytest.raises(DataError, match="'unseen'"):
        plan_clips("unseen", 1, 0, fake_things(4, unseen=0))


# Files


def test_cut_is_at_the_planned_frame(tmp_path):
    plan = ClipPlan((still("red", 0, 1.25), still("blue", 1.25, 3)))
    clips.render(plan, tmp_path / "cut.mp4", solid("red", "blue"))
    times_s, colors = decode(tmp_path / "cut.mp4")
    assert times_s == pytest.approx([i / FPS for i in range(72)], abs=1e-4)
    assert (colors[:, 0] > 200).tolist() == [i < 30 for i in range(72)]
    assert (colors[:, 2] > 200).tolist() == [i >= 30 for i in range(72)]


def test_fade_is_centered_on_the_planned_time(tmp_path):
    plan = ClipPlan((still("black", 0, 1.5), still("white", 1.5, 3, fade_s=12 / FPS)))
    clips.render(plan, tmp_path / "fade.mp4", solid("black", "white"))
    luminance = decode(tmp_path / "fade.mp4")[1].mean(1) / 255
    ramp = [min(1, max(0, (i - 30 + 0.5) / 12)) for i in range(72)]
    assert luminance == pytest.approx(ramp, abs=0.05)


def test_file_shows_the_drawn_frames(tmp_path, things):
    [plan] = plan_clips("train", 1, 3, things)
    make_clips(tmp_path, [plan], things)
    frames = clips.draw_frames(plan, material.load_pictures(things))
    expected = np.stack([np.asarray(picture).mean((0, 1)) for picture in frames])
    colors = decode(tmp_path / f"{plan.key}.mp4")[1]
    assert len(colors) == plan.frames
    assert np.abs(colors - expected).max() < 6


def test_pan_right_moves_the_picture_left_mirrored_or_not():
    stripes = Image.new("RGB", (300, 240))
    stripes.paste((255, 255, 255), (140, 0, 160, 240))
    pan = {"begin": View(0.1, 0.5, 0.7), "end": View(0.9, 0.5, 0.7), "move": "pan right"}
    for mirrored in (False, True):
        plan = ClipPlan((still("stripes", 0, 3, mirrored=mirrored, **pan),))
        frames = [np.asarray(picture) for picture in clips.draw_frames(plan, {"stripes": [stripes]})]
        columns = [frame.mean((0, 2)).argmax() for frame in (frames[0], frames[36], frames[-1])]
        assert columns == sorted(columns, reverse=True)
        assert columns[0] > columns[-1]


def test_short_footage_plays_forward_and_backward():
    assert [clips._footage_index(i, 8, 4, 1.0) for i in range(8)] == [0, 1, 2, 3, 2, 1, 0, 1]
    assert [clips._footage_index(i, 2, 4, 1.0) for i in range(2)] == [2, 3]
    assert clips._footage_index(5, 8, 1, 0.5) == 0


def test_existing_files_are_kept(tmp_path, things):
    plans = plan_clips("train", 4, 0, things)
    make_clips(tmp_path / "clips", plans[:3], things)
    first = list((tmp_path / "clips").iterdir())
    written = [path.stat().st_mtime_ns for path in first]
    make_clips(tmp_path / "clips", plans, things)
    assert [path.stat().st_mtime_ns for path in first] == written
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {f"{plan.key}.mp4" for plan in plans}


# Material


@pytest.mark.skipif(not all(map(find_spec, ("skimage", "sklearn"))), reason="needs merv[demo]")
def test_photographs_exist_and_differ_and_have_one_word_names():
    photographs = material.photographs()
    pictures = material.load_pictures(photographs)
    assert len(pictures) == len(photographs) == 14
    assert all(thing.name.isalpha() and thing.name.islower() for thing in photographs)
    small = [stills[0].resize((64, 64)) for stills in pictures.values()]
    pairs = [(a, b) for i, a in enumerate(small) for b in small[:i]]
    assert min(np.asarray(ImageChops.difference(a, b)).mean() for a, b in pairs) > 10


def test_footage_is_loaded_from_first_to_last_frame(tmp_path):
    plan = ClipPlan((still("red", 0, 1.25), still("blue", 1.25, 3)))
    clips.render(plan, tmp_path / "film.mp4", solid("red", "blue"))
    film = Thing("film", "footage", tmp_path / "film.mp4", "credit", frames=(29, 33))
    loaded = material.load_pictures([film])["film"]
    assert [np.asarray(picture).mean((0, 1)).argmax() for picture in loaded] == [0, 2, 2, 2]


def test_missing_package_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr(material, "package_folders", lambda name: [])
    with pytest.raises(MissingDependency, match=r"skimage.*demo"):
        material.photographs()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cat\.png"):
        material.load_pictures([Thing("cat", "photograph", tmp_path / "cat.png", "")])


# Questions


def rows(split: str, count: int) -> list[dict]:
    things = fake_things()
    return list(questions.rows(plan_clips(split, count, 0, things), things))


def correct_answer(names: list[str], question: str) -> str:
    """Derive the answer from the words of the question."""
    words = question.replace(":", " ").replace("?", " ").split()
    named = [word for word in words if word.startswith("thing")]
    if "first" in words:
        return names[0]
    if "last" in words:
        return names[-1]
    if "many" in words:
        return ["one", "two", "three", "four"][len(names) - 1]
    if "before" in words:
        return "yes" if names.index(named[0]) < names.index(named[1]) else "no"
    if "When" in words:
        return {0: "start", len(names) - 1: "end"}.get(names.index(named[0]), "middle")
    return "yes" if named[0] in names else "no"


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_correct(split):
    for row in rows(split, 80):
        assert len({question["question"] for question in row["questions"]}) == 5
        for question in row["questions"]:
            shown = [name for name, *_ in row["shots"]]
            assert question["answer"] == correct_answer(shown, question["question"])


def test_answers_are_balanced():
    answers = Counter((q["kind"], q["answer"]) for row in rows("train", 800) for q in row["questions"])
    totals = {kind: sum(n for (k, _), n in answers.items() if k == kind) for kind in questions.KINDS}
    top = {kind: max(n for (k, _), n in answers.items() if k == kind) / totals[kind] for kind in totals}
    assert top["count"] < 0.30
    assert top["when"] < 0.40
    assert max(top["order"], top["present"]) < 0.56
    assert max(top["first"], top["last"]) < 0.2


def test_questions_with_unseen_names_are_unseen_and_of_their_own_kind():
    unseen = {thing.name for thing in fake_things() if thing.unseen}
    for split in SPLITS:
        for question in (question for row in rows(split, 40) for question in row["questions"]):
            words = {*question["question"].replace(":", "").replace("?", "").split(), question["answer"]}
            assert bool(unseen & words) == (question["kind"] == questions.NEW_NAME)
            assert split == "unseen" or question["kind"] != questions.NEW_NAME


def test_no_question_about_a_thing_that_is_visible_in_another():
    cat, eye = (
        Thing(n, "photograph", Path(n), "", also=also) for n, also in (("cat", ("eye",)), ("eye", ()))
    )
    plans = [plan_clip(random.Random(i), ["cat"]) for i in range(20)]
    asked = [q for row in questions.rows(plans, [cat, eye], per_clip=4) for q in row["questions"]]
    assert not any("eye" in question["question"] for question in asked)


def test_questions_are_reproducible():
    assert rows("train", 10) == rows("train", 10)


def test_too_many_questions_are_an_error():
    plan = plan_clip(random.Random(0), ["cat"])
    with pytest.raises(DataError, match=r"cat .*9"):
        questions.questions(plan, ["cat"], random.Random(0), per_clip=9)


def test_majority_accuracy_uses_the_most_common_training_answer():
    def row(*answers: tuple[str, str]) -> dict:
        return {"questions": [{"kind": kind, "answer": answer} for kind, answer in answers]}

    train = [row(("count", "one"), ("count", "one"), ("count", "two"))]
    test = [row(("count", "one"), ("count", "two"), ("first", "x"))]
    assert questions.majority_accuracy(train, test) == {"count": 0.5, "first": 0.0}


def test_order_of_things_decides_the_split():
    things = fake_things(6, unseen=0)
    assert {split_of(pair) for pair in [(a, b) for a in things for b in things if a != b]} == {
        "train",
        "held_out",
    }
