import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from test_report import RUN, TWO_STEPS, at, end, logged, request, summarize

from kvshare.record import page, rows


class Page(HTMLParser):
    """Text, attributes, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.addresses, self.tags = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def numbers(report):
    """Each token count and reward of a report, as the page writes it."""
    rows = [report["tokens"], *report["replica"], *report["step"], *(r for s in report["step"] for r in s["replica"])]
    return {f"{row[name]:,}" for row in rows for name in page.COLUMNS} | {f"{s['reward']:.3f}" for s in report["step"]}


@pytest.fixture
def result():
    forecast = {
        "shareable_tokens_a_step": 77_130,
        "local_tokens_a_step": 0,
        "stored_bytes_a_step": 99,
        "verdict": "<v>",
    }
    metrics = [m | {rows.PEARSON: 0.99, rows.DIFFERENCE: 1e-9} for m in logged(0.25, 0.75)]
    return summarize(TWO_STEPS, metrics, {**RUN, "forecast": forecast, "model": "a<b"})


def test_every_number_is_on_the_page(result):
    words = set(Page(page.html(result)).words)
    assert numbers(result) <= words
    assert {"77,130", "128.000", "<v>", "0.25 → 0.75"} <= words


def test_page_needs_nothing_else(result):
    text = page.html(result)
    assert Page(text).addresses == []
    assert "script" not in Page(text).tags
    assert "url(" not in text
    assert "a<b" not in text


def test_page_has_a_plot_of_each_kind(result):
    assert Page(page.html(result)).tags.count("svg") == 7  # no answer length was logged


def test_page_of_nothing():
    assert "No request was recorded" in page.html(summarize([], [], RUN))


def test_hovering_shows_the_number(result):
    assert {"step 1: 256 shared hit", "replica 1: 256 computed", "step 2: 0.75"} <= set(Page(page.html(result)).words)


def many_steps(count):
    metrics = [{**m, rows.DIFFERENCE: 0.5 if i == 1234 else 1e-9} for i, m in enumerate(logged(*[0.5] * count))]
    events = [line for step in range(1, count + 1) for line in (at(step, request(0, "p", 300)), end(step, step))]
    return summarize(events, metrics, RUN)


def test_page_of_many_steps_is_bounded_and_says_so():
    few, many = many_steps(200), many_steps(5000)
    assert len(page.html(many)) < 1.2 * len(page.html(few))
    assert len(json.dumps(many)) < 1.2 * len(json.dumps(few))
    assert "A row is 25 steps" in page.html(many)
    assert "A row is 25 steps" in page.markdown(many)
    assert "A bar or point is 25 steps" in page.html(many)
    assert (len(few["step"]), few["step"][0]["prompt"]) == (200, 300)
    assert (len(many["step"]), many["step"][0]["prompt"]) == (200, 25 * 300)
    assert (many["steps"], many["tokens"]["prompt"]) == (5000, 5000 * 300)


def test_the_worst_step_is_on_the_plot_of_many():
    words = Page(page.html(many_steps(5000))).words
    assert "step 1226–1250: 5.0e-01" in words
    assert "step 1226–1250: 300 computed" in words  # the mean of a step
    assert sum(word.startswith("step ") and word.endswith(": 0.5") for word in words) == rows.MOST_ROWS  # rewards


def test_workers_and_launchers_do_not_import_what_draws():
    code = "import sys, kvshare.hooks.verl.step_metrics, kvshare.record.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
