"""The report: every neuron once, hostile text harmless, boxes where the data says, the same bytes each time."""

import io
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tasks import neurons, report
from tasks.crops import MAX_CROPS
from tasks.images import ImageList
from tasks.layers import Layer
from tasks.report import ReportJob, ReportSettings, ReportWorker, num_parts
from tests.written_run import HOSTILE, LAYERS, make, write_images, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "img", "input"}
"""Elements of our pages that have no end."""
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


class Html(HTMLParser):
    """A page as its elements (tag, attributes), and the text directly inside each h2 and script."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {"script": [], "h2": []}
        self.inside = ""
        self.open: list[tuple[str, str | None, list[str]]] = []  # elements that have an end: tag, id, their text
        self.closed: list[tuple[dict[str, str | None], str, str]] = []
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), "an attribute given twice"
        self.found.append((tag, dict(attrs)))
        self.inside = tag
        self.text.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id"), []))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        name, _, text = self.open.pop()
        assert name == tag, "elements overlap"
        self.closed.append(({outer: own for outer, own, _ in self.open}, tag, " ".join("".join(text).split())))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)
        if self.inside:
            self.text[self.inside][-1] += data

    def inside_of(self, outer: str, tag: str) -> list[tuple[str | None, str]]:
        """Id of the outer element and all text, white space as one blank, of each such element inside one."""
        return [(outers[outer], text) for outers, name, text in self.closed if name == tag and outer in outers]

    def values(self, tag: str, name: str) -> list[str | None]:
        return [attributes[name] for t, attributes in self.found if t == tag and name in attributes]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def job(images, tmp_path_factory) -> ReportJob:
    """A finished report on hostile tables."""
    job = write_run(tmp_path_factory.mktemp("store"), images, LAYERS, HOSTILE)
    make_report(job)
    return job


@pytest.fixture(scope="module")
def pages(job) -> dict[str, Html]:
    return {path: Html(data) for path, data in files(job).items() if path.endswith(".html")}


def make_report(job: ReportJob, order: int = 1) -> None:
    worker = ReportWorker(job)
    for part in list(range(num_parts(job.images, job.layers)))[::order]:
        worker.run(part)


def folder(job: ReportJob) -> Path:
    return Path(job.out.store.path(job.out.name))


def files(job: ReportJob) -> dict[str, bytes]:
    root = folder(job)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("key", "value"), [("patches", 0), ("page_units", 0), ("thumbnail", 3)])
def test_settings_name_their_key(key, value):
    with pytest.raises(ValueError, match=rf"^report\.{key}={value}: must be at least"):
        ReportSettings(**{key: value})


def test_every_status_has_words():
    assert set(report.STATUSES) == set(neurons.STATUSES)


def test_every_unit_is_on_one_page(job, pages):
    rows = job.out.read_all("pages").to_pylist()
    assert {row["path"] for row in rows} == set(pages)
    for layer in job.layers:
        found = [
            (row["units"], pages[row["path"]].values("article", "id")) for row in rows if row["layer"] == layer.name
        ]
        assert [u for _, units in found for u in units] == [f"unit-{i}" for i in range(layer.num_units)]
        assert all(count == len(units) <= 250 for count, units in found)
    assert job.out.done() == set(range(num_parts(job.images, job.layers)))


def test_links_lead_to_files_of_the_report(job, pages):
    for path, page in pages.items():
        links = {a.get("href") or a.get("src") for _, a in page.found if "href" in a or "src" in a}
        for link in links - {"data:,"}:
            name, _, anchor = unquote(str(link)).partition("#")
            there = ((folder(job) / path).parent / name).resolve() if name else folder(job) / path
            assert there.is_file(), link
            assert there.is_relative_to(folder(job)), link
            ids = {a.get("id") for _, a in pages[str(there.relative_to(folder(job)))].found} if anchor else {anchor}
            assert anchor in ids, link


def test_hostile_text_stays_text(job, pages):
    scripts = {path: page.text["script"] for path, page in pages.items()}
    assert [scripts.pop(f"{name}.html") for name in ("index", "vocabulary", "layers", "classes")] == [[]] * 4
    own = next(iter(scripts.values()))
    assert len(own) == 1
    assert all(found == own for found in scripts.values())
    tags = {path: {tag for tag, _ in page.found} for path, page in pages.items()}
    assert not set.union(*tags.values()) & {"iframe", "object", "embed", "base", "form", "style>"}
    assert [path for path in tags if "svg" in tags[path]] == ["classes.html", "layers.html"]
    assert [page.text["style"] for page in pages.values() if len(page.text["style"]) != 1] == []
    assert [name for page in pages.values() for _, a in page.found for name in a if name.startswith("on")] == []
    layers = [page for path, page in pages.items() if path.startswith("layers/")]
    assert {title for page in layers for title in page.values("h2", "title")} == set(HOSTILE)
    assert {text for page in layers for text in page.text["h2"]} == set(HOSTILE)
    assert {alt for page in layers for alt in page.values("img", "alt")} == set(job.images.ids)
    assert {page.text["h1"][0] for page in layers} == {layer.name for layer in LAYERS}
    assert {"vit_<b>tiny</b>", "<script>alert(1)</script>"} <= set(pages["index.html"].text["dd"])
    told = [text for text in pages["vocabulary.html"].text["bdi"] if text.strip()]
    assert {told.count(phrase) for phrase in HOSTILE} == {4}, "a hub, a pair, a prompt, one that is never used"
    names = [text for text in pages["classes.html"].text["b"] if text.strip()]
    assert {*names} >= {*HOSTILE, "class 999"}
    compared = pages["layers.html"]
    assert {text for text in compared.text["bdi"] if text.strip()} == set(HOSTILE), "each is a family"
    assert {f"{LAYERS[0].name}: 0.500", f"{LAYERS[2].name}: 0.300"} <= set(compared.text["title"])


def test_redrawn_auc_where_there_is_one(job, pages, images, tmp_path):
    drawn = [row for row in job.drawn.read_all("drawn").to_pylist() if row["auc"] is not None]
    told = [t for page in pages.values() for t in page.values("p", "title") if "48 against 47 scenes" in (t or "")]
    assert 0 < len(told) == len(drawn)
    assert "median redrawn AUC" in pages["index.html"].text["dt"]
    without = write_run(tmp_path, images, LAYERS[2:], ["x"])
    without.drawn = None
    make_report(without)
    assert not any(b"redrawn" in data.lower() for path, data in files(without).items() if path.endswith(".html"))


def cards(pages: dict[str, Html], tag: str, start: str) -> dict[tuple[str, str], list[str]]:
    """By page and card the texts of such elements that begin so, in one line each."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, page in pages.items():
        for card, text in page.inside_of("article", tag):
            if text.startswith(start):
                found.setdefault((path, str(card)), []).append(text)
    return found


