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
from tests.written_run import HOSTILE, LAYERS, write_images, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


class Html(HTMLParser):
    """A page as its elements (tag, attributes), and the text directly inside each h2 and script."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {"script": [], "h2": []}
        self.inside = ""
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), "an attribute given twice"
        self.found.append((tag, dict(attrs)))
        self.inside = tag
        self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.text[self.inside][-1] += data

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
    assert scripts.pop("index.html") == scripts.pop("vocabulary.html") == scripts.pop("layers.html") == []
    own = next(iter(scripts.values()))
    assert len(own) == 1
    assert all(found == own for found in scripts.values())
    tags = {path: {tag for tag, _ in page.found} for path, page in pages.items()}
    assert not set.union(*tags.values()) & {"iframe", "object", "embed", "base", "form", "style>"}
    assert [path for path in tags if "svg" in tags[path]] == ["layers.html"]
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
    about_all = [folder(job) / f"{name}.html" for name in ("index", "layers", "vocabulary")]
    for width in (390, 1320):
        for path in (*about_all, first_page(job, 0), first_page(job, 2)):
            with opened(browser, path, java_script_enabled=False, viewport={"width": width, "height": 800}) as page:
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
