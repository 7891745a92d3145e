"""The report in a real browser: filters, slider, keyboard, what is drawn, and that hostile answers stay text."""

import pytest

from llava.eval import diff_answers, report
from tests.look.runs import HOSTILE, write_run, write_runs

GRAY = 215  # pale patches are lighter in every channel


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two runs over three questions; `tests.look.runs` says what is in them."""
    folder = tmp_path_factory.mktemp("report")
    dense, pruned = write_runs(folder)
    report.main([str(dense), str(pruned), "--output", str(folder / "report.html")])
    return folder / "report.html"


@pytest.fixture
def opened(page, file):
    page.goto(file.as_uri())
    page.wait_for_selector("[data-layer]")
    return page


def rows(page):
    return page.locator("#list .row .text").all_text_contents()  # rows outside of the window are not laid out


def card(page, name):
    return page.locator(f'.card[data-run="{name}"]')


def pixel(page, name, column, row):
    """Color in the middle of a cell of the pruned picture's 4 x 4 tokens."""
    return page.evaluate(
        """([name, column, row]) => {
            const canvas = document.querySelector(`.card[data-run="${name}"] canvas`);
            const x = (column + 0.5) / 4 * canvas.width, y = (row + 0.5) / 4 * canvas.height;
            return [...canvas.getContext("2d").getImageData(x + 3, y + 5, 1, 1).data].slice(0, 3);
        }""",
        [name, column, row],
    )


def settle(page, layer):
    """Waits until every picture is drawn for a layer."""
    drawn = "layer => [...document.querySelectorAll('[data-layer]')].every((box) => box.dataset.layer === layer)"
    page.wait_for_function(drawn, arg=str(layer))


def test_summary_and_charts(opened):
    table = opened.locator("#summary")
    assert table.locator("tbody th").all_inner_texts() == ["dense", "autoprune 5"]
    assert table.locator("tbody tr").nth(1).locator("td").all_inner_texts() == [
        "66.7", "100.0%", "5.0", "9.0", "40.0%", "2.0 ms"
    ]  # fmt: skip
    assert opened.inner_text("#change-count") == "3 answers differ; 1 became wrong, 1 became right"
    said = [svg.get_attribute("aria-label") for svg in opened.locator("#charts svg").all()]
    assert said[0] == "Mutual information in layer 1: 3 questions from 1.50 to 3.50 bits, mean 2.50"
    assert said[1].startswith("Slope of the retention curve: 3 questions from 0.20 to 0.40")
    assert said[2].startswith("Right answers over slope: slope 0.20: 100%")


def test_filters_and_sorting(opened):
    assert rows(opened) == ["What color is it?", "What shape is it?", "Is it a star?"]
    for chosen, expected in (
        ("wrong", ["What shape is it?"]),
        ("right", ["Is it a star?"]),
        ("same", []),
        ("changed", ["What color is it?", "What shape is it?", "Is it a star?"]),
    ):
        opened.select_option("#change", chosen)
        assert rows(opened) == expected
        assert opened.inner_text("#count") == f"{len(expected)} of 3 questions"
    opened.select_option("#change", "")
    opened.select_option("#sort", "slope")
    assert rows(opened)[0] == "Is it a star?", "its slope is the smallest"
    opened.check("#descending")
    assert rows(opened)[0] == "What color is it?"
    opened.fill("#search", "SQUARE")  # an answer
    assert rows(opened) == ["What shape is it?"]
    assert opened.inner_text("#question") == "What shape is it?" and opened.inner_text("#truth") == "Truth: circle"
    assert card(opened, "autoprune 5").locator(".verdict").inner_text() == "wrong"
    opened.fill("#search", "nothing of the kind")
    assert rows(opened) == []


def test_the_other_way_round(opened):
    opened.select_option("#from", "1")
    opened.select_option("#to", "0")
    opened.select_option("#change", "wrong")
    assert rows(opened) == ["Is it a star?"]


def test_survivors_of_the_layer_that_the_slider_says(opened):
    """Cells of the 4 x 4 raster: the picture, red, lies in the two middle rows; above and below is padding."""
    settle(opened, -1)
    assert opened.locator("#layer").get_attribute("max") == "2"
    assert pixel(opened, "autoprune 5", 1, 1)[0] > 200 and pixel(opened, "autoprune 5", 1, 1)[1] < 60
    padding = pixel(opened, "autoprune 5", 1, 0)
    assert max(padding) - min(padding) < 20, "padding is gray"
    opened.fill("#layer", "1")
    settle(opened, 1)
    assert opened.inner_text("#layer-text") == "after layer 1"
    assert opened.get_attribute("#layer", "aria-valuetext") == "after layer 1"
    # Token 5 (row 1, column 1) is kept, 7 (row 1, column 3) was dropped, 6 merged away.
    assert pixel(opened, "autoprune 5", 1, 1)[1] < 60
    assert min(pixel(opened, "autoprune 5", 3, 1)) > GRAY - 40 and pixel(opened, "autoprune 5", 3, 1)[1] > 180
    assert pixel(opened, "dense", 3, 1)[1] < 60
    words = card(opened, "autoprune 5").locator(".small").first.inner_text()
    assert words == "3 patches + 1 merged"
    label = card(opened, "autoprune 5").locator("canvas").get_attribute("aria-label")
    assert label == "3 patches + 1 merged after layer 1"


