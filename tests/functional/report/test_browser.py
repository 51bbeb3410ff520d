"""The report in a real browser, opened as a file, with no network to load anything from."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_spin.report.write import write_report
from tests.functional.report import browser as browsers
from tests.functional.report.browser import Browser
from tests.unit.report.runs import WORDS, Shape, write_run

pytestmark = pytest.mark.skipif(browsers.missing() is not None, reason=str(browsers.missing()))

ATTACK = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'
    "<!-- <script> ]]> <svg onload=window.hacked=3> &lt;b&gt; 'quoted' \"quoted\" \u2028 {{x}} ${x}"
)
CHOOSE = (
    "const s = document.querySelector(`select[aria-label=${arguments[0]}]`); s.value = arguments[1];"
    "s.dispatchEvent(new Event('change'))"
)
LUMINANCE = (
    "const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);"
    "return r + g + b"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    log = tmp_path_factory.mktemp("browser") / "chromedriver.log"
    with browsers.open_browser(log=log) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    shape = Shape(prompts=120, heldout=30, iterations=3, steps=60, special=[ATTACK])
    write_report([write_run(directory / "run", shape)], directory / "report.html")
    return directory / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Browser]:
    """The report, on a desktop screen; afterwards the console must be empty."""
    browser.appear(width=1280)
    browser.console(), browser.requests()
    browser.open(report)
    yield browser
    assert browser.console() == []
    assert browser.run("return window.hacked === undefined")
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:"))] == []


def plots(page: Browser) -> dict[str, int]:
    """Title -> length of everything that is drawn with a line, in pixels."""
    return dict(
        page.run(
            "const drawn = (card) => [...card.querySelectorAll('.plot .curve')]"
            ".reduce((sum, path) => sum + path.getTotalLength(), 0);"
            "return [...document.querySelectorAll('[data-plot]')].filter((card) => card.checkVisibility())"
            ".map((card) => [card.dataset.plot, Math.round(drawn(card))])"
        )
    )


def test_every_plot_is_drawn(page: Browser) -> None:
    drawn = plots(page)
    expected = {
        "Score of held-out answers",
        "Length of held-out answers",
        "Loss",
        "Margin",
        "Log-probabilities",
        "Gain over the opponent",
        "Rewards",
        "Accuracy",
        "Gradient norm",
        "Learning rate",
        "Speed",
        "Response lengths",
        "Margins after the iteration",
        "Change of the demonstrations’ log-probability",
        "Log-probability under the opponent",
    }
    assert set(drawn) == expected
    assert {title: length for title, length in drawn.items() if length < 100} == {}
    assert "NaN" not in page.run("return document.querySelector('main').innerHTML")
    assert page.run("return document.querySelectorAll('.bar span').length") == 2 + 3 * 5


def test_less_known_metrics_are_drawn_when_they_are_unfolded(page: Browser) -> None:
    assert page.run("return document.querySelector('#training summary').textContent") == "2 more metrics"
    page.click("#training summary")
    page.wait("return document.querySelectorAll('#training details .plot:empty').length === 0")
    drawn = plots(page)
    assert min(drawn[name] for name in ("forward_backward_seconds", "useful_tokens")) > 100


def test_curves_lie_inside_of_their_frames(page: Browser) -> None:
    outside = page.run(
        "const box = (e) => e.getBoundingClientRect();"
        "const leaves = (a, b) => a.left < b.left - 1 || a.right > b.right + 1"
        " || a.top < b.top - 1 || a.bottom > b.bottom + 1;"
        "return [...document.querySelectorAll('.plot svg')].filter((svg) =>"
        " [...svg.querySelectorAll('.curve, .dot')].some((e) => leaves(box(e), box(svg)))).length"
    )
    assert outside == 0


def test_iterations_can_be_laid_over_each_other(page: Browser) -> None:
    keys = (
        "return [...document.querySelectorAll('[data-plot=\"Loss\"] .keys span')].map((s) => s.textContent)"
    )
    assert page.run(keys) == []
    page.click("#training .switch button:last-child")
    page.wait("return document.querySelectorAll('[data-plot=\"Loss\"] .plot .curve').length > 0")
    assert page.run(keys) == ["iteration 0", "iteration 1", "iteration 2"]


def test_the_pointer_shows_values(page: Browser) -> None:
    place = page.run(
        "const s = document.querySelector('[data-plot=\"Loss\"] svg');"
        "s.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
    )
    page.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    page.wait("return !document.querySelector('#tip').hidden")
    assert page.run("return document.querySelector('#tip').textContent").startswith("step ")


def test_a_prompt_full_of_markup_stays_text(page: Browser) -> None:
    page.type("#sample-search", "window.hacked = 2")
    page.wait("return document.querySelector('#sample-count').textContent.startsWith('1 of')")
    page.click("#sample-list .row")
    page.wait("return document.querySelector('#detail').open")
    assert page.run("return document.querySelector('#detail .full').textContent") == ATTACK
    assert (
        page.run("return document.querySelectorAll('#detail script, #detail img, #detail svg').length") == 0
    )
    page.click("#detail button[aria-label=Close]")
    page.wait("return !document.querySelector('#detail').open")


def test_benchmarks_stand_beside_the_paper_s(page: Browser) -> None:
    rows = page.run(
        "return [...document.querySelectorAll('.benchmarks tbody tr')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert rows[:2] == [["θ0", "25.0 %"], ["θ1", "30.0 %"]] and len(rows) == 4 + 5
    assert rows[4] == ["paper's θ0", "26.8 %"]


def test_guards_that_fired_are_listed(page: Browser) -> None:
    guards = "return [...document.querySelectorAll('#guards li')].map((item) => item.textContent)"
    assert page.run(guards) == [
        "real_fall (warn), train of iteration 1, step 7: demonstrations became <b>less</b> likely"
    ]


def test_search_finds_answers_and_clears(page: Browser) -> None:
    shown = "return document.querySelector('#sample-count').textContent"
    assert page.run(shown) == "150 of 150"
    page.type("#sample-search", "HELDOUT-000003")
    page.wait("return document.querySelector('#sample-count').textContent === '1 of 150'")
    page.click("#sample-list .row")
    text = page.run("return document.querySelector('#detail').textContent")
    assert all(f"θ{model}" in text for model in range(4))
    assert "score" in text
    page.click("#detail button[aria-label=Close]")
    page.type("#sample-search", "stands nowhere")
    page.wait("return document.querySelector('#sample-list .empty') !== null")
    page.type("#sample-search", WORDS[0])
    page.wait("return document.querySelectorAll('#sample-list mark').length > 0")


def test_order_and_filter(page: Browser) -> None:
    page.run(CHOOSE, "Order", "margin")
    tags = "return [...document.querySelectorAll('#sample-list .row')].map((r) => r.textContent)"
    margins = [
        min(float(part.split()[0].replace("−", "-")) for part in row.split("margin ")[1:])
        for row in page.run(tags)
        if "margin " in row
    ]
    assert margins == sorted(margins)
    assert len(margins) > 5
    page.run(CHOOSE, "Filter", "equal")
    count = page.run("return Number(document.querySelector('#sample-count').textContent.split(' ')[0])")
    assert 0 < count < 150


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Browser, report: Path, scheme: str) -> None:
    page.appear(width=1280, scheme=scheme)
    page.open(report)
    is_light = page.run(LUMINANCE) > 384
    assert is_light == (scheme == "light")
    page.click("#theme")
    assert (page.run(LUMINANCE) > 384) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_readable_on_a_phone(page: Browser, report: Path, width: int) -> None:
    page.appear(width=width, height=780, phone=True)
    page.open(report)
    assert page.run("return document.documentElement.scrollWidth") <= width
    smallest = page.run(
        "return Math.min(...[...document.querySelectorAll('main *')].filter((e) => e.childNodes.length"
        "&& e.offsetParent !== null && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11
    assert min(plots(page).values()) > 100
    page.click("#sample-list .row")
    page.wait("return document.querySelector('#detail').open")
    assert page.run("return document.querySelector('#detail').getBoundingClientRect().right") <= width


def test_several_runs_side_by_side(browser: Browser, tmp_path: Path) -> None:
    first = write_run(tmp_path / "history", Shape(iterations=2))
    second = write_run(tmp_path / "no-history", Shape(iterations=3, history=0, seed=3))
    write_report([first, second], tmp_path / "both.html")
    browser.appear(width=1280)
    browser.console()
    browser.open(tmp_path / "both.html")
    keys = (
        "return [...document.querySelectorAll('[data-plot=\"Loss\"] .keys span')].map((s) => s.textContent)"
    )
    assert browser.run(keys) == ["history", "no-history"]
    assert browser.run("return document.querySelectorAll('#models tbody tr').length") == 3 + 4
    settings = browser.run(
        "return [...document.querySelectorAll('#settings-table tbody tr')].map((r) => r.textContent)"
    )
    assert settings == ["seed03", "spin.history10"]
    browser.run(CHOOSE, "Run", "1")
    assert browser.run("return document.querySelector('#sample-list .head').textContent").endswith("θ3")
    assert browser.console() == []


@pytest.mark.slow
def test_50_000_samples_stay_usable(browser: Browser, tmp_path: Path) -> None:
    def text(chance: random.Random) -> str:
        return " ".join(chance.choices(WORDS, k=12))

    shape = Shape(prompts=49_900, heldout=100, iterations=2, steps=3, prompt=text, answer=text)
    run = write_run(tmp_path / "run", shape)
    write_report([run], tmp_path / "report.html", num_samples=50_000)
    browser.appear(width=1280)
    browser.console()
    start = time.monotonic()
    browser.open(tmp_path / "report.html")
    assert time.monotonic() - start < 20
    assert browser.run("return document.querySelector('#sample-count').textContent") == "50,000 of 50,000"
    assert browser.run("return document.querySelectorAll('#sample-list .row').length") < 40
    browser.run("const l = document.querySelector('#sample-list'); l.scrollTop = l.scrollHeight")
    browser.wait("return document.querySelector('#sample-list .row[data-place=\"49999\"]') !== null")
    assert _seconds_of(browser, "train-031415") < 4  # the first search reads every text
    assert browser.run("return document.querySelector('#sample-count').textContent").startswith("1 of")
    assert _seconds_of(browser, "paper engine") < 2
    slowest = browser.run(
        "const l = document.querySelector('#sample-list'); let worst = 0; for (let i = 0; i < 50; i += 1) {"
        "l.scrollTop = i * 70000; const s = performance.now(); l.dispatchEvent(new Event('scroll'));"
        "l.getBoundingClientRect(); worst = Math.max(worst, performance.now() - s); } return worst"
    )
    assert slowest < 200
    assert browser.console() == []


def _seconds_of(browser: Browser, query: str) -> float:
    before = browser.run("return document.querySelector('#sample-count').textContent")
    start = time.monotonic()
    browser.type("#sample-search", query)
    browser.wait(
        "return document.querySelector('#sample-count').textContent !== arguments[0]".replace(
            "arguments[0]", repr(before)
        )
    )
    return time.monotonic() - start
