"""`lolo report`: one well-formed page, complete in itself, whatever a folder says; anything damaged is an error."""

import dataclasses
import html.parser
import json
import math
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_files import LEARNER, meta_params

from lolo.cli import main as cli
from lolo.evaluation import long_runs, statistics
from lolo.files import disk, jsonl, settings
from lolo.files.disk import FileError
from lolo.optimizers import weights_file
from lolo.report import charts, markup, meta_training
from lolo.report.meta_training import format_value, train_command
from lolo.report.page import build
from lolo.runtime import environment
from lolo.studies import comparison_report, plots, style, tables
from lolo.studies.rows import save_rows
from lolo.training import doctor, loop, recipes, run_log
from lolo.training.run_folder import RunError

EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&$x^{$\ud800\u202e\0"
NUMBERS = ("alpha_mix", "alpha_loss", "gradient_ratio", "gradient_norm", "signal_to_noise", "inner_steps_per_second")
PER_TASK = ("task_loss", "bc_loss", "delta_task_rms", "delta_bc_rms")
QUICK = Path(__file__).resolve().parent.parent / "experiments" / "quick"


def outer_step(step, tasks):
    """A row as `training.log_step` writes it."""
    row = {name: 0.5 + 0.1 * step for name in NUMBERS}
    row |= {name: [1.0 / (1 + step)] * tasks for name in PER_TASK}
    row |= {"step": step, "dropped": 0, "starts": [0, 50 * step], "reached": [50], "peak_memory_mb": 100}
    return row


def make_run(path, task="books-mlp", steps=6, name="lolo"):
    """A run's folder as it is kept: recipe, log, about, last weights."""
    recipe = settings.with_field(dataclasses.replace(recipes.RECIPES[name], tasks=(task,)), "outer.steps", steps)
    rows = [outer_step(step, 1) for step in range(steps)]
    rows.insert(4, {"step": 3, "validation": {"steps": 1000, "train_loss": 0.5, "held_loss": "nan"}})
    rows.append({"step": steps - 1, "validation": {"steps": 1000, "train_loss": 0.25, "held_loss": 0.125}})
    path.mkdir(parents=True)
    disk.write_json(path / "recipe.json", recipes.to_dict(recipe))
    disk.write_json(
        path / "run.json", {"command": ["lolo", "train", task], "commit": "c0ffee", "versions": {"lolo": task}}
    )
    disk.write_bytes(path / "log.jsonl", "".join(jsonl.json_line(row) + "\n" for row in rows).encode())
    weights_file.write_weights(
        path / "last.safetensors", meta_params(), learner=LEARNER, recipe=recipes.to_dict(recipe)
    )
    return recipe


def make_rows(task="books-mlp", labels=("lolo", "adamw 0.001"), steps=400):
    """Rows of an evaluation with two seeds."""
    length = steps // long_runs.WINDOW
    return [
        statistics.Row(
            task=task,
            optimizer=label,
            meta_seed=0 if label == "lolo" else None,
            seed=seed,
            steps=steps,
            train_loss=0.5 + i + 0.25 * seed,
            train_minimum=0.25,
            held_loss=0.75 + i,
            held={"loss": 0.75 + i},
            diverged=False,
            train_curve=[1.0 / (k + 1) + i for k in range(length)],
            held_curve=[2.0 / (k + 1) + i for k in range(length)],
        )
        for i, label in enumerate(labels)
        for seed in range(2)
    ]


def make_study(path, task="books-mlp", labels=("lolo", "adamw 0.001")):
    """A study's folder: rows, what is known about them, one meta-training."""
    make_run(path / "runs" / "books-mlp-lolo-seed0", task)
    save_rows(path / "rows-books.jsonl", make_rows(task, labels))
    about = {"command": f"lolo eval {task}", "note": task, "unroll": 200, "commit": task, "versions": {task: task}}
    about["weights"] = {task: {"card": {"start_steps_per_250": {"0": 5, "250": 3}}}}
    disk.write_json(path / "about-books.json", about)


class Page(html.parser.HTMLParser):
    """A page taken apart; raises AssertionError where elements do not nest."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> closes itself outside SVG"
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def count(self, tag):
        return self.tags.count(tag)

    def said(self):
        return " ".join(" ".join(self.text).split())


def assert_complete_in_itself(text):
    """Well-formed, no script, nothing that a browser would fetch, every name once, every picture with a label."""
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "image", "foreignobject"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", text)
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    targets = {value[1:] for _, name, value in page.attributes if name == "href"} | set(
        re.findall(r"url\(#([^)]*)", text)
    )
    assert targets <= set(names)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    hidden = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-hidden"]
    assert len(labels) + len(hidden) == page.count("svg") and all(labels)
    assert page.count("caption") == page.count("table") > 0
    assert page.count("h1") == 1 and "lang" in {name for tag, name, _ in page.attributes if tag == "html"}
    return page


def test_a_meta_training(tmp_path):
    recipe = make_run(tmp_path / "run")
    page = assert_complete_in_itself(build([tmp_path / "run"]))
    said = page.said()
    for finding in doctor.examine(tmp_path / "run"):
        assert " ".join(finding.what.split()) in said
    for name, value in settings.fields(recipe).items():
        assert name in said and format_value(value) in said
    assert "6 of 6 outer steps done" in said and "lolo train books-mlp" in said and "c0ffee" in said
    assert weights_file.read_weights(tmp_path / "run" / "last.safetensors").sha256 in said
    assert "0.2500 0.1250 best" in said and "0.5000 nan" in said
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    for words in ("Validation", "Task loss", "Signal-to-noise", "Start steps"):
        assert any(label.startswith(words) for label in labels)


def test_a_run_of_which_only_recipe_and_validations_were_kept(tmp_path):
    make_run(tmp_path / "run")
    rows = [row for row in run_log.log_rows(tmp_path / "run") if "validation" in row]
    for name in ("log.jsonl", "run.json", "last.safetensors"):
        (tmp_path / "run" / name).unlink()
    disk.write_bytes(tmp_path / "run" / "validation.jsonl", "".join(jsonl.json_line(r) + "\n" for r in rows).encode())
    said = assert_complete_in_itself(build([tmp_path / "run"])).said()
    assert "the log of outer steps is not in this folder" in said and "0.2500 0.1250 best" in said
    assert "Health" not in said and "commit not written down" in said


def test_a_study_and_an_evaluation_say_what_the_table_says(tmp_path):
    make_study(tmp_path / "study")
    page = assert_complete_in_itself(build([tmp_path / "study"]))
    said = page.said()
    for line in tables.cells(make_rows(), "lolo"):
        assert " ".join(" ".join(line).split()) in said
    assert "books-mlp, 400 inner steps" in said and "Meta-trainings" in said and "6 of 6 outer steps done" in said
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    assert any("the unroll in meta-training, 200 steps" in label for label in labels) and "lolo eval books-mlp" in said
    shutil.rmtree(tmp_path / "study" / "runs")
    (tmp_path / "study" / "about-books.json").unlink()
    said = assert_complete_in_itself(build([tmp_path / "study"])).said()
    assert "books-mlp, 400 inner steps" in said and "Meta-trainings" not in said and "not written down" in said


def test_a_study_with_parts_shows_the_comparisons_of_each(tmp_path):
    make_study(tmp_path)
    for part in ("long", "figure2"):
        save_rows(tmp_path / part / "rows-books.jsonl", make_rows())
        disk.write_json(tmp_path / part / "about-books.json", {"command": f"made {part}"})
    said = assert_complete_in_itself(build([tmp_path])).said()
    assert said.index("Part figure2") < said.index("made figure2") < said.index("Part long") < said.index("made long")


def test_the_kept_quickstart(tmp_path):
    page = assert_complete_in_itself(build([QUICK]))
    assert "lolo reproduce quick" in page.said() and "best adamw 0.003" in page.said()
    assert any(value.startswith("Start steps") for _, name, value in page.attributes if name == "aria-label")


def test_what_an_evaluation_writes_is_read(tmp_path):
    comparison_report.write_report(tmp_path, "books", make_rows(), {}, "lolo eval adamw:1e-3")
    said = assert_complete_in_itself(build([tmp_path])).said()
    assert "command given lolo eval adamw:1e-3" in said and f"lolo {environment.versions()['lolo']}" in said


def test_several_folders_are_on_one_page_each_once(tmp_path):
    make_run(tmp_path / "a")
    make_study(tmp_path / "b")
    page = assert_complete_in_itself(build([tmp_path / "a", tmp_path / "b", tmp_path / "." / "a"]))
    assert page.count("section") == 2 and page.count("nav") == 1


def test_text_from_a_folder_is_shown_and_never_obeyed(tmp_path):
    make_run(tmp_path / "<b>run & co", EVIL)
    make_study(tmp_path / "study", EVIL, ("lolo", EVIL))
    text = build([tmp_path / "<b>run & co", tmp_path / "study"])
    text.encode()
    page = assert_complete_in_itself(text)
    assert "<script>alert(1)</script>" in page.said() and "<b>run & co" in page.said()
    assert "b" not in page.tags and "\u202e" not in text and "\0" not in text
    assert "a" * 5000 not in markup.page("a" * 5000)


def test_only_html_is_left_unescaped():
    assert markup.tag("p", "a<b", markup.tag("b", "c"), title='"') == '<p title="&quot;">a&lt;b<b>c</b></p>'
    assert markup.tag("p", str(markup.Html("<b>"))) == "<p>&lt;b&gt;</p>"


def test_the_command_that_is_shown_makes_the_same_recipe(tmp_path, monkeypatch):
    recipe = recipes.BC_ONLY
    changes = {"tasks": ("quadratic", "fashion-mlp"), "learner.clock_limit": 5000.0, "unroll.stagger": True, "seed": 7}
    for name, value in changes.items():
        recipe = settings.with_field(recipe, name, value)
    asked = []

    def train(recipe, *args, **rest):
        asked.append(recipe)
        raise RunError("enough")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(environment, "set_up", lambda devices=None: None)
    words = shlex.split(train_command(recipe))
    assert words[:3] == ["lolo", "train", "bc-only"]
    assert cli.main(words[1:]) == 2
    assert asked == [recipe]


def picture(*curves):
    """One chart of curves [n]."""
    lines = [style.Curve(f"curve {i}", np.arange(1, len(y) + 1), np.array(y, float)) for i, y in enumerate(curves)]
    return charts.curves("loss", lines, "step", "loss")


def test_numbers_that_are_not_finite_or_huge_are_gaps():
    drawn = picture([1.0, math.nan, math.inf, 2.0, 1e300, -1e200])
    assert "<path" in drawn and "NaN" not in drawn and "inf" not in drawn.split("aria-label")[0]
    nothing = picture([math.nan, math.nan])
    assert "no finite number" in nothing and "<svg" not in nothing
    assert "no finite number" in meta_training.start_histogram({"": (np.array([]), np.array([]))})
    assert "<svg" in meta_training.start_histogram({"": (np.array([0.0, 1e12]), np.ones(2))})


def test_a_single_point_is_a_dot():
    def marks(y):
        return len(re.findall(f"<use [^>]*{style.OTHERS[0]}", picture(y)))

    assert marks([math.nan, 1.0]) == 1 and marks([1.0] * (style.FEW_POINTS + 1)) == 0


def change(path, edit):
    """Apply `edit` to every row of a JSON-lines file, or to a JSON file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    data = json.loads(path.read_text()) if rows is None else rows
    for row in [data] if rows is None else rows:
        edit(row)
    path.write_text(json.dumps(data) if rows is None else "".join(json.dumps(row) + "\n" for row in data))


BAD = {
    # name: (file in the study, what is done to it, words of the error)
    "loss is text": (
        "runs/a/log.jsonl",
        lambda row: row.update(task_loss=["low"]),
        "'task_loss': 'low' is not a number",
    ),
    "loss of another task": ("runs/a/log.jsonl", lambda row: row.update(task_loss=[1, 2]), "has 2 numbers"),
    "step is missing": ("runs/a/log.jsonl", lambda row: row.pop("step"), "'step' is missing"),
    "steps repeat": ("runs/a/log.jsonl", lambda row: row.update(step=1), "step 1 comes after step 1"),
    "start is huge": ("runs/a/log.jsonl", lambda row: row.update(starts=[10**30]), "'starts': '1000"),
    "validation is a list": ("runs/a/log.jsonl", lambda row: row.update(validation=[]), "'validation': is not"),
    "recipe without pairs": ("runs/a/recipe.json", lambda data: data["estimator"].update(pairs=0), "estimator.pairs=0"),
    "unknown field": ("runs/a/recipe.json", lambda data: data.update(x=1), "unknown recipe field 'x'"),
    "row of another version": ("rows-books.jsonl", lambda row: row.pop("held"), "'held' is missing"),
    "curve too short": ("rows-books.jsonl", lambda row: row["train_curve"].pop(), "no number for each 100 of 400"),
    "curve of text": (
        "rows-books.jsonl",
        lambda row: row.update(held_curve="abc"),
        "'held_curve': 'abc' is not a list",
    ),
    "histogram is a list": (
        "about-books.json",
        lambda data: data["weights"].update(a={"card": {"start_steps_per_250": [1]}}),
        "must map",
    ),
    "unroll is text": ("about-books.json", lambda data: data.update(unroll="long"), "unroll of about-.*'long'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, capsys, name):
    file, edit, words = BAD[name]
    make_study(tmp_path)
    (tmp_path / "runs" / "books-mlp-lolo-seed0").rename(tmp_path / "runs" / "a")
    change(tmp_path / file, edit)
    assert cli.main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(words, err), err
    assert Path(file).name in err or "about-*.json" in err
    assert not (tmp_path / "report.html").exists()


def test_optimizers_without_a_common_seed_are_shown_without_a_difference(tmp_path):
    rows = make_rows()
    save_rows(tmp_path / "rows-a.jsonl", [row for row in rows if (row.optimizer == "lolo") == (row.seed == 0)])
    assert "no\u00a0pairs" in build([tmp_path])


def test_of_many_optimizers_a_few_are_drawn_and_all_are_in_the_table(tmp_path):
    labels = ("lolo", *(f"adamw {rate}" for rate in range(1, 40)), "muon 0.1")
    save_rows(tmp_path / "rows-a.jsonl", make_rows(labels=labels))
    page = Page(build([tmp_path]))
    (train, _) = [value for _, name, value in page.attributes if name == "aria-label" and "loss of" in value]
    assert train.startswith("Train loss of 3 of 41 optimizers") and "LoLO, AdamW 1, Muon 0.1" in train
    assert all(label in page.said() for label in labels)


def test_verdicts_come_first_then_comparisons_then_meta_trainings_and_their_health(tmp_path):
    make_run(tmp_path / "a run", "mine.py:easy@" + 64 * "0")
    make_study(tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "runs")
    text = build([tmp_path / "a run", tmp_path / "study"])
    said = Page(text).said()
    verdict = "books-mlp, 400 inner steps: Train loss: LoLO ends 1.000 below AdamW"
    order = ["LoLO report", "Verdict", verdict, "not measured", "Means, and differences", "Meta-training of", "Health"]
    places = [said.find(words) for words in order if words != "not measured"]
    assert -1 not in places and places == sorted(places)
    headlines = re.findall("<h[1-6]>.*?</h[1-6]>|<title>.*?</title>", text)
    assert len(headlines) > 5 and not any(re.search("[0-9a-f]{12}", words) for words in headlines)
    assert "@" + 64 * "0" in said  # in the recipe, which has to name it


@pytest.mark.parametrize("examples", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_json_raises_nothing_but_the_documented_errors(tmp_path, monkeypatch, examples):
    """Values of every file replaced at random: the page is whole, or the error is one of ours."""
    monkeypatch.setattr(charts, "inline", lambda drawn, label: markup.Html(""))
    for module, name in ((charts, "panel"), (plots, "curves"), (plots, "start_steps")):  # the slow part
        monkeypatch.setattr(module, name, lambda *args: None)
    generator = random.Random(examples)
    values = [None, True, -1, 0, 1.5, 10**25, 1e308, "", "nan", "inf", [], {}, [[]], {"a": 1}, ["a"], "\ud800<"]
    make_study(tmp_path)
    names = ["rows-books.jsonl", "about-books.json"]
    names += [f"runs/books-mlp-lolo-seed0/{name}" for name in ("recipe.json", "run.json", "log.jsonl")]
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    refused = 0
    for _ in range(examples):
        name = generator.choice(names)

        def spoil(row):
            place = row
            while isinstance(place, dict) and place:
                key = generator.choice(list(place))
                if not isinstance(place[key], dict) or generator.random() < 0.5:
                    place[key] = generator.choice(values)
                    return
                place = place[key]

        change(tmp_path / name, spoil)
        try:
            Page(build([tmp_path]))
        except (FileError, RunError) as error:
            refused += 1
            assert "books" in str(error)
        (tmp_path / name).write_bytes(whole[name])
    assert examples / 4 < refused < examples


def test_folders_without_anything_to_report_are_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds neither a meta-training" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert "name at least one folder" in capsys.readouterr().err
    make_run(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "notes.md")]) == 2
    assert "must end in .html" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
