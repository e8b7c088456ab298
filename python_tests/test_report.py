"""Tables, figures and the page, from results made by hand."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from python_tests.results import a_result
from smpq_ext.core import Result
from smpq_ext.report import page, tables
from smpq_ext.report.figures import figures

VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Counts elements, and holds that they are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(html):
    parser = Checker()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_the_page_is_one_file_that_needs_no_network_and_no_script(tmp_path):
    path = page.write(a_result(), tmp_path)
    html = checked(path.read_text())
    assert html.seen.count("img") == 3 and "script" not in html.seen and "link" not in html.seen
    assert all(link.startswith("data:image/svg+xml;base64,") for link in html.links)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        "predicted.svg",
        "scores.svg",
        "sensitivity.svg",
    ]


def test_the_page_says_what_was_found_and_what_it_took():
    result = a_result()
    html = page.render(result, {})
    for text in ("0.4321", "0.4567", "0.1234", "additive within noise", "1,234", "calibrate 1.5", "99.0 %", "f" * 64):
        assert text.lower() in html.lower()
    assert "an embedding is a table look-up" in html and "float fixed" in html
    assert len(re.findall(r"<td>stage\d\.\d\.conv</td>", html)) == 6


def test_names_from_the_model_are_escaped():
    result = a_result(2, names=["<script>alert(1)</script>", 'a"&$x_1$'])
    result = dataclasses.replace(result, finding="<b>", left_out={"<i>": "<u>"})
    drawn = figures(result)
    html = checked(page.render(result, drawn))
    assert not {"script", "b", "i", "u"} & set(html.seen) - {"b"} and html.seen.count("b") == 5
    assert b"<script" not in drawn["scores"] and b"&lt;script&gt;" in drawn["scores"]
    assert b"$x_1$" in drawn["scores"]


def test_the_pairs_that_stand_out_come_first_and_what_the_estimator_chose_is_said():
    result = a_result(4)
    players = len(result.space.slots)
    found, errors = np.zeros((2, players, players))
    for (i, j), (value, error) in {(0, 2): (0.5, 0.2), (1, 3): (-0.03, 0.001), (0, 1): (0.1, 0.5)}.items():
        found[[i, j], [j, i]], errors[[i, j], [j, i]] = value, error
    attribution = dataclasses.replace(result.attribution, reason="odd: since <it>", pairs=found, pair_errors=errors)
    result = dataclasses.replace(result, attribution=attribution)
    names = [slot.name for slot in result.space.slots]
    assert tables.pairs(result).rows == (
        (names[1], names[3], "-0.0300 ± 0.0010"),
        (names[0], names[2], "0.50 ± 0.20"),
        (names[0], names[1], "0.10 ± 0.50"),
    )
    html = page.render(result, {})
    checked(html)
    assert "Which slots interact" in html and "odd: since &lt;it&gt;" in html
    assert "Which slots interact" not in page.render(a_result(4), {})


def test_a_saved_result_gives_the_same_page_again(tmp_path):
    result = a_result()
    result.save(tmp_path)
    first = page.write(result, tmp_path).read_bytes()
    again = page.write(Result.load(tmp_path), tmp_path / "again").read_bytes()
    assert first == again


@pytest.mark.parametrize(
    "change",
    [
        {"scores": None, "score_errors": None},
        {"attribution": None},
        {"attribution": None, "scores": None, "score_errors": None, "trace": ()},
        {"score_errors": None, "predicted_loss": None},
        {"trace": ((1.0, 2.0),)},
        {"trace": ((1e-3, 1.0), (1.0, 30.0), (float("nan"), 1.0))},
        {"trace": ((0.5, 0.5),), "predicted_loss": 0.5, "measured_loss": 0.5},
        {"finding": "", "left_out": {}, "trace": ()},
    ],
)
def test_what_a_method_does_not_say_is_left_out(change):
    result = dataclasses.replace(a_result(), **change)
    drawn = figures(result)
    assert ("predicted" in drawn) == bool(result.trace)
    assert ("scores" in drawn) == (result.scores is not None)
    assert ("sensitivity" in drawn) == (result.scores is not None or result.attribution is not None)
    checked(page.render(result, drawn))


def test_scores_that_are_zero_negative_or_missing_can_be_drawn():
    result = a_result(3)
    scores, errors = np.zeros_like(result.scores), np.full_like(result.scores, np.inf)
    assert set(figures(dataclasses.replace(result, scores=scores))) == {"scores", "sensitivity", "predicted"}
    scores[0], scores[1, 0], scores[2] = -1, np.inf, 5
    assert set(figures(dataclasses.replace(result, scores=scores, score_errors=errors, attribution=None))) >= {"scores"}


def test_slots_may_have_other_candidates_and_only_weights_be_searched():
    result = a_result(3, bits=(4,))
    assert figures(result)
    space = result.space
    weights = [i for i, s in enumerate(space.slots) if s.kind == "weight"]
    space = dataclasses.replace(
        space, slots=tuple(space.slots[i] for i in weights), candidates=tuple((4,) for _ in weights)
    )
    result = dataclasses.replace(
        result, space=space, scores=result.scores[weights], score_errors=None, attribution=None, trace=()
    )
    drawn = figures(result)
    assert b">weights<" in drawn["scores"] and b">activations<" not in drawn["scores"]
    checked(page.render(result, drawn))


def test_hundreds_of_slots_get_rows_of_readable_height_and_repeated_headings():
    drawn = figures(a_result(150))
    heights = {name: float(re.search(rb'height="([\d.]+)pt"', svg)[1]) for name, svg in drawn.items()}
    assert heights["scores"] > 150 * 12 and heights["sensitivity"] > 300 * 12
    assert drawn["scores"].count(b">2 bits<") == 2 * 5


def test_plain_tables():
    result = a_result()
    text = tables.layers(result).text()
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["layer", "weight", "activation"] and len(lines) == 2 + 7
    assert lines[-1].startswith("head") and "8 fixed" in lines[-1] and "float fixed" in lines[-1]
    short = tables.layers(a_result(150)).text(most=10).splitlines()
    assert len(short) == 2 + 11 and short[7] == "... 141 more"
    assert "weight damage" not in tables.layers(dataclasses.replace(result, scores=None)).columns


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.12345, 0.0123, "0.123 ± 0.012"),
        (12.5, 1.0, "12.5 ± 1.0"),
        (1234.5, 120.0, "1234 ± 120"),
        (-1e-9, 0.1, "0.00 ± 0.10"),
        (1.234e-6, 1e-7, "1.2e-06 ± 1e-07"),
        (0.12345, 0.0, "0.123"),
        (0.12345, float("nan"), "0.123 ± ?"),
        (float("inf"), 0.1, ""),
    ],
)
def test_a_number_shows_as_many_digits_as_its_error_allows(value, error, text):
    assert tables.with_error(value, error) == text
