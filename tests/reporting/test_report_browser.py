"""The page of a report in Chromium: it draws, switches, hovers and exports, and loads nothing."""

import io
import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from clae_fast import report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (chromium-driver)"
)

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1400,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory, downloads):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def url(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert report.main([str(runs / "pair"), str(runs / "none"), "-o", str(out)]) == 0
    return out.as_uri()


@pytest.fixture(scope="module")
def opened(chromium, url):
    requests(chromium)
    chromium.get(url)
    wait(lambda: chromium.execute_script("return document.documentElement.dataset.ready"))
    assert requests(chromium) == [url]
    return chromium


@pytest.fixture
def page(opened):
    """The open page, which a test leaves as it was; it has nothing to log and nothing to load."""
    yield opened
    assert opened.get_log("browser") == []
    assert requests(opened) == []


def requests(driver):
    """What was loaded since the last call, but for what the page itself holds."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


def wait(condition, seconds=60):
    """What `condition` returns once it holds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return found


def find(page, selector):
    return page.find_element("css selector", selector)


def shown(page, selector="[data-part]"):
    """Whether each of the elements is to be seen."""
    return [element.is_displayed() for element in page.find_elements("css selector", selector)]


def background(page):
    return find(page, "body").value_of_css_property("background-color")


def screenshot(page, path):
    """The pixels of the window, which `path` gets too.  # [H, W, 3]."""
    page.save_screenshot(str(path))
    return np.asarray(Image.open(path).convert("RGB"))


def test_every_figure_is_drawn(page, tmp_path):
    drawn = [
        plot.get_attribute("id")
        for plot in page.find_elements("css selector", ".plot")
        if plot.is_displayed() and plot.find_elements("css selector", "svg.main-svg")
    ]
    assert drawn == [
        "losses", "accuracy", "accuracy-time", "throughput",
        "attack-0", "embedding-0", "similarities-0", "neighbors-0",
    ]  # fmt: skip
    pixels = screenshot(page, tmp_path / "page.png")
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_the_switch_shows_one_run_at_a_time(page):
    assert shown(page) == [True, False]
    find(page, "button[data-run='1']").click()
    assert shown(page) == [False, True]
    wait(lambda: page.find_elements("css selector", "#embedding-1 .points path"))
    pressed = page.find_elements("css selector", "button[data-run][aria-pressed='true']")
    assert [button.text for button in pressed] == ["none"]
    find(page, "button[data-run='0']").click()
    assert shown(page) == [True, False]


def test_light_and_dark(page, tmp_path):
    light, before = background(page), screenshot(page, tmp_path / "light.png")
    find(page, "#theme").click()
    assert background(page) != light
    wait(lambda: screenshot(page, tmp_path / "dark.png").mean() < 100 < before.mean())
    find(page, "#theme").click()
    assert background(page) == light


def test_begins_as_the_reader_prefers(page):
    def prefer(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        theme = "return document.documentElement.dataset.theme"
        wait(lambda: page.execute_script(theme) == scheme)

    prefer("dark")
    prefer("light")


def test_a_point_shows_its_image(page):
    from selenium.webdriver import ActionChains

    tip = find(page, "#tip")
    assert not tip.is_displayed()
    point = find(page, "#embedding-0 .points path")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)

    def pointed():
        # away first: scrolling, which hides it, may still go on
        ActionChains(page).move_to_element(find(page, "#embedding-0")).move_to_element(
            point
        ).perform()
        return tip.is_displayed()

    wait(pointed)
    assert tip.text in map(str, range(10))
    picture = Image.open(io.BytesIO(tip.screenshot_as_png)).convert("L")
    assert np.ptp(np.asarray(picture)) > 100


@pytest.mark.parametrize("name", ["losses", "attack-0"])
def test_png_of_a_figure(page, downloads, name):
    button = find(page, f"button[data-png='{name}']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    path = downloads / f"{name}.png"
    wait(path.exists)
    width, height = page.execute_script(
        f"const at = document.getElementById('{name}'); return [at.clientWidth, at.clientHeight]"
    )
    with Image.open(path) as image:
        assert image.size == (2 * width, 2 * height)
        colors = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colors) > 20


def test_fits_a_narrow_window(page, tmp_path):
    page.set_window_size(500, 1000)
    try:
        wait(lambda: find(page, "#losses svg.main-svg").size["width"] < 500)
        screenshot(page, tmp_path / "narrow.png")
        inner, whole = page.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]"
        )
        assert whole <= inner
    finally:
        page.set_window_size(1400, 1000)