def test_members_of_merged_tokens_are_outlined(opened):
    """Behind layer 1 the merged token is made of 2, 3 and 6: there is a line around 6 and none between 2 and 3."""
    opened.fill("#layer", "1")
    settle(opened, 1)
    edges = opened.evaluate(
        """() => {
            const canvas = document.querySelector('.card[data-run="autoprune 5"] canvas');
            const context = canvas.getContext("2d"), w = canvas.width / 4, h = canvas.height / 4;
            const dark = (x, y) => { const d = context.getImageData(x, y, 1, 1).data; return Math.max(...d.slice(0, 3))
                - Math.min(...d.slice(0, 3)) > 90; };
            return [dark(2 * w, 0.5 * h), dark(3 * w, 0.4 * h), dark(2 * w, 1.3 * h), dark(2.4 * w, 2 * h)];
        }"""
    )
    assert edges == [True, False, True, True], "left of 2, between 2 and 3, left of 6, below 6"


def test_retention_curves_with_budget_information_and_slope(opened):
    said = opened.locator("#curve li").all_inner_texts()
    assert said == [
        "dense: 16.0 tokens per layer of 16.",
        "autoprune 5: 5.0 tokens per layer of 16, budget 5, mutual information 1.50 bits, slope 0.400.",
    ]
    assert opened.locator("#curve polyline").count() == 2 and opened.locator("#curve .budget").count() == 1
    before = opened.get_attribute("#now", "x1")
    opened.fill("#layer", "2")
    assert opened.get_attribute("#now", "x1") != before


def test_tokens_flops_and_times(opened):
    facts = card(opened, "autoprune 5").locator("dl").inner_text().split("\n")
    told = [line.strip() for line in facts if line.strip()]
    for name, value in (("visual tokens", "16"), ("per layer, nominal", "5.0"), ("time: prefill", "2.0 ms")):
        assert told[told.index(name) + 1] == value
    assert "40.0%" in told[told.index("FLOPs, of dense") + 1]


def test_keyboard_alone(opened):
    opened.keyboard.press("j")
    assert opened.inner_text("#question") == "What shape is it?"
    opened.keyboard.press("k")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert opened.inner_text("#layer-text") == "after layer 1"
    opened.keyboard.press("ArrowLeft")
    assert opened.inner_text("#layer-text") == "after layer 0"
    opened.focus("#list")
    opened.keyboard.press("End")
    assert opened.inner_text("#question") == "Is it a star?"
    assert opened.get_attribute("#list", "aria-activedescendant") == "row-2"
    assert opened.get_attribute("#row-2", "aria-selected") == "true"
    opened.keyboard.press("/")
    opened.keyboard.type("j")  # is text now
    assert opened.input_value("#search") == "j" and opened.inner_text("#count") == "0 of 3 questions"
    opened.keyboard.press("Escape")
    opened.focus("#layer")
    opened.keyboard.press("Home")
    assert opened.inner_text("#layer-text") == "before the decoder"


def test_a_link_leads_to_its_question(page, file):
    page.goto(file.as_uri() + "#1")
    page.wait_for_selector("[data-layer]")
    assert page.inner_text("#question") == "What shape is it?"


UNNAMED = """() => {
    const named = (e) => (e.labels && e.labels.length) || e.textContent.trim()
        || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby");
    const controls = document.querySelectorAll("input, select, button, canvas, svg[role], [role=listbox]");
    return [...controls].filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 80));
}"""
LOWEST_CONTRAST = """() => {
    const linear = (x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((x) => linear(x / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (!color.endsWith(", 0)")) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const contrast = (e) => {
        const a = light(getComputedStyle(e).color), b = light(ground(e));
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    const texts = document.querySelectorAll("h1, h2, h3, p, td, th, dt, dd, label, .sub, .text, .verdict, kbd");
    return Math.min(...[...texts].filter((e) => e.textContent.trim() && e.offsetParent).map(contrast));
}"""


def test_controls_have_names(opened):
    assert opened.evaluate(UNNAMED) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone_and_with_enough_contrast(browser, file, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("[data-layer]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
    boxes = [card.bounding_box() for card in page.locator(".card").all()]
    assert all(box["width"] > 300 for box in boxes) and boxes[1]["y"] > boxes[0]["y"]
    assert page.evaluate(LOWEST_CONTRAST) >= 4.5
    context.close()


def test_hostile_answers_are_text_and_run_nothing(page, tmp_path):
    write_runs(tmp_path)
    hostile = write_run(tmp_path, "hostile", [HOSTILE, "<b>bold</b>", "javascript:alert(1)"])
    name = "<img src onerror>"
    target = tmp_path / "report.html"
    report.main([f"{name}={hostile}", "--title", "<script>window.hit=4</script>", "--output", str(target)])
    page.goto(target.as_uri())
    page.wait_for_selector("[data-layer]")
    assert page.locator(".said").inner_text() == HOSTILE.replace("\u2028", "\n") or HOSTILE[:40] in page.inner_text(
        ".said"
    )
    page.keyboard.press("j")
    assert page.inner_text(".said") == "<b>bold</b>" and page.locator(".said b").count() == 0
    assert page.inner_text("h3") == name and page.locator("img").count() == 0
    assert page.title() == "<script>window.hit=4</script>"
    assert page.evaluate("window.hit") is None


def test_diff_opens_what_differs(page, tmp_path):
    dense, pruned = write_runs(tmp_path)
    with pytest.raises(SystemExit):
        diff_answers.main([str(pruned), str(dense), "--html", str(tmp_path / "diff.html")])
    page.goto((tmp_path / "diff.html").as_uri())
    page.wait_for_selector("[data-layer]")
    assert page.locator(".card h3").all_inner_texts() == ["autoprune 5", "dense"], "in the order of the arguments"
    assert page.inner_text("#count") == "3 of 3 questions"
