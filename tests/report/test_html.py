"""The HTML report in a real browser; skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil

import pytest
from samples import planned_analysis, unplanned_analysis

from memplan.analysis import Analysis, FrontierPoint
from memplan.report.html import notebook_html, report_html

_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1400",
]
_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (_CHROMIUM and _DRIVER), reason="no chromium and chromedriver")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=service.Service(_DRIVER))
    yield driver
    driver.quit()


def open_report(browser, analysis: Analysis, folder) -> None:
    """Write the report as a user does, open it, wait until it is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    path = folder / "report.html"
    analysis.export(path)
    browser.get(path.as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    open_report(browser, planned_analysis(layers=6), tmp_path_factory.mktemp("report"))
    return browser


@pytest.fixture
def report(opened):
    """The same page for every test; after each, nothing was logged and nothing was fetched."""
    browser = opened
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def text_of(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)


def move_to(browser, selector: str, dx: float, dy: float) -> None:
    """Point at a place of an element, in shares of its width and height from its middle."""
    from selenium.webdriver import ActionChains

    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    size = element.size
    for nudge in (3, 0):  # plotly wants a move inside the chart
        ActionChains(browser).move_to_element_with_offset(
            element, int(dx * size["width"]) + nudge, int(dy * size["height"])
        ).pause(0.3).perform()


@needs_chromium
def test_the_charts_draw(report):
    for chart in ("timeline", "map", "modules", "frontier"):
        assert report.execute_script("return document.querySelectorAll(`#${arguments[0]} .main-svg`).length", chart)
    assert report.execute_script("return document.querySelectorAll('#timeline .scatterlayer .trace').length") >= 6
    assert report.execute_script("return document.querySelectorAll('#map .bars path').length") > 20
    assert report.execute_script("return document.querySelectorAll('#modules .slice').length") > 6
    words = text_of(report, "#timeline")
    assert "forward" in words and "backward" in words and "without a plan" in words and "budget" in words


@needs_chromium
def test_pointing_at_the_timeline_shows_buffers_with_module_and_line(report):
    move_to(report, "#timeline .draglayer .nsewdrag", -0.3, 0.2)
    assert re.search(r"softmax_\d|mm_\d", text_of(report, "#timeline .hoverlayer"))
    panel = text_of(report, "#at-step")
    assert re.search(r"layers\.\d", panel) and re.search(r"model\.py:\d+", panel) and "KiB" in panel


@needs_chromium
def test_pointing_at_a_buffer_names_it(report):
    move_to(report, "#map .draglayer .nsewdrag", 0.0, 0.3)
    shown = text_of(report, "#map .hoverlayer")
    assert "layers." in shown and "KiB" in shown and "steps" in shown


@needs_chromium
def test_the_keyboard_walks_the_timeline(report):
    from selenium.webdriver import Keys

    chart = report.find_element("id", "timeline")
    chart.send_keys(Keys.HOME)
    before = text_of(report, "#at-step h3")
    assert "(the peak)" in before
    chart.send_keys(Keys.ARROW_LEFT)
    after = text_of(report, "#at-step h3")
    assert after != before
    chart.send_keys(Keys.HOME)
    assert text_of(report, "#at-step h3") == before


@needs_chromium
def test_the_budget_slider_moves(report):
    from selenium.webdriver import Keys

    slider = report.find_element("id", "budget")
    before = text_of(report, "#budget-says")
    slider.send_keys(Keys.ARROW_LEFT)
    assert "recomputing the 5 softmax" in text_of(report, "#budget-does")
    slider.send_keys(Keys.ARROW_LEFT)
    assert text_of(report, "#budget-says") != before and ", 0.00 % time" in text_of(report, "#budget-says")


@needs_chromium
def test_the_filter_and_the_time_axis(report):
    report.find_element("id", "filter").send_keys("softmax")
    shown = report.execute_script(
        "return [...document.querySelectorAll('#peak-table tbody tr')].filter(r => !r.hidden)"
    )
    assert shown and all("softmax" in row.text for row in shown)
    report.find_element("css selector", "input[value=time]").click()
    assert "predicted time" in text_of(report, "#timeline .infolayer")


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(report, width):
    report.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        report.refresh()
        assert report.execute_script("return document.documentElement.scrollWidth") <= width
        for chart in ("timeline", "map"):
            ticks, title, legend = (
                report.execute_script(
                    "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.top, r.bottom]",
                    f"#{chart} {part}",
                )
                for part in (".xaxislayer-above", ".g-xtitle", ".legend")
            )
            assert ticks[1] <= title[0] + 1 and title[1] <= legend[0] + 1, f"{chart}: labels on top of each other"
    finally:
        report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(report, scheme):
    """Contrast of the page's text at least 4.5 : 1 (WCAG 2.1, success criterion 1.4.3)."""
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    values = report.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return ['--ground', '--raised', '--ink', '--soft', '--accent', '--bad'].map(n => s.getPropertyValue(n).trim())"
    )
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    ground, raised, *inks = map(luminance, values)
    for ink in inks:
        for behind in (ground, raised):
            assert (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05) >= 4.5


def luminance(color: str) -> float:
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_chromium
@pytest.mark.parametrize(
    "analysis",
    [
        unplanned_analysis(layers=0),
        unplanned_analysis(),
        Analysis.of(unplanned_analysis().program, frontier=(FrontierPoint(1, 1, 0.0, 0.0, "feasible"),)),
        planned_analysis(layers=1500),
    ],
    ids=["one op", "no plan", "one budget", "thousands of steps"],
)
def test_odd_analyses_draw_without_an_error(browser, tmp_path, analysis):
    open_report(browser, analysis, tmp_path)
    assert browser.get_log("browser") == []


def test_what_the_user_named_cannot_become_markup():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    page = report_html(unplanned_analysis(name=evil))
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "<img" not in notebook_html(unplanned_analysis(name=evil))


def test_the_file_names_no_server_to_fetch_from():
    page = report_html(planned_analysis())
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"?(https?:)?//", page)
    assert "default-src 'none'" in page
