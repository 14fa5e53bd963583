"""Pictures: one colour for each method, few lines, names that do not touch, titles that say what the rows say."""

import itertools
import math
import re

import numpy as np
import pytest

from lolo.evaluation import statistics
from lolo.evaluation.statistics import Row
from lolo.race import pictures, results
from lolo.race.records import RaceRow, Target
from lolo.studies import headline, names, plots, style

LIGHT, DARK = "#ffffff", "#14171c"
# Machado, Oliveira and Fernandes (2009), severity 1: what readers without one kind of cone see of linear RGB.
VIEWS = {
    "all cones": np.eye(3),
    "protan": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deutan": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    dark, light = sorted(float(XYZ[1] @ linear(colour)) for colour in (a, b))
    return (light + 0.05) / (dark + 0.05)


def distance(a, b):
    """Between two colours in CIELAB, the smallest that any reader sees; 2 is just noticeable."""

    def lab(colour, view):
        x, y, z = np.cbrt(XYZ @ np.clip(view @ linear(colour), 0, 1) / XYZ.sum(axis=1))
        return np.array([116 * y, 500 * (x - y), 200 * (y - z)])

    return min(float(np.linalg.norm(lab(a, view) - lab(b, view))) for view in VIEWS.values())


def make_row(label, seed, end, meta_seed=None, **changes):
    """A run of 1,000 steps that ends at a train loss, and at 0.1 more in held-out loss."""
    curve = np.geomspace(2.0, end, 10) if math.isfinite(end) else np.full(10, end)
    fields = {
        "task": "fashion-mlp", "optimizer": label, "meta_seed": meta_seed, "seed": seed, "steps": 1000,
        "train_loss": end, "train_minimum": end, "held_loss": end + 0.1, "held": {"loss": end, "accuracy": 0.9},
        "diverged": False, "train_curve": curve.tolist(), "held_curve": (curve + 0.1).tolist(),
    }  # fmt: skip
    return Row(**fields | changes)


def make_rows(ends, seeds=5):
    """Rows of optimizers that end there, and a little off, the same for all of one seed."""
    return [make_row(label, seed, end + 0.001 * seed) for label, end in ends.items() for seed in range(seeds)]


STUDY = {"naive": 0.9, "bc-only": 0.5, "replay-only": 0.45, "lolo": 0.3, "lolo schedule=cosine": 0.29}
STUDY |= {"adamw 0.001": 0.4, "best adamw-cosine 0.01": 0.35, "muon 0.1": 0.36, "sgdm 0.1": 0.5, "adam 0.1": 0.6}


def title_of(figure):
    return " ".join(figure.get_suptitle().split())


def lines_of(figure):
    """Label -> line, of the first panel."""
    return {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}


def test_the_main_colours_are_told_apart_by_everyone_and_read_on_light_and_dark():
    main = [style.COLOURS[name] for name in ("lolo", "naive", "bc-only", "untrained", "adamw", "muon")]
    for colour in (*style.COLOURS.values(), *style.OTHERS):
        assert min(contrast(colour, paper) for paper in (LIGHT, DARK)) >= 3, colour
    assert min(contrast(style.INK, paper) for paper in (LIGHT, DARK)) >= 4.2
    assert min(distance(a, b) for a, b in itertools.combinations(main, 2)) > 20
    # The checks can tell: a yellow is lost on white, and red from green to many readers.
    assert contrast("#ffd700", LIGHT) < 3 and distance("#b06000", "#6b8000") < 20


def race_rows(entrant, loss):
    return [RaceRow("mlp", False, entrant, entrant, 0, 800, [2.0, 1.0, loss, loss], loss, {"loss": loss})]


def standing(entrant, score, half=0.01):
    interval = statistics.Interval(score, half, 3, "seeds")
    return results.Standing(entrant, {("mlp", False): 400.0}, {("mlp", False): 1.0}, interval, interval, interval)


def test_a_method_has_one_colour_in_the_pictures_of_all_commands():
    rows = make_rows({"lolo": 0.3, "best adamw-cosine 0.01": 0.4, "muon 0.1": 0.5})
    entrants = {"adamw": 0.4, "lolo-norm": 0.3, "muon": 0.5}
    standings = [standing(name, 0.9 - loss) for name, loss in entrants.items()]
    chosen = {name: {("mlp", False): race_rows(name, loss)} for name, loss in entrants.items()}
    targets = {("mlp", False): Target("fashion-mlp", 0.5, "adamw:1e-3", [0.5])}
    seeds = [(np.array([0.1, 0.2]), np.array([1.0, 0.5]))]
    figures = [
        plots.curves(rows),
        pictures.profiles(standings, "tuned"),
        pictures.curves(chosen, targets, standings, "tuned"),
        plots.meta_losses({"lolo": seeds, "bc-only": seeds}, "meta-training"),
        plots.start_steps({"lolo": (np.array([0.0, 500.0]), np.ones(2)), "naive": (np.zeros(1), np.ones(1))}),
    ]
    seen = {}
    for figure in figures:
        for label, line in lines_of(figure).items():
            seen.setdefault(names.method_of(label), set()).add(line.get_color())
    assert seen == {method: {style.COLOURS[method]} for method in ("lolo", "adamw", "muon", "bc-only", "naive")}


def test_ours_is_thick_and_others_of_ours_are_dashed():
    lines = lines_of(plots.curves(make_rows(STUDY), None, ["naive", "lolo", "lolo schedule=cosine", "adamw 0.001"]))
    widths = {label: line.get_linewidth() for label, line in lines.items()}
    assert max(widths, key=widths.get) == "lolo" and len(set(widths.values())) == 2
    assert lines["lolo"].get_linestyle() == "-" != lines["lolo schedule=cosine"].get_linestyle()
    assert lines["lolo"].get_color() == lines["lolo schedule=cosine"].get_color()


def test_rivals_have_dashes_of_their_own_and_tasks_are_not_marked():
    rivals = ["adamw 0.1", "muon 0.1", "sgdm 0.1", "lion 0.1"]
    assert len({str(look["linestyle"]) for look in style.looks(["lolo", *rivals]).values()}) == 5
    assert {look["linewidth"] for look in style.even(["lolo", "books-mlp"]).values()} == {1.5}


def test_a_reader_s_own_optimizers_have_colours_of_their_own():
    colours = style.colours(["mine", "yours", "lolo"])
    assert len({colours[method] for method in ("mine", "yours", "lolo")}) == 3


def test_few_lines_are_drawn_ours_and_of_each_rival_the_best_setting():
    rows = make_rows(STUDY)
    few = headline.few(rows)
    assert few == ["lolo", "best adamw-cosine 0.01", "muon 0.1", "naive", "bc-only", "replay-only"]
    assert list(lines_of(plots.curves(rows))) == few
    assert "lolo schedule=cosine" in headline.few([row for row in rows if row.optimizer != "replay-only"])
    many = {f"mine{i}": float(1 + i) for i in range(40)}
    assert len(headline.few(make_rows(many))) == headline.FEW
    assert len(pictures.few([standing(name, 1 / loss) for name, loss in many.items()])) == headline.FEW


def test_a_title_says_what_the_rows_say():
    def title(ours, theirs, **more):
        off = np.random.default_rng(0).normal(size=5) * more.pop("noise", 0.001)
        rows = [make_row("lolo", seed, ours + off[seed], **more) for seed in range(5)]
        rows += [make_row("adamw 0.1", seed, theirs) for seed in range(5)]
        return title_of(plots.curves(rows)).replace("\u00a0", " ")

    for ours, where in ((0.3, "below"), (0.5, "above")):
        words = rf"Train loss: LoLO ends 0.10 {where} AdamW \(95 % CI 0.\d\d to 0.\d\d\)"
        assert re.fullmatch(words, title(ours, 0.4, noise=0.02))
    undecided = title(0.3999, 0.4, noise=0.02)
    assert "can't be told apart (difference" in undecided and "below" not in undecided and "above" not in undecided
    assert title(0.3, 0.4, diverged=True) == "Train loss: LoLO diverged in 5 of 5 runs"


def test_a_title_never_makes_more_of_few_runs():
    single = make_rows({"lolo": 0.3, "adamw 0.1": 0.4}, seeds=1)
    assert headline.sentence(single) == "LoLO ends 0.100 below AdamW (single run)"
    apart = [make_row("lolo", 0, 0.3), make_row("adamw 0.1", 1, 0.4)]
    assert headline.sentence(apart) == "Without a seed in common: LoLO at 0.300, AdamW at 0.400"
    lost = [*make_rows({"lolo": 0.3}), *(make_row("adamw 0.1", seed, math.inf, diverged=True) for seed in range(5))]
    assert headline.sentence(lost) == "LoLO ends at 0.302; AdamW diverged in 5 of 5 runs"
    assert headline.sentence(make_rows({"adamw 0.1": 0.4})) == "AdamW ends at 0.402"


def test_a_race_s_title_names_the_first_unless_two_are_too_close():
    clear = [standing("muon", 0.9), standing("adamw", 0.7), standing("lolo-norm", 0.6)]
    close = [standing("muon", 0.9, 0.2), standing("lolo-norm", 0.7, 0.2)]
    assert pictures.finding(clear, "tuned") == (
        "Tuned rules: Muon (0.90) has the highest profile score; lolo-norm (0.60) is 3 of 3"
    )
    assert (
        pictures.finding(close, "tuned")
        == "Tuned rules: Muon (0.90) and lolo-norm (0.70) lead, too close to tell apart"
    )


def boxes(texts):
    return [text.get_window_extent() for text in texts]


def overlaps(found):
    return [1 for a, b in itertools.combinations(found, 2) if a.y0 < b.y1 and b.y0 < a.y1]


@pytest.mark.parametrize("spacing", [0.0, 0.001, 0.2])
def test_names_at_the_lines_touch_neither_each_other_nor_the_edge(spacing):
    labels = [
        "lolo",
        "naive",
        "bc-only",
        "adamw-warmup-cosine 0.001",
        "muon 0.1",
        "lolo step_scale=2.0 schedule=cosine",
    ]
    rows = make_rows({label: 0.3 + spacing * i for i, label in enumerate(labels)})
    figure = plots.curves(rows)
    figure.draw_without_rendering()
    for axis in figure.axes:
        texts = [text for text in axis.texts if text.get_position()[0] > 1]
        assert len(texts) == len(labels) and not overlaps(boxes(texts))
        assert all(0 <= box.x0 and box.x1 <= figure.bbox.width for box in boxes(texts))
        if spacing < 0.01:  # at the ends of their lines they would lie on one another
            for text in texts:
                text.set_y(0.1)
            assert overlaps(boxes(texts))


def test_places_are_apart_in_order_and_where_they_were_wanted_if_there_is_room():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted, heights = rng.uniform(0, 100, 6), rng.uniform(5, 15, 6)
        places = style.spread(wanted, heights, 100.0)
        order = np.argsort(wanted)
        gaps = np.diff(places[order]) - (heights[order][1:] + heights[order][:-1]) / 2
        assert (gaps > -1e-9).all() and places.min() >= 0 and (places + heights / 2).max() <= 100 + 1e-9
    np.testing.assert_allclose(style.spread(np.array([80.0, 20.0]), np.array([10.0, 10.0]), 100.0), [80.0, 20.0])


def test_a_picture_is_transparent_its_text_is_text_and_equal_rows_are_equal_bytes():
    rows = make_rows({"lolo": 0.3, "<b>&$x^{$\0\u202e": 0.4})
    text = style.svg(plots.curves(rows))
    assert text == style.svg(plots.curves(rows))
    assert re.search(">LoLO</text>", text) and "&lt;b&gt;&amp;$x^{$\ufffd" in text and "\u202e" not in text
    assert "cross entropy (nats)" in text and not re.search("fill: #(ffffff|000000)", text)
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
    assert min(sizes) * 400 / width >= 9  # pixels on a phone


def test_units_are_those_of_the_task():
    plain = [make_row("lolo", 0, 0.3, task="quadratic", held={"loss": 0.3})]
    assert plots.curves(plain).axes[0].get_ylabel() == "loss"
    assert plots.curves(make_rows({"lolo": 0.3})).axes[0].get_ylabel() == "cross entropy (nats)"


def test_runs_that_diverged_leave_a_picture_through_the_top():
    good, bad = np.linspace(0.3, 0.5, 100), np.array([5.0, 40.0, np.inf, np.nan] * 8)
    low, high = style.limits(np.concatenate([good, bad]))
    assert 0.1 < low < 0.3 and 0.5 < high < 2
    low, high = style.limits(good)
    assert low < 0.3 and high > 0.5  # nothing is cut where nothing diverged
    assert style.limits(np.array([2.0, 2.0]))[1] > 2
    assert style.limits(np.array([1e-6] * 60 + [0.3] * 40))[1] > 0.3  # most at the floor, others not diverged


def test_a_long_curve_is_thinned_to_means_with_their_range():
    x = np.arange(1000)
    thin = style.thin(style.Curve("a", x, np.where(x % 2, 3.0, 1.0)))
    assert len(thin.x) == style.MAX_POINTS and thin.x[-1] == 999
    assert abs(thin.y.mean() - 2) < 0.02 and (thin.low == 1).all() and (thin.high == 3).all()


def test_what_all_labels_share_is_left_out_but_no_part_of_a_name():
    labels = ["muon-matched-warmup-cosine 0.001 warmup 0.05", "muon-matched-warmup-cosine 0.003 warmup 0.05"]
    assert list(names.together(labels)[0].values()) == ["matched Muon 0.001", "matched Muon 0.003"]
    assert names.together(["lolo schedule=cosine"]) == ({"lolo schedule=cosine": "LoLO + cosine"}, "")
    labels = ["adamw-warmup-cosine 0.001 warmup 0.05", "adamw-warmup-cosine 0.001 warmup 0.1"]
    assert list(names.together(labels)[0].values()) == ["AdamW 0.001, warmup 0.05", "AdamW 0.001, warmup 0.1"]


@pytest.mark.parametrize(
    ("label", "method", "words"),
    [
        ("norm-fc schedule=warmup-cosine untrained=true", "untrained", "untrained norm_fc + warm-up cosine"),
        ("norm-fc-naive schedule=cosine", "naive", "naive-LO norm_fc + cosine"),
        ("lolo-norm:schedule=warmup-cosine,learning_rate=2e-3", "lolo", "lolo-norm + warm-up cosine, rate 0.002"),
        ("adamw 0.001 wd 0.1 warmup 0.05", "adamw", "AdamW 0.001, decay 0.1, warmup 0.05"),
        ("runs/a/last.safetensors schedule=cosine", "runs/a/last.safetensors schedule=cosine", "a + cosine"),
        ("lolo-norm-2-as-shipped", "lolo", "lolo-norm-2 as shipped"),
        ("mine.py:adam:lr=0.1", "mine.py:adam:lr=0.1", "mine.py:adam:lr=0.1"),
        ("AdamW", "adamw", "AdamW"),
        ("", "", ""),
    ],
)
def test_labels_are_named_in_words(label, method, words):
    assert (names.method_of(label), names.in_words(label)) == (method, words)
