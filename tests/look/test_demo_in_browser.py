"""The web demo in a real browser, on the small trained model: from the upload to two answers, layer by layer."""

import os

import pytest
from PIL import Image

from llava.serve import web
from tests.eval.helpers import TINY_MODEL

pytest.importorskip("gradio", reason="Gradio is not installed")
QUESTION = "What color is the star?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def served(tmp_path_factory, browser):
    """Address of a running demo, and the folder of its uploads."""
    from llava.serve.side_by_side import SideBySide

    flags = ["--model-path", TINY_MODEL, "--device", "cpu", "--port", "0", "--max-upload-mb", "1"]
    args = web.build_parser().parse_args([str(flag) for flag in flags])
    folder = tmp_path_factory.mktemp("uploads")
    before = os.environ.get("GRADIO_TEMP_DIR")
    page, address = web.launch(web.import_gradio(), SideBySide(args), args, folder)
    yield address, folder
    page.close()
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture
def opened(page, served):
    page.set_default_timeout(30_000)
    page.goto(served[0])
    page.wait_for_selector("#ask")
    return page


def upload(page, path):
    page.set_input_files("#picture input[type=file]", str(path))


def ask(page, question=QUESTION):
    page.fill("#question textarea", question)
    page.click("#ask")


@pytest.fixture
def picture(tmp_path):
    image = Image.new("RGB", (300, 200), "white")
    image.paste((200, 30, 30), (120, 60, 180, 120))
    image.save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_from_the_upload_to_two_answers(opened, picture):
    upload(opened, picture)
    opened.wait_for_selector("#picture img")
    ask(opened)
    opened.wait_for_selector("#pruned-costs table")
    for side in ("dense", "pruned"):
        assert opened.input_value(f"#{side}-answer textarea").strip()
        assert "time: prefill" in opened.inner_text(f"#{side}-costs")
    assert "mutual information" in opened.inner_text("#pruned-costs")
    assert opened.inner_text("#dense-survivors figcaption") == "576 patches after layer 1"
    first = opened.inner_text("#pruned-survivors figcaption")
    assert "after layer 1" in first and opened.get_attribute("#pruned-survivors img", "alt") == first
    opened.wait_for_selector("#curve canvas, #curve svg")
    # The slider changes what is drawn without asking again.
    drawn = opened.get_attribute("#pruned-survivors img", "src")
    opened.fill("#layer input[type=number]", "9")
    opened.keyboard.press("Enter")
    opened.wait_for_function("document.querySelector('#pruned-survivors figcaption').innerText.includes('layer 9')")
    assert opened.get_attribute("#pruned-survivors img", "src") != drawn
    # Another method and budget, on the same picture.
    opened.fill("#budget input, #budget textarea", "0.5")
    opened.fill("#method input", "fastv")
    opened.keyboard.press("Enter")
    opened.click("#ask")
    opened.wait_for_function("document.querySelector('#pruned-costs').innerText.includes('fastv')")


def test_an_example_fills_the_form(opened):
    opened.locator(".examples-holder tbody tr, .gallery-item, [data-testid=dataset] button, .table-wrap tr").nth(
        1
    ).click()
    opened.wait_for_selector("#picture img")
    opened.wait_for_function("document.querySelector('#question textarea').value.length > 5")
    opened.click("#ask")
    opened.wait_for_selector("#pruned-costs table")


def test_mistakes_are_told_on_the_page(opened, picture, tmp_path):
    ask(opened)
    opened.wait_for_selector("#problem [role=alert]")
    assert "choose a picture" in opened.inner_text("#problem")
    upload(opened, picture)
    opened.wait_for_selector("#picture img")
    opened.fill("#budget input, #budget textarea", "<img src=x onerror='window.hit=1'>")
    ask(opened)
    opened.wait_for_function("document.querySelector('#problem').innerText.includes('<img')")
    assert opened.evaluate("window.hit") is None and opened.locator("#problem img").count() == 0
    opened.fill("#budget input, #budget textarea", "64")
    ask(opened, "<b onclick='1'>What</b> color is it?")
    opened.wait_for_selector("#pruned-costs table")
    assert opened.inner_text("#problem").strip() == ""


def test_what_is_no_picture_or_too_large_is_refused(browser, served, tmp_path):
    """A page of its own: here the browser rightly complains about a refused upload."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(served[0])
    page.wait_for_selector("#ask")
    (tmp_path / "false.png").write_bytes(b"no picture at all")
    upload(page, tmp_path / "false.png")
    page.wait_for_selector("#picture img")
    ask(page)
    page.wait_for_selector("#problem [role=alert]")
    assert "cannot be read" in page.inner_text("#problem")
    (tmp_path / "large.png").write_bytes(os.urandom(3 * 2**20))
    page.reload()
    page.wait_for_selector("#ask")
    upload(page, tmp_path / "large.png")
    page.wait_for_timeout(1500)
    assert not [path for path in served[1].rglob("large*") if path.stat().st_size > 2**20]
    context.close()


def test_uploads_lie_in_the_servers_own_folder_and_nowhere_else(opened, picture, served):
    upload(opened, picture)
    opened.wait_for_selector("#picture img")
    assert any(served[1].rglob("red.png"))
    assert served[0].startswith("http://127.0.0.1:")
