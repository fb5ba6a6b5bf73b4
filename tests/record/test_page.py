from html.parser import HTMLParser

import pytest
from test_report import RUN, TWO_STEPS, logged

from kvshare.record import page, report, svg


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
    metrics = [m | {report.PEARSON: 0.99, report.DIFFERENCE: 1e-9} for m in logged(0.25, 0.75)]
    return report.summarize(TWO_STEPS, metrics, {**RUN, "forecast": forecast, "model": "a<b"})


def test_every_number_is_on_the_page(result):
    words = set(Page(page.render(result)).words)
    assert numbers(result) <= words
    assert {"77,130", "128.000", "<v>", "0.25 → 0.75"} <= words


def test_page_needs_nothing_else(result):
    text = page.render(result)
    assert Page(text).addresses == []
    assert "script" not in Page(text).tags
    assert "url(" not in text
    assert "a<b" not in text


def test_page_has_a_plot_of_each_kind(result):
    assert Page(page.render(result)).tags.count("svg") == 7  # no answer length was logged


def test_page_of_nothing():
    assert "No request was recorded" in page.render(report.summarize([], [], RUN))


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (0, 21036), (0, 3e9), (0, 0.07), (-2, 5)])
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = svg.linear_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7


def test_log_ticks_span_the_values():
    assert svg.log_ticks(7e-10, 9e-10) == pytest.approx([1e-10, 1e-9])
    assert svg.log_ticks(1e-9, 1e-9) == pytest.approx([1e-9, 1e-8])
