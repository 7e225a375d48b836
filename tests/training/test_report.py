"""report.html, the model card and the pictures: what they show, and that nothing in the data breaks them."""

from __future__ import annotations

import html.parser
import re
from io import StringIO

import numpy as np
import pytest
import yaml
from log_cases import GOOD, evaluated, trained
from rich.console import Console

from dpo_kernels.training.report.card import CardFacts, card, card_name, on_the_hub, snippet, write_card
from dpo_kernels.training.report.metrics import LOG_2
from dpo_kernels.training.report.page import Answer, Page, drawn, render, tiles_of, write_page
from dpo_kernels.training.report.panels import MOST_POINTS, panels_of, thinned
from dpo_kernels.training.report.pictures import save_curves
from dpo_kernels.training.report.run import steps_told
from dpo_kernels.training.report.sentences import findings
from dpo_kernels.training.report.start import RunFacts, show_start
from dpo_kernels.training.report.svg import histogram_svg, panel_svg, ticks
from dpo_kernels.training.report.tokens import ShownAnswer, ShownPair, ShownToken, reward_told, shown_pair
from dpo_kernels.training.scoring import ScoredAnswer, ScoredPair

EVIL = '</script></style><script>alert("1")</script>\'"<b>&amp;{{ 7 * 7 }}'
VOID = {"meta", "br", "img", "link", "hr"}


