"""examples/web.html in a real browser: what somebody does with it, and what they see.

    apt-get install chromium chromium-driver && pip install -e '.[web,browser]'
    pytest -m browser tests/test_web_browser.py

With SHOTS=FOLDER it leaves pictures of the page there, at three widths, light and dark.
"""

import base64
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.reference import ROOT, cli
from tests.test_web import LONG, RED_HOUSE, SMALL, Server, same, shelf, text_of  # noqa: F401

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = pytest.mark.browser
PATIENCE = 120  # seconds
WIDTHS = (400, 900, 1600)


def start_browser(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


@pytest.fixture(scope="module")
def server(shelf, tmp_path_factory):  # noqa: F811
    server = Server(tmp_path_factory.mktemp("browser"), "--folder", shelf)
    yield server
    server.stop()


class Page:
    """The page, as somebody sees it who has eyes and hands."""

    def __init__(self, browser, server, downloads):
        self.browser, self.server, self.downloads = browser, server, downloads
        self.browser.get(f"http://127.0.0.1:{server.port}/")
        self.wait(lambda: self.value("steps"))

    def wait(self, good):
        return WebDriverWait(self.browser, PATIENCE, 0.05).until(lambda _: good())

    def __getitem__(self, css):
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def js(self, code, *args):
        return self.browser.execute_script(code, *args)

    def value(self, name):
        return self[f"#{name}"].get_property("value")

    def open(self, *names):
        for name in names:
            self.js("document.getElementById(arguments[0]).open = true", name)

    def fill(self, **values):
        for name, value in values.items():
            field = self[f"#{name}"]
            if field.tag_name == "select":
                Select(field).select_by_value(str(value))
            else:
                field.clear()
                field.send_keys(str(value))

    def small(self, **more):
        """The tests' small picture, with its seed."""
        self.tick("random", False)
        self.fill(**SMALL | more)

    def tick(self, name, wanted):
        box = self[f"#{name}"]
        if box.is_selected() != wanted:
            box.click()

    def slide(self, name, value):
        self.js("const x = document.getElementById(arguments[0]); x.value = arguments[1];"
                "x.dispatchEvent(new Event('input', {bubbles: true}))", name, value)  # fmt: skip

    def state(self):
        return self["#stage"].get_attribute("data-state")

    def paint(self):
        """Press the button, and wait. -> the new pictures' names"""
        before = self["#stage"].get_attribute("data-job")
        self["#paint"].click()
        self.wait(lambda: self["#stage"].get_attribute("data-job") != before)
        self.wait(lambda: self.state() in ("done", "failed", "cancelled"))
        assert self.state() == "done", self["main"].text
        return [source.rpartition("/")[2] for source in self.sheet()]

    def sheet(self):
        """-> the addresses of what is shown on the stage; read at once, for they change"""
        return self.js("return [...document.querySelectorAll('.sheet img')].map((x) => x.src)")

    def drop(self, path, css):
        """A file, on what is there."""
        code = base64.b64encode(Path(path).read_bytes()).decode()
        self.js(
            """const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "some.png", { type: "image/png" }));
            const place = document.querySelector(arguments[1]);
            for (const kind of ["dragover", "drop"]) {
              const more = { dataTransfer, bubbles: true, cancelable: true };
              place.dispatchEvent(new DragEvent(kind, more));
            }""", code, css,
        )  # fmt: skip

    def brush(self, *points):
        """A stroke over the canvas, in shares of its width and height from the middle."""
        canvas = self["#mask"]
        self.js("arguments[0].scrollIntoView({block: 'center'})", canvas)
        size = canvas.size["width"], canvas.size["height"]
        pixels = [[round(share * n) for share, n in zip(point, size)] for point in points]
        actions = ActionChains(self.browser, duration=20)
        actions.move_to_element_with_offset(canvas, *pixels[0]).click_and_hold()
        for point in pixels[1:]:
            actions.move_to_element_with_offset(canvas, *point)
        actions.release().perform()

    def brushed(self):
        """-> the share of the canvas that is brushed"""
        return self.js(
            """const c = document.getElementById("mask");
            const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
            let n = 0;
            for (let i = 0; i < data.length; i += 4) n += data[i + 3] > 99 && data[i] > 150;
            return n / (c.width * c.height);"""
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    browser = start_browser(folder)
    browser.folder = folder
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, server):
    browser.set_window_size(1600, 1000)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page = Page(browser, server, browser.folder)
    page.js("localStorage.clear()")
    browser.refresh()
    page.wait(lambda: page.value("steps"))
    yield page
    wrong = [each["message"] for each in browser.get_log("browser") if each["level"] == "SEVERE"]
    assert all("400" in line or "ERR_" in line for line in wrong), wrong  # refused settings


WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def check_equal(server, name, *options):
    done = cli(*WORDS, *options, "--output", "cli.png", cwd=server.folder)
    assert done.returncode == 0, done.stderr
    assert same(server.folder / "cli.png", server.pictures / name)
    assert text_of(server.folder / "cli.png") == text_of(server.pictures / name)
    (server.folder / "cli.png").unlink()


# %% What somebody does ----------------------------------------------------------------------------


def test_type_a_prompt_paint_and_download(page, server):
    """The downloaded file is the command line's picture."""
    assert page["#random"].is_selected() and page.value("prompt")
    assert (page.value("steps"), page.value("sampler")) == ("25", "plms") or page.value("steps")
    page.small(negative_prompt="a tree", n_images=2)
    names = page.paint()
    assert len(names) == 2
    page.wait(lambda: len(page.all("#gallery li")) >= 2)
    assert {"seed 7", "seed 8"} <= {each.text for each in page.all("#gallery .under span")}
    page["#gallery li .thumb"].click()
    assert page["#viewer"].is_displayed() and "Steps: 3" in page["#viewer pre"].text
    page["#viewer"].send_keys(Keys.ARROW_RIGHT)
    name = page["#viewer .caption"].text
    page["#download"].click()
    page.wait(lambda: (page.downloads / name).exists())
    assert (page.downloads / name).read_bytes() == (server.pictures / name).read_bytes()
    page["#viewer"].send_keys(Keys.ESCAPE)
    assert not page["#viewer"].is_displayed()
    check_equal(server, names[0], "--negative-prompt=a tree")


def test_a_random_seed_is_shown_and_can_be_kept(page):
    page.small()
    page.tick("random", True)
    (first,) = page.paint()
    seed = page.value("seed")
    assert seed.isdigit() and seed in first
    page.tick("random", False)
    (second,) = page.paint()
    assert page.value("seed") == seed and first.split(".")[0] in second


def test_watch_the_preview_change_and_cancel(page, server):
    page.small(steps=400, width=192, height=192)
    before = set(server.pictures.iterdir())
    page["#prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
    seen = set()

    def look():
        seen.update(source for source in page.sheet() if source.startswith("data:image/png"))
        return len(seen) > 3

    page.wait(look)
    assert "left" in page["#progress"].text and page["#progress"].text.startswith("Step ")
    page["#cancel"].click()
    page.wait(lambda: page.state() == "cancelled")
    assert page["#line"].text == "Cancelled." and not page["#stage"].is_displayed()
    assert set(server.pictures.iterdir()) == before


def test_brush_a_mask(page, server):
    """Undo, clear, invert, eraser, keys; and what is painted is the command line's."""
    page.open("from")
    page["#image_file"].send_keys(str(RED_HOUSE))
    page.wait(lambda: page["#with_image"].is_displayed())
    page.tick("partly", True)
    page.wait(lambda: page.js("return document.getElementById('mask').width") == 128)
    assert page.value("strength") == "1"
    page.brush((-0.3, -0.3), (0.3, -0.3))
    one = page.brushed()
    page.brush((-0.3, 0.3), (0.3, 0.3))
    assert 0.03 < one < 0.2 and 1.8 * one < page.brushed() < 2.2 * one
    page["#undo"].click()
    assert abs(page.brushed() - one) < 0.02
    page["#invert"].click()
    assert abs(page.brushed() - (1 - one)) < 0.03
    page["#mask"].send_keys(Keys.CONTROL, "z")
    page["[data-tool=eraser]"].click()
    page.brush((-0.3, -0.3), (0, -0.3))
    assert 0.2 * one < page.brushed() < 0.8 * one
    page["#clear"].click()
    assert page.brushed() < 0.01
    page["#paint"].click()
    problem = page["#from .problem"]
    page.wait(lambda: "Nothing is brushed yet" in problem.text)
    page["[data-tool=brush]"].click()
    page["#mask"].send_keys(Keys.ARROW_RIGHT, Keys.SPACE, *[Keys.ARROW_DOWN] * 6, Keys.SPACE)
    assert page.brushed() > 0.02
    page.small(width=128, height=128)
    (name,) = page.paint()
    text = text_of(server.pictures / name)
    image, mask = (text.split(f"{key}: ")[1].split(",")[0] for key in ("Image", "Mask"))
    white = np.asarray(Image.open(server.folder / mask).convert("L")) > 127
    assert 0.01 < white.mean() < 0.3 and white[80, 66:68].all() and not white[:, :50].any()
    options = f"--image={image}", f"--mask={mask}", "--width=128", "--height=128", "--strength=1"
    check_equal(server, name, *options)
    known = np.asarray(Image.open(RED_HOUSE).convert("RGB"))[:, :40]
    assert np.array_equal(np.asarray(Image.open(server.pictures / name))[:, :40], known)
    page.js("localStorage.clear()")
    page.browser.refresh()
    page.wait(lambda: page.value("steps"))
    page.drop(server.pictures / name, "#prompt")  # as it was, with its mask
    page.wait(lambda: page["#editor"].is_displayed() and page.brushed() > 0.02)
    (again,) = page.paint()
    assert same(server.pictures / name, server.pictures / again)
    assert text_of(server.pictures / name) == text_of(server.pictures / again)


@pytest.mark.parametrize("size", [(64, 300), (300, 64), (1600, 1200)])
def test_the_brush_lies_over_the_picture(page, size, tmp_path):
    """Whatever shape it has: the canvas covers the picture, and nothing else."""
    Image.new("RGB", size, "navy").save(tmp_path / "a.png")
    page.open("from")
    page["#image_file"].send_keys(str(tmp_path / "a.png"))
    page.wait(lambda: page["#with_image"].is_displayed())
    page.tick("partly", True)
    shape = "const box = document.getElementById(arguments[0]).getBoundingClientRect();"
    shape += "return [box.left, box.top, box.width, box.height]"
    page.wait(lambda: page.js("return document.getElementById('mask').width") == min(1024, size[0]))
    under, mask = (page.js(shape, name) for name in ("under", "mask"))
    assert np.allclose(under, mask, atol=1) and under[3] < 750
    assert abs(under[2] / under[3] / (size[0] / size[1]) - 1) < 0.03


def test_drop_a_picture_to_make_it_again(page, server):
    page.small(sampler="dpm++", cfg=3)
    page.open("more", "loras_box")
    page["[data-lora]"].clear()
    page["[data-lora]"].send_keys("0.5")
    page.fill(spacing="trailing", rescale="0.3")
    (name,) = page.paint()
    page["#reset"].click()
    assert page.value("sampler") != "dpm++"
    page.drop(server.pictures / name, "body")
    page.wait(lambda: page.value("sampler") == "dpm++")
    assert not page["#random"].is_selected() and page.value("seed") == "7"
    (again,) = page.paint()
    assert name != again and same(server.pictures / name, server.pictures / again)
    page.drop(ROOT / "README.md", "body")
    page.wait(lambda: "not readable as a picture" in page["#error"].text)


def test_follow_a_picture_with_a_controlnet(page, server):
    page.small(width=128, height=128)
    page.open("control")
    Select(page["#controlnet"]).select_by_index(1)
    page["#paint"].click()
    page.wait(lambda: "Choose what the ControlNet is to follow" in page["#control"].text)
    page.drop(RED_HOUSE, "[data-slot=control]")
    page.wait(lambda: page.all("[data-slot=control] img"))
    (name,) = page.paint()
    assert "ControlNet: " in text_of(server.pictures / name)


def test_what_is_wrong_stands_beside_its_field(page):
    page.small(steps=0)
    page["#paint"].click()
    page.wait(lambda: page.all("#steps_problem"))
    assert page["#steps_problem"].text == "Steps must be 1 to 999, got 0."
    assert page["#steps"].get_attribute("aria-invalid") == "true"
    assert page["#steps"].get_attribute("aria-errormessage") == "steps_problem"
    assert page.js("return document.activeElement.id") == "steps"
    page["#steps"].clear()
    page["#steps"].send_keys("1e")  # which is no number
    page["#paint"].click()
    page.wait(lambda: page["#steps_problem"].text == "Steps must be a number.")
    page.small()
    page.paint()
    assert not page.all("#steps_problem") and not page.all("[aria-invalid]")


def test_a_second_tab_shows_the_same_queue(page, server):
    page.small(steps=900, width=192, height=192)
    page["#paint"].click()
    page.wait(lambda: page.state() == "painting")
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    other = Page(page.browser, server, page.downloads)
    other.small()
    other["#paint"].click()
    other.wait(lambda: other["#progress"].text == "Place 2 in the queue")
    assert len(other.all("#queue li")) == 2
    other["#queue li button"].click()  # the first one's
    other.wait(lambda: other.state() == "done")
    page.browser.close()
    page.browser.switch_to.window(first)
    page.wait(lambda: page.state() in ("cancelled", "done"))


def test_a_closed_tab_cancels(page, server):
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    other = Page(page.browser, server, page.downloads)
    other.small(steps=900, width=192, height=192)
    other["#paint"].click()
    other.wait(lambda: other.state() == "painting")
    page.browser.close()
    page.browser.switch_to.window(first)
    page.wait(lambda: page.state() == "painting")
    page.small()
    page["#paint"].click()
    page.wait(lambda: page.state() == "done" and not page.all("#queue:not([hidden]) li"))


def test_what_was_typed_is_there_after_a_reload(page):
    page.fill(prompt="a green tree", steps=9)
    page.browser.refresh()
    page.wait(lambda: page.value("steps"))
    assert (page.value("prompt"), page.value("steps")) == ("a green tree", "9")


# %% What it looks like ----------------------------------------------------------------------------


def test_every_field_has_a_name(page):
    """For who does not see it; and everything can be reached with the keyboard."""
    page.open("from", "loras_box", "control", "more")
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {
        "textbox",
        "spinbutton",
        "combobox",
        "checkbox",
        "slider",
        "button",
        "link",
        "searchbox",
    }
    nodes = [n for n in tree if n.get("role", {}).get("value") in roles and not n.get("ignored")]
    nameless = [n for n in nodes if not n.get("name", {}).get("value")]
    assert len(nodes) > 25 and not nameless, nameless
    ids = page.js("return [...document.querySelectorAll('[id]')].map((x) => x.id)")
    assert len(ids) == len(set(ids))
    seen = set()
    page["#prompt"].click()
    for _ in range(60):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        seen.add(page.js("return document.activeElement.id"))
    assert {"paint", "again", "steps", "sampler", "seed", "image_file", "rescale"} <= seen


def contrast(a, b):
    """WCAG's, of two colours in [0, 255]."""

    def luminance(colour):
        parts = np.asarray(colour) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return parts @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(page, scheme):
    """4.5 at least, as WCAG 2.1 AA has it for texts of this size."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    colours = page.js(
        """const style = (name) => {
          const probe = document.createElement("div");
          probe.style.color = `var(--${name})`;
          document.body.append(probe);
          const found = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
          probe.remove();
          return found;
        };
        return Object.fromEntries(["page", "card", "field", "ink", "soft", "main", "on-main",
          "problem"].map((name) => [name, style(name)]));"""
    )  # fmt: skip
    pairs = [(ink, on) for ink in ("ink", "soft", "problem") for on in ("page", "card", "field")]
    for ink, on in [*pairs, ("on-main", "main"), ("main", "page")]:
        assert contrast(colours[ink], colours[on]) >= 4.5, (ink, on)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_sticks_out(page, width):
    page.open("from", "loras_box", "control", "more")
    page["#image_file"].send_keys(str(RED_HOUSE))
    page.wait(lambda: page["#with_image"].is_displayed())
    page.tick("partly", True)
    set_width(page, width)
    sizes = page.js("return [document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]
    overlaps = page.js(
        """const shown = [...document.querySelectorAll(
          "input:not(.hidden), select, textarea, button, .button, small, p, summary")]
          .filter((x) => x.checkVisibility() && x.id !== "mask" && x.getClientRects().length);
        const box = (x) => x.getBoundingClientRect();
        const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
        return shown.flatMap((a, i) => shown.slice(i + 1)
          .filter((b) => !a.contains(b) && !b.contains(a) && meet(box(a), box(b)))
          .map((b) => `${a.id || a.textContent} and ${b.id || b.textContent}`));"""
    )  # fmt: skip
    assert not overlaps


def set_width(page, width, height=1000):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})


def shoot(page, name):
    """The whole page at three widths, light and dark."""
    folder = Path(os.environ["SHOTS"])
    folder.mkdir(exist_ok=True)
    for width in WIDTHS:
        set_width(page, width)
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            time.sleep(0.3)
            page.js("scrollTo(0, 0)")
            options = {"captureBeyondViewport": True}
            shot = page.browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
            picture = Image.open(io.BytesIO(base64.b64decode(shot)))
            picture.save(folder / f"{name}-{width}-{scheme}.png")
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.skipif("SHOTS" not in os.environ, reason="for who looks at it")
def test_shots(page, server):
    for seed, prompt in enumerate(["a blue boat at night", "a red house on the grass at sunset",
                                   "a green tree", "a yellow house in the snow"]):  # fmt: skip
        page.small(prompt=prompt, seed=seed, steps=25, width=128, height=128, n_images=2)
        page.paint()
    shoot(page, "done")
    page.small(prompt="a red house on the grass at sunset", steps=90, width=192, height=192)
    page["#paint"].click()
    page["#paint"].click()
    page.wait(lambda: page.all("#queue li"))
    page.wait(lambda: page.js("return document.querySelector('progress').value >= 30"))
    shoot(page, "painting")
    page["#cancel"].click()
    page.wait(lambda: len(page.all("#queue li")) < 2)
    page["#cancel"].click()
    page.wait(lambda: page.state() == "cancelled")
    page.small(steps=0)
    page["#paint"].click()
    page.wait(lambda: page.all("#steps_problem"))
    shoot(page, "error")
    page.small()
    page.open("from", "loras_box", "control", "more")
    page["#image_file"].send_keys(str(RED_HOUSE))
    page.wait(lambda: page["#with_image"].is_displayed())
    page.tick("partly", True)
    page.wait(lambda: page.js("return document.getElementById('mask').width") == 128)
    page.brush((-0.3, -0.3), (0.1, -0.1), (0.3, -0.3))
    shoot(page, "mask")
    page.js("document.getElementById('gallery').querySelector('.thumb').click()")
    shoot(page, "viewer")