def test_negative_side_where_there_is_one(job, pages, images, tmp_path):
    rows = [row for row in job.neurons.read_all("neurons").to_pylist() if row["negative"] is not None]
    told = cards(pages, "p", "negative:")
    of_layer = {layer.name: number for number, layer in enumerate(job.layers)}
    expected = {}
    for row in rows:
        path = ReportWorker(job).pages[of_layer[row["layer"]]][row["unit"] // 250]
        known = "none" if row["negative_confidence"] is None else f"{row['negative_confidence']:.2f}"
        expected[path, f"unit-{row['unit']}"] = [" ".join(f"negative: {row['negative']} ({known})".split())]
    assert {row["negative_confidence"] is None for row in rows} == {True, False}
    assert told == expected
    assert "Negative" in pages["index.html"].text["b"]
    one = write_run(tmp_path, images, [Layer("a", 1, "vector")], ["x"])  # unit 0 has none
    make_report(one)
    assert not any(b"egative" in data for path, data in files(one).items() if path.endswith(".html"))


def test_cards_say_what_the_model_loses(job, pages):
    """The three worst classes, nothing of what is not hurt; an interval only where images change sides."""
    told = cards(pages, "li", "switched off:")
    worker = ReportWorker(job)
    head, first = worker.pages[2][0], worker.pages[0][0]
    assert {card for path, card in told if path == head} == {f"unit-{i}" for i in range(12) if i % 6 != 3}
    assert [card for path, card in told if path == first] == ["unit-2"]
    more = cards(pages, "li", "and ")
    text = " ".join(HOSTILE[0].split())
    assert told[head, "unit-11"] == [f"switched off: {text} loses 41 points of accuracy (31 to 51)"]
    texts = [" ".join(HOSTILE[own].split()) for own in (1, 3)]
    assert more[head, "unit-11"] == [
        f"and {texts[0]} loses 38 points of accuracy", f"and {texts[1]} loses 31 points of accuracy (21 to 41)"
    ]  # fmt: skip
    assert (head, "unit-0") not in more


def test_without_ablations_there_is_no_word_of_them(images, tmp_path):
    without = write_run(tmp_path, images, LAYERS[2:], ["x"])
    without.causes = without.ablation = None
    make_report(without)
    pages = {path: data for path, data in files(without).items() if path.endswith(".html")}
    assert "classes.html" not in pages
    assert not any(b"switched off" in data or b"classes.html" in data for data in pages.values())


def test_nothing_to_test_is_said(images, tmp_path):
    none = write_run(tmp_path, images, LAYERS[2:], ["x"])
    for folder in (none.causes, none.ablation):
        assert folder
        folder.write(0, {name: make(name, []) for name in folder.tables})
    make_report(none)
    assert b"There was nothing to test" in files(none)["classes.html"]


def test_same_bytes_whatever_the_order(job, images, tmp_path):
    again = write_run(tmp_path, images, LAYERS, HOSTILE)
    make_report(pickle.loads(pickle.dumps(again)), order=-1)
    assert files(again) == files(job)


def test_thumbnails_are_of_the_images_shown(images, tmp_path):
    few = write_run(tmp_path, images, [Layer("a", 2, "chw", (7, 7))], ["x"], patches=3)
    few.settings.patches = 2
    make_report(few)
    found = {path: Image.open(io.BytesIO(data)) for path, data in files(few).items() if path.startswith("images/")}
    assert set(found) == {f"images/{number}.jpg" for number in (0, 3, 1, 4)}
    assert found["images/0.jpg"].size == (192, 144)
    assert found["images/4.jpg"].size == (30, 40), "small images are not blown up"
    assert found["images/3.jpg"].getpixel((5, 5)) == pytest.approx((60, 195, 90), abs=4)
    assert not any("comment" in image.info for image in found.values()), "the file's own comment travels along"


def test_a_part_is_done_only_when_its_pages_are_there(images, tmp_path):
    broken = write_run(tmp_path, images, LAYERS[2:], ["x"])
    folder(broken).mkdir(parents=True)
    (folder(broken) / "layers").write_text("in the way")
    with pytest.raises(OSError, match="layers"):
        ReportWorker(broken).run(images.num_shards)
    assert broken.out.done() == set()
    (folder(broken) / "layers").unlink()
    make_report(broken)
    assert broken.out.done() == set(range(num_parts(images, broken.layers)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium or chromium-browser on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, **options) -> Iterator[Page]:
    """The page, from disk; in the end: no message on the console, no error, no dialog, nothing asked from a network."""
    context = browser.new_context(**options)
    page, wrong = context.new_page(), []
    for event in ("console", "pageerror", "dialog", "requestfailed"):
        page.on(event, lambda found, event=event: wrong.append((event, str(found))))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert wrong == []


def first_page(job: ReportJob, layer: int) -> Path:
    return folder(job) / ReportWorker(job).pages[layer][0]


def test_boxes_lie_where_the_data_says(browser, job):
    rows = job.patches.read_all("patches", filters=[("layer", "==", LAYERS[0].name), ("unit", "==", 1)]).to_pylist()
    rows = sorted((row for row in rows if row["tail"] == "top"), key=lambda row: row["rank"])
    with opened(browser, first_page(job, 0)) as page:
        figures = page.locator("#unit-1 figure")
        assert figures.count() == 8
        for rank, row in enumerate(rows[:8]):
            figure, image = figures.nth(rank), figures.nth(rank).locator("img")
            figure.scroll_into_view_if_needed()
            page.wait_for_function("e => e.complete && e.naturalWidth > 0", arg=image.element_handle())
            assert figure.get_attribute("title") == f"rank {rank}, activation {9 - rank / 2:g}, {row['image_id']}"
            outer, box = (
                e.evaluate("e => e.getBoundingClientRect().toJSON()") for e in (image, figure.locator(".box"))
            )
            scale = outer["width"] / job.images.column("width")[row["image"]]
            assert outer["height"] == pytest.approx(scale * job.images.column("height")[row["image"]], abs=1)
            found = [box["x"] - outer["x"], box["y"] - outer["y"], box["width"], box["height"]]
            sides = [row["x0"], row["y0"], row["x1"] - row["x0"], row["y1"] - row["y0"]]
            assert found == pytest.approx([scale * side for side in sides], abs=1.5)
            assert figure.locator(".crop").count() == bool(row["crop_id"] % MAX_CROPS)


def test_vectors_have_no_boxes(browser, job):
    with opened(browser, first_page(job, 2)) as page:
        assert page.locator(".frame").count() > 50
        assert page.locator(".box, .crop").count() == 0
        assert page.get_by_text("no validate split").count() > 0


def test_filter(browser, job):
    with opened(browser, first_page(job, 0)) as page:
        shown, text = page.locator("article:visible"), page.get_by_label("Name or concept contains")
        assert shown.count() == 250
        for status in neurons.STATUSES[1:]:
            page.get_by_label(status.replace("_", " "), exact=True).uncheck()
        assert shown.count() == page.locator("[data-status=explained]").count() == 42
        text.fill("JAVASCRIPT:")
        assert 0 < shown.count() < 42
        assert all("javascript:" in words for words in shown.all_text_contents())
        assert set(page.locator("article:visible .hit").all_text_contents()) == {"javascript:alert(1)"}
        assert page.locator("output").text_content() == f"{shown.count()} of 250 on this page"
        text.fill("no such thing")
        assert shown.count() == 0


def test_without_javascript_and_at_every_width(browser, job):
    about_all = [folder(job) / f"{name}.html" for name in ("index", "layers", "vocabulary", "classes")]
    for width in (390, 1320):
        for path in (*about_all, first_page(job, 0), first_page(job, 2)):
            with opened(browser, path, java_script_enabled=False, viewport={"width": width, "height": 800}) as page:
                for closed in page.locator("summary").all()[:3]:
                    closed.click()
                assert page.locator(".filter:visible").count() == 0
                wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                assert wide <= room, f"{path.name} scrolls sideways at {width}"


def test_index_leads_everywhere(browser, job):
    with opened(browser, folder(job) / "index.html", color_scheme="dark") as page:
        assert page.locator("h1").text_content() == "night & <day>"
        assert page.locator("tbody tr").count() == 3
        page.get_by_role("link", name=LAYERS[0].name, exact=True).click()
        assert page.locator("h1").text_content() == LAYERS[0].name
        page.get_by_role("link", name="next").first.click()
        assert page.locator("article").first.get_attribute("id") == "unit-250"
        page.get_by_role("link", name="night & <day>").click()
        assert page.url.endswith("/index.html")


def test_layers_page_shows_what_the_census_says(browser, job):
    with opened(browser, folder(job) / "index.html") as page:
        page.get_by_role("link", name="The layers compared").click()
        assert page.locator("h1").text_content() == "Layers"
        rows = page.locator("tbody tr")
        assert [rows.nth(i).locator("a").text_content() for i in range(3)] == [layer.name for layer in LAYERS]
        assert rows.nth(0).locator(".number").all_text_contents() == ["0.500", "-0.020", "0.250", "0.900"]
        assert rows.nth(1).locator(".number").all_text_contents() == ["none"] * 4
        assert "none explained" in (rows.nth(1).text_content() or "")
        statuses, families = rows.nth(0).locator(".stack").all()
        for stack, number in ((statuses, len(neurons.STATUSES)), (families, len(HOSTILE))):
            widths = stack.locator("i").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
            assert len(widths) == number
            assert max(widths) - min(widths) < 0.1, "equal shares"
        assert statuses.locator("i").first.get_attribute("title") == "explained: 167 of 1000 (17%)"
        rows.nth(2).locator("a").click()
        assert page.locator("h1").text_content() == "head"


def test_points_lie_where_the_census_says(browser, job):
    """On the scale that is drawn beside them, the first layer left of the last; none for the layer without figures."""
    census = job.traits.read_all("census").to_pylist()
    middle = (
        "all => all.map(e => { const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })"
    )
    with opened(browser, folder(job) / "layers.html") as page:
        for figure in page.locator("figure").all():
            name = str(figure.locator("figcaption").text_content())
            (first, last), zero_and_high = (figure.locator(c).evaluate_all(middle) for c in (".at", ".scale"))
            (_, zero), (_, high) = zero_and_high
            unit = (zero - high) / float(figure.locator("text").all_text_contents()[1])
            found = [(zero - y) / unit for _, y in (first, last)]
            assert found == pytest.approx([census[0][name], census[2][name]], abs=0.01)
            assert first[0] < last[0] - 100


def test_classes_page_shows_what_the_tables_say(browser, job):
    with opened(browser, folder(job) / "index.html", viewport={"width": 1300, "height": 900}) as page:
        page.get_by_role("link", name="The classes and the neurons").click()
        assert page.locator("h1").text_content() == "Classes"
        assert page.locator(".totals dd").all_text_contents() == ["9", "19", "16%", "0.80", "0.40"]
        assert page.locator("details").count() == 9
        assert [page.locator(f"#class-{own} summary .number").first.text_content() for own in (0, 1, 2, 999)] == [
            "2 of 12", "1 of 1", "0 of 1", "0 of 0"
        ]  # fmt: skip
        own = page.locator("#class-0")
        assert not own.locator("table").is_visible()
        own.locator("summary").click()
        rows = own.locator("tbody tr")
        assert rows.count() == 11
        assert rows.last.text_content() == "and 2 more that cost it less"
        cells = [" ".join(text.split()) for text in rows.nth(3).locator("td").all_text_contents()]
        assert cells[1:] == [
            "", "2.62 (1.62 to 3.62)", "0.25 (93%)", "66 (56 to 76)", "2", "0.80 (0.40)"
        ]  # fmt: skip
        assert own.locator("tr:not(.unsure) .point").count() == 2
        single = [" ".join(text.split()) for text in page.locator("#class-1 td").all_text_contents()]
        assert single[2:] == ["1.50 (0.50 to 2.50)", "none", "38", "none", "none"]
        rows.nth(4).locator("a").click()
        assert page.url.endswith(f"{ReportWorker(job).pages[2][0]}#unit-4")


def test_drops_and_curves_lie_where_the_tables_say(browser, job):
    box = "all => all.map(e => { const b = e.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom] })"
    with opened(browser, folder(job) / "classes.html", viewport={"width": 1300, "height": 900}) as page:
        own = page.locator("#class-0")
        own.locator("summary").click()
        for rank, row in enumerate(own.locator("tbody tr").all()[:10]):
            ((left, right, *_),) = row.locator(".axis").evaluate_all(box)
            found = {}
            for name in ("zero", "range", "point", "random"):
                ((start, end, *_),) = row.locator(f".{name}").evaluate_all(box)
                found[name] = [4 * (x - left) / (right - left) for x in (start, end)]  # from 0 to the largest upper end
            drop = 3 - rank / 8
            assert found["range"] == pytest.approx([drop - 1, drop + 1], abs=0.03)
            assert sum(found["point"]) / 2 == pytest.approx(drop, abs=0.03)
            assert (found["zero"][0], found["random"][0]) == pytest.approx((0, 0.25), abs=0.03)
        for name, values in (("accuracy", [1, 0.75, 0.5, 0.25, 0]), ("control_accuracy", [1, 0.95, 0.9, 0.85])):
            points = own.locator(f"circle.{name}").evaluate_all(box)
            zero, one = (line[2] for line in own.locator("line").evaluate_all(box))
            heights = [((top + bottom) / 2 - zero) / (one - zero) for _, _, top, bottom in points]
            assert heights == pytest.approx(values, abs=0.01)
            assert [x for x, *_ in points] == sorted(x for x, *_ in points)