class Outline(html.parser.HTMLParser):
    """The elements of a page, its text, and whether each one is closed where it was opened."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        self.text.append(data)


def outline(text):
    page = Outline()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def page_of(text, log=GOOD, **changes):
    token = ShownToken(text, "up", 0.5, f"{text}: reward +0.1")
    pair = ShownPair(text, [ShownAnswer("chosen", "+1.0", [token], 0), ShownAnswer("rejected", "-1.0", [token], 7)])
    values = {
        "title": text, "subtitle": text, "tiles": tiles_of(log), "findings": findings(log),
        "answers": [Answer(text, text, text)], "where_from": "", "pairs": [pair], "pairs_from": "", "full": "0.1",
        "reward_told": "",
        "panels": drawn(log, ["sigmoid"]), "lengths": histogram_svg(np.array([[3, 9, 5], [40, 2, 1]]), 30),
        "settings": [("data", text)], "versions": text,
    }  # fmt: skip
    return Page(**(values | changes))


def test_the_page_stands_alone_and_is_well_formed():
    page = outline(render(page_of("Hello")))
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    names = {name for _, attrs in page.elements for name in attrs}
    assert not {"src", "href"} & names
    assert not [name for name in names if name.startswith("on")]
    assert tags.count("svg") == 4  # no log-probs in this log
    style = render(page_of("Hello")).split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_looks_like_html_in_the_data_is_shown_as_it_is():
    page = outline(render(page_of(EVIL)))
    assert not {"script", 'b">'} & {tag for tag, _ in page.elements}
    plain = outline(render(page_of("x")))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert page.text.count(EVIL) == 11  # wherever a text of the data stands
    assert EVIL + ": reward +0.1" in [attrs.get("title") for _, attrs in page.elements]


def test_names_of_evaluation_sets_are_escaped_in_the_pictures():
    log = [*trained([0.6, 0.5]), evaluated(2, 0.5, name="<i>_")]
    text = render(page_of("x", log))
    assert "<i>_" not in text
    assert "<i> " not in text
    assert "held out &lt;i&gt;" in text


def test_a_page_without_samples_has_no_empty_parts():
    text = render(page_of("x", answers=[], pairs=[], lengths=""))
    assert "before and after" not in text
    assert "token by token" not in text
    outline(text)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    assert write_page(page_of("old"), tmp_path).read_text(encoding="utf-8").count("old") > 5
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_page(page_of("new"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    "log",
    [
        pytest.param(trained([LOG_2]), id="one step"),
        pytest.param([*trained([0.6, float("nan"), 0.5]), evaluated(3, float("inf"))], id="not finite"),
        pytest.param([evaluated(0, 0.5), *trained([0.5] * 3)], id="flat"),
        pytest.param([{"step": 5, "loss": 1e6}, {"step": 9, "loss": -1e-9}], id="huge"),
    ],
)
def test_pictures_of_unusual_logs(log):
    for panel in panels_of(log):
        drawing = panel_svg(panel)
        assert not re.search(r"nan|inf\b", drawing)
        outline(drawing)


def test_lines_at_log_2_and_at_chance_and_held_out_rewards():
    loss, accuracy, rewards, _ = panels_of(GOOD)
    assert loss.levels == [(LOG_2, "log 2")]
    assert accuracy.levels == [(0.5, "chance")]
    assert [curve.label for curve in rewards.curves if curve.held_out] == [
        "chosen, held out", "rejected, held out", "margin, held out",
    ]  # fmt: skip
    assert panels_of(GOOD, ["ipo"])[0].levels == []


def test_the_title_is_drawn_and_the_legend_is_below_the_axes(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen, own = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **options: seen.append(self) or own(self, path, **options)
    )
    log = [*GOOD, {"step": 31, "loss": float("nan"), "logps/chosen": -9.0, "logps/rejected": -8.0}]
    title = "运行 $\\frac: model, sigmoid"  # no formula, and no warning of letters that the font lacks
    log.append({"step": 31, "eval_a$b_logps/chosen": -8.0})
    assert save_curves(log, tmp_path, title) == tmp_path / "curves.png"
    (figure,) = seen
    assert figure.get_suptitle() == title
    for axis in figure.axes:
        legend = axis.get_legend().get_window_extent()
        assert legend.y1 < axis.get_window_extent().y0


def test_a_long_line_keeps_its_peaks():
    line = [(i, float(i % 10)) for i in range(50_000)]
    line[31_234] = (31_234, 99.0)
    short = thinned(line)
    assert len(short) <= MOST_POINTS + 2
    assert (31_234, 99.0) in short
    assert short == sorted(short)
    assert thinned(line[:100]) == line[:100]


def test_ticks_are_round():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-103, 17) == [-100, -50, 0]


FACTS = CardFacts(
    "out aligned with pairs", "out", "org/base", ["org/pairs:train", "my/own.jsonl"], [("loss", "a | b")], "sigmoid",
    "How are you?", True,
)  # fmt: skip


def test_the_card_has_the_hubs_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "own.jsonl").touch()
    text = card(FACTS, GOOD, findings(GOOD))
    assert yaml.safe_load(text.split("---")[1]) == {
        "base_model": "org/base", "base_model_relation": "finetune", "datasets": ["org/pairs"],
        "library_name": "transformers", "pipeline_tag": "text-generation", "model_name": FACTS.title,
        "tags": ["dpo", "dpo_kernels", "preference-alignment"],
    }  # fmt: skip
    assert "| loss | a \\| b |" in text
    assert "| ranking accuracy, held out | 0.50 | 0.95 |" in text
    assert "{{" not in text
    assert on_the_hub("org/base")
    assert not on_the_hub("my/own.jsonl")
    assert not on_the_hub("/a/b")
    for file in ("examples/dpo.jsonl", "examples/dpo.csv.gz"):  # it lies elsewhere, or is gone
        assert not on_the_hub(file)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("# My own\n- dpo_kernels\n", "model_card.md"),
        ("---\ntags:\n- dpo\n---\n# My own\n---\n- dpo_kernels\n", "model_card.md"),
        ("", "model_card.md"),
        (None, "README.md"),
        (card(FACTS, GOOD, []), "README.md"),
    ],
    ids=["plain", "with front matter", "empty", "none", "a run's"],
)
def test_somebodys_own_readme_is_left(tmp_path, text, name):
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert card_name(tmp_path) == name
    write_card(FACTS, GOOD, [], tmp_path / name)
    assert name == "README.md" or (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert FACTS.title in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("start", "model", "same"), [(None, "a", True), ("a", "", True), ("a", "b/../a", True), ("b", "a", False)]
)
def test_whether_a_policy_starts_at_its_reference(start, model, same):
    assert RunFacts([], model, start, []).starts_at_reference == same


def answer_of(ids, counted):
    return ScoredAnswer(ids, counted, [-1.0 * c for c in counted], [-2.0 * c for c in counted])


@pytest.mark.parametrize(("aggregate", "reward"), [("sum", "+0.300"), ("mean", "+0.100")])
def test_an_answers_reward_is_what_the_page_says(aggregate, reward):
    class Letters:
        chat_template = None

        def decode(self, ids, skip_special_tokens=False):
            return "".join(chr(97 + i) for i in ids)

    chat = answer_of([0, 1, 2, 3, 4], [False, True, False, True, True])
    shown = shown_pair(ScoredPair(chat, chat), Letters(), 0.1, 1.0, aggregate)
    assert [side.reward for side in shown.sides] == [reward] * 2
    assert [token.text for token in shown.sides[0].tokens] == ["d", "e"]
    told = f"An answer's reward is the {aggregate} of its tokens'"
    earlier = ", those of earlier replies too, which are not shown."
    assert reward_told([ScoredPair(chat, chat)], aggregate) == told + earlier
    plain = answer_of([0, 1], [False, True])
    assert reward_told([ScoredPair(plain, plain)], aggregate) == told + "."
    assert (told + earlier).replace("'", "&#39;") in render(page_of("x", reward_told=told + earlier))


@pytest.mark.parametrize(
    ("last", "first", "said"),
    [(30, 0, "30 steps in 12 seconds"), (30, 20, "30 steps, the last 10 in 12 seconds"), (30, 30, "30 steps")],
)
def test_seconds_are_those_of_the_steps_that_took_them(last, first, said):
    assert steps_told(last, first, 12.0) == said


def test_the_snippets_are_python():
    for is_adapter in (False, True):
        for has_chat in (False, True):
            facts = CardFacts("t", "it's", "b", [], [], "", 'a "question"', has_chat, is_adapter, True)
            compile(snippet(facts), "card", "exec")


def test_the_start_is_a_table_on_a_terminal_and_lines_in_a_log():
    facts = RunFacts(["my/pairs.jsonl"], "org/[red]x", None, [("data", "[bold]x[/bold]"), ("model", "y" * 100)])
    table, lines = StringIO(), StringIO()
    show_start(facts, Console(file=table, force_terminal=True, width=60, color_system=None, soft_wrap=True))
    show_start(facts, Console(file=lines, width=60, soft_wrap=True))
    assert max(map(len, table.getvalue().splitlines())) <= 60
    assert "org/[red]x aligned with my/pairs.jsonl" in table.getvalue()
    assert lines.getvalue().splitlines() == ["data:          [bold]x[/bold]", f"model:         {'y' * 100}"]
