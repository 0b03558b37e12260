"""The page of `deit demo` in a real browser that reaches nothing but this machine."""

import importlib.util
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from deit_jax import __main__ as program
from tests.demo_server import served

if importlib.util.find_spec("gradio") is None:  # one that is there and cannot be imported fails
    pytest.skip("Gradio is not installed; the Makefile does so", allow_module_level=True)
pytestmark = pytest.mark.slow  # a server and a browser, half a minute

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# Of every picture on the page whether it is drawn; what is laid over it counts too.
DRAWN = "() => [...document.querySelectorAll('#answer img')].map(i => i.complete && i.naturalWidth)"
WIDTH = "() => document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def page_of(browser, digits_run, tmp_path_factory):
    """Return a function that opens the page of two models, as wide as asked."""
    teacher = digits_run / "teacher"
    words = ["demo", f"--weights={digits_run},{teacher}", "--port=0", "--examples=4"]
    contexts, asked = [], []

    with served(tmp_path_factory.mktemp("served"), *words) as server:

        def open_page(size=DESK, **options):
            context = browser.new_context(viewport=size, **options)
            contexts.append(context)

            def local_only(route):
                asked.append(route.request.url)
                here = urlsplit(route.request.url).hostname == "127.0.0.1"
                route.continue_() if here else route.abort()

            context.route("**/*", local_only)
            page = context.new_page()
            page.goto(server.address)
            page.wait_for_selector("#answer .verdict")
            return page

        open_page.asked, open_page.server = asked, server
        yield open_page
        for context in contexts:
            context.close()


def drop(page, file, expected):
    """Give the page a file and wait until it speaks of it."""
    page.set_input_files("#file input[type=file]", str(file))
    page.wait_for_function(
        "text => document.querySelector('#answer').innerText.includes(text)", arg=expected
    )


def test_an_image_goes_in_and_its_class_comes_out(page_of, digits_run, tmp_path, capsys):
    """What stands on the page is what `deit predict` says, and all pictures are drawn."""
    rng, file = np.random.default_rng(0), tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file)
    page = page_of()
    assert len(page.query_selector_all("#answer section")) == 2
    drop(page, file, "of photo.png")
    assert program.main(["predict", f"--weights={digits_run}", "--json", str(file)]) == 0
    (said,) = json.loads(capsys.readouterr().out)["results"]
    found = page.inner_text("#answer section:first-child .answer.fused").split("\n")
    for best in said["predictions"]:
        number = found.index(best["class"])
        shown = float(re.search(r"[\d.]+", found[number + 1])[0]) / 100
        assert shown == pytest.approx(best["probability"], abs=1.1e-3)
    drawn = page.evaluate(DRAWN)
    assert len(drawn) == 1 + 3 + 2 * 3 + 1  # the convnet beside it has its photograph alone
    assert all(width > 0 for width in drawn)
    assert "no attention to show" in page.inner_text("#answer section:last-child")


def test_an_example_and_another_block(page_of):
    page = page_of()
    truth = page.inner_text("#examples button >> nth=2")
    page.click("#examples button >> nth=2")
    page.wait_for_selector(f"#answer .verdict:has-text('In the data it is {truth}')")
    page.fill("#block input[type=number]", "1")
    page.keyboard.press("Tab")
    page.wait_for_selector("#answer h3:has-text('Each head of block 1 of 2')")
    assert f"In the data it is {truth}" in page.inner_text("#answer section:first-child")


def test_what_is_no_image_is_told_and_the_next_one_answered(page_of, tmp_path):
    for name, data in (("damaged.jpg", b"\xff\xd8\xff\xe0 no more"), ("text.png", b"words")):
        (tmp_path / name).write_bytes(data)
        page = page_of()
        drop(page, tmp_path / name, f"{name}: not a readable image")
        (line,) = page.query_selector_all("#answer .error")
        assert line.get_attribute("role") == "alert"
        assert page.query_selector("#answer section") is None
        Image.new("RGB", (30, 30), (200, 10, 10)).save(tmp_path / "red.png")
        page.click("#file [aria-label*=Clear], #file button[aria-label*=Remove]")
        drop(page, tmp_path / "red.png", "of red.png")
        assert page.query_selector("#answer .error") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_to_the_side(page_of, tmp_path, scheme):
    name = "a_rather_long_name_of_a_photograph_" * 3 + ".png"
    Image.new("RGB", (300, 200), (0, 99, 200)).save(tmp_path / name)
    page = page_of(PHONE, color_scheme=scheme, is_mobile=True, has_touch=True)
    assert page.evaluate(WIDTH) == 390
    drop(page, tmp_path / name, "a_rather_long_name")
    assert page.evaluate(WIDTH) == 390
    size = page.query_selector("#answer .maps img").bounding_box()
    assert size["width"] >= 140  # of a phone's 390
    back = page.evaluate("() => getComputedStyle(document.querySelector('.model')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) > 380) == (scheme == "light")


def test_a_photograph_of_50_megapixels(page_of, tmp_path):
    size = (8660, 5774)
    small = np.random.default_rng(0).integers(0, 256, (58, 87, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(
        tmp_path / "large.jpg", quality=85
    )
    page = page_of()
    drop(page, tmp_path / "large.jpg", "of large.jpg")
    status = Path(f"/proc/{page_of.server.process.pid}/status")
    if status.exists():  # Linux
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
        assert peak < 2_500_000  # kB; it was a million


def test_nothing_leaves_this_machine(page_of):
    """Not from the pages above, nor from the server; pages have no address of others to ask."""
    page_of()
    assert len(page_of.asked) > 20
    assert {urlsplit(url).hostname for url in page_of.asked} == {"127.0.0.1"}
    assert page_of.server.asked == ""
