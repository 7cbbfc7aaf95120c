"""The report of a study, looked at with a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rtdetr_act.study.charts import Figure, assign_styles, draw_classes, draw_cost, draw_differences
from rtdetr_act.study.leaderboard import build_leaderboard
from rtdetr_act.study.page import render_page
from rtdetr_act.study.pareto import LATENCY, PARAMETERS, Cost
from rtdetr_act.study.run_record import RunRecord

sync_api = pytest.importorskip("playwright.sync_api", reason="looking at the page takes: pip install playwright")

GAINS = {"stock": 0.0, "arelu": 0.002, "dyrelu_b": 0.03, "mish": -0.001, "hardswish": -0.03}
CLASSES = {"Platelets": -0.1, "RBC": 0.0, "WBC": 0.15}
EPOCHS = 20


def make_study(folder: Path, gains: dict[str, float] = GAINS, seeds: int = 3, **more: Any) -> list[RunRecord]:
    """Write run folders as Ultralytics leaves them, and return their records."""
    return [make_run(folder, name, gain, seed, **more) for name, gain in gains.items() for seed in range(seeds)]


def make_run(folder: Path, name: str, gain: float, seed: int, files: bool = True, **more: Any) -> RunRecord:
    rng = random.Random(f"{name}{seed}")
    score = 0.516 + gain + 0.01 * math.sin(seed) + rng.gauss(0, 0.003)
    run = folder / f"run-{len(list(folder.glob('run-*')))}" if files else folder
    if files:
        run.mkdir(parents=True)
        write_results(run / "results.csv", rng, score)
        if "relu" in name:
            write_shapes(run / "activations.json", rng)
    record = RunRecord(
        name=f"{name}-s{seed}",
        variant=name,
        activation=name,
        setting="",
        seed=seed,
        state="done",
        scores={"mAP50": score + 0.29, "mAP50-95": score},
        classes={label: score + shift + rng.gauss(0, 0.01) for label, shift in CLASSES.items()},
        epochs=EPOCHS,
        sites=0 if name == "stock" else 51,
        parameters=907885 + 217831 * name.startswith("dyrelu_b") + 102 * name.startswith("arelu"),
        gflops_640=1.91,
        seconds_per_epoch=18 + 5 * rng.random(),
        folder=run,
        arguments={
            "model": "rtdetr-n.yaml",
            "data": "bccd.yaml",
            "epochs": EPOCHS,
            "imgsz": 224,
            "optimizer": "AdamW",
            "seed": seed,
        },
        versions={"ultralytics": "8.4.190", "torch": "2.15.0", "device": "cpu"},
        command=f"rtdetr-act train --act '{name}' --model rtdetr-n --data bccd.yaml epochs={EPOCHS} seed={seed}",
    )
    return dataclasses.replace(record, **more)


def write_results(path: Path, rng: random.Random, score: float) -> None:
    """Write a results.csv as Ultralytics 8.3.0 does, with blanks around its names."""
    rows = [
        "    epoch,   train/giou_loss,   train/cls_loss,   metrics/mAP50(B),   metrics/mAP50-95(B),   val/giou_loss"
    ]
    for epoch in range(1, EPOCHS + 1):
        grown = score * (1 - math.exp(-epoch / 4)) + rng.gauss(0, 0.004)
        loss = 0.6 + 1.2 * math.exp(-epoch / 6) + rng.gauss(0, 0.01)
        rows.append(f"{epoch:9d},{loss:19.5f},{loss / 2:18.5f},{grown + 0.2:20.5f},{grown:22.5f},{loss:16.5f}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_shapes(path: Path, rng: random.Random) -> None:
    x = [round(-4 + 0.125 * index, 3) for index in range(65)]
    sites = []
    for site in range(51):
        slope, scale = 0.25 + rng.gauss(0, 0.05) + 0.004 * site, 1.9 - 0.012 * site
        sites.append(
            {
                "name": f"model.{site // 4}.m.{site % 4}.act",
                "activation": "AReLU",
                "before": [1.88 * value if value > 0 else 0.9 * value for value in x],
                "after": [scale * value if value > 0 else slope * value for value in x],
            }
        )
    path.write_text(json.dumps({"x": x, "sites": sites}), encoding="utf-8")


LATENCIES = {"stock": 6.9, "arelu": 7.0, "dyrelu_b": 11.4, "mish": 6.95, "hardswish": 6.85}


def write(
    records: Sequence[RunRecord],
    path: Path,
    *,
    latencies: dict[str, float] = LATENCIES,
    metric: str = "mAP50-95",
    **more: str,
) -> Path:
    lines = build_leaderboard(records, baseline="stock", latencies=latencies)
    given = {"title": "Activations in rtdetr-n on BCCD", "metric": metric, **more}
    path.write_text(render_page(lines, records, **given), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    # Where Playwright keeps its own one on Linux; conftest.py moves XDG_CACHE_HOME.
    if sys.platform == "linux":
        os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", str(Path.home() / ".cache" / "ms-playwright"))
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        except sync_api.Error:
            pytest.skip("no browser to look at the page with: install Chromium, or run `playwright install chromium`")
        yield browser
        browser.close()


class Watched:
    """A page in the browser, and what it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def colour(self, selector: str) -> str:
        return self.page.locator(selector).first.evaluate("each => getComputedStyle(each).stroke")

    def width(self, selector: str) -> int:
        return self.page.locator(selector).first.evaluate("each => each.clientWidth")

    def wait(self, seen: Callable[[], bool]) -> None:
        """Wait until it is so; Playwright's own way needs an eval, which the page's policy refuses."""
        for _ in range(200):
            if seen():
                return
            self.page.wait_for_timeout(25)
        raise AssertionError("not seen in time")

    def column(self, table: str, index: int) -> list[str]:
        return self.page.locator(f"#{table} tbody tr > :nth-child({index + 1})").all_inner_texts()

    def close(self) -> None:
        self.context.close()
        assert self.messages == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    records = make_study(folder)
    lost = {"scores": {}, "classes": {}, "folder": folder / "none"}
    records[1] = dataclasses.replace(records[1], state="failed", reason="out of memory after epoch 3", **lost)
    records[-1] = dataclasses.replace(records[-1], state="stopped", reason="stopped by halving", **lost)
    return write(records, folder / "report.html", latency_note="Latency: median of 50 images on two CPU cores.")


@pytest.fixture(scope="module")
def opened(browser: Any, study: Path) -> Iterator[Watched]:
    watched = Watched(browser, study)
    yield watched
    watched.close()


@pytest.mark.integration
def test_every_chart_is_drawn_and_valid(opened: Watched) -> None:
    charts = opened.page.locator(".js-plotly-plot")
    drawn = {div.get_attribute("id"): div.locator(".trace").count() for div in charts.all()}
    # Bands, lines, single runs, means and fronts are traces; shapes have 51 sites and the curve before.
    expected = {"difference-0": 8, "costs-0": 11, "costs-1": 11, "curves-0": 10, "curves-1": 10, "classes-0": 10}
    assert drawn == {**expected, "shapes-0": 52, "shapes-1": 52}
    faults = charts.evaluate_all("all => all.map(div => Plotly.validate(div.data, div.layout) || [])")
    assert [fault["msg"] for chart in faults for fault in chart if fault["code"] != "unused"] == []
    assert opened.count("#classes-0 .point") == (5 + 13) * len(CLASSES)  # means, and finished runs
    assert opened.count("a") == 0


@pytest.mark.integration
def test_the_page_tells_the_result_in_words(opened: Watched) -> None:
    summary = opened.page.locator(".summary").inner_text()
    assert f"5 variants, 3 seeds (0, 1, 2), of rtdetr-n.yaml, on bccd.yaml, {EPOCHS} epochs at 224 pixels. " in summary
    assert "15 runs: 13 done, 1 failed and 1 stopped." in summary
    assert "No difference shown for" in summary
    body = opened.page.locator("body").inner_text()
    assert "out of memory after epoch 3" in body
    assert "Latency: median of 50 images on two CPU cores." in body
    assert "rtdetr-act train --act 'dyrelu_b' --model rtdetr-n --data bccd.yaml epochs=20 seed=2" in body


def test_the_words_give_the_figures_of_the_leaderboard(tmp_path: Path) -> None:
    records = make_study(tmp_path, seeds=6)
    text = write(records, tmp_path / "report.html").read_text(encoding="utf-8")
    lines = {line.variant: line for line in build_leaderboard(records, baseline="stock")}
    for name, verdict, sign in (("dyrelu_b", "better", 1), ("hardswish", "worse", -1)):
        seen = lines[name].comparison
        assert seen is not None
        assert seen.verdict == verdict
        low, high = sorted((sign * seen.low, sign * seen.high))
        assert f"{name} is {verdict} than stock by {sign * seen.difference:.3f} ({low:.3f} to {high:.3f})." in text
    assert f"{lines['stock'].summary.mean:.3f} ± {lines['stock'].summary.deviation:.3f}" in text


@pytest.mark.integration
def test_headings_sort_by_number_and_by_name(opened: Watched) -> None:
    columns = opened.page.locator("#leaderboard thead button").all_inner_texts()
    for title in ("mAP50-95", "parameters", "difference to baseline"):
        head = opened.page.locator("#leaderboard").get_by_role("columnheader", name=title, exact=True)
        index = columns.index(title)
        orders = []
        for _ in range(2):
            head.get_by_role("button").focus()
            opened.page.keyboard.press("Enter")
            texts = opened.column("leaderboard", index)
            known = [text for text in texts if not text.startswith("–")]
            assert texts[: len(known)] == known  # unknown ones come last, either way
            values = [float(re.split(r"[ \n]", text)[0].replace(",", "").replace("−", "-")) for text in known]
            orders.append((head.get_attribute("aria-sort"), values))
        assert [order for order, _ in orders] == ["descending", "ascending"]
        assert orders[0][1] == sorted(values, reverse=True)
        assert orders[1][1] == sorted(values)
    opened.page.locator("#leaderboard thead button").first.click()
    assert opened.column("leaderboard", 0) == sorted(GAINS)
    assert opened.page.locator("#leaderboard [aria-sort$=ending]").count() == 1


@pytest.mark.integration
def test_hovering_tells_the_variant(opened: Watched) -> None:
    for chart, axis in (("difference-0", "difference"), ("costs-0", "latency"), ("costs-1", "parameters")):
        opened.page.locator(f"#{chart}").scroll_into_view_if_needed()
        index = opened.page.locator(f"#{chart}").evaluate(
            "div => div.data.findIndex(trace => (trace.hovertext || []).join().includes('dyrelu_b'))"
        )
        point = opened.page.locator(f"#{chart} .scatterlayer .trace").nth(index).locator(".points path").first
        box = point.bounding_box()
        opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        label = opened.page.locator(f"#{chart} .hoverlayer .hovertext")
        label.first.wait_for()
        text = label.first.text_content()
        assert "dyrelu_b" in text, axis
        assert ("seed" in text) if axis == "difference" else (axis in text)


@pytest.mark.integration
def test_a_legend_hides_and_shows(opened: Watched) -> None:
    button = opened.page.locator("#curves-0").locator("xpath=..").get_by_role("button", name="mish")
    button.click()
    assert opened.count("#curves-0 .scatterlayer .trace") == 8
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert opened.count("#curves-0 .scatterlayer .trace") == 10


@pytest.mark.integration
def test_charts_follow_the_colour_scheme(opened: Watched) -> None:
    lines = "#curves-0 .scatterlayer .js-line[style*='2px']"
    light = opened.colour(lines)
    opened.page.emulate_media(color_scheme="dark")
    opened.wait(lambda: opened.colour(lines) != light)
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 64
    opened.page.emulate_media(color_scheme="light")
    opened.wait(lambda: opened.colour(lines) == light)


@pytest.mark.integration
def test_a_variant_has_one_colour_in_all_charts(opened: Watched) -> None:
    colours = opened.page.locator(".chart").evaluate_all(
        """divs => divs.flatMap(div => div.data)
            .filter(trace => trace.meta === "arelu")
            .map(({fillcolor, line, marker}) => fillcolor || (line || marker.line || marker).color)"""
    )
    assert len(colours) == 10
    assert len(set(colours)) == 1


@pytest.mark.integration
def test_print_is_light_and_hides_nothing(opened: Watched) -> None:
    page = opened.page
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 less its margins
    page.emulate_media(media="print", color_scheme="dark")
    opened.wait(lambda: opened.width("#difference-0 .main-svg") == 680)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for box in [page.locator("html"), *page.locator(".scroll").all()]:
        width, room, height, shown = box.evaluate("b => [b.scrollWidth, b.clientWidth, b.scrollHeight, b.clientHeight]")
        assert width <= room
        assert box.evaluate("b => b.tagName") == "HTML" or height <= shown
    widths = page.locator(".chart").evaluate_all(
        "all => all.map(div => [div.querySelector('.main-svg').clientWidth, div.clientWidth])"
    )
    assert all(chart <= room for chart, room in widths)
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="screen", color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})
    opened.wait(lambda: opened.width("#difference-0 .main-svg") > 1000)  # grows back


@pytest.mark.integration
def test_a_phone_never_scrolls_sideways(browser: Any, study: Path) -> None:
    watched = Watched(browser, study, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    inner, outer = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert inner <= outer == 360
    wide = watched.page.locator("#leaderboard").evaluate("table => table.parentElement.scrollWidth")
    assert wide > 360  # in its own box
    charts = watched.page.locator(".chart .main-svg").evaluate_all("all => all.map(svg => svg.clientWidth)")
    assert max(charts) <= 360
    watched.close()


@pytest.mark.integration
def test_a_page_opened_on_paper_shows_whole_charts(browser: Any, study: Path) -> None:
    watched = Watched(browser, study, viewport={"width": 688, "height": 1000})
    watched.page.emulate_media(media="print")
    watched.page.reload()
    heights = watched.page.locator(".chart").evaluate_all(
        "all => all.map(div => [div.querySelector('.main-svg').clientHeight, div.clientHeight])"
    )
    assert all(chart == room for chart, room in heights)
    watched.close()


HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.mark.integration
def test_text_from_files_stays_text(browser: Any, tmp_path: Path) -> None:
    names = {
        "stock": 0.0,
        HOSTILE: 0.01,
        '<a href="https://evil.example">x</a>%{y}{{ 7 * 7 }}': 0.02,
        "$\\alpha$ & c1": 0,
    }
    records = make_study(tmp_path, names)
    hostile = {"reason": HOSTILE, "command": HOSTILE, "arguments": {HOSTILE: HOSTILE, "data": HOSTILE}}
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["classes"] = {HOSTILE: 0.5, "WBC": 0.6}
    records = [dataclasses.replace(record, **hostile) for record in records]
    write_shapes(records[3].folder / "activations.json", random.Random(0))
    shapes = json.loads((records[3].folder / "activations.json").read_text())
    shapes["sites"][0]["name"] = HOSTILE
    (records[3].folder / "activations.json").write_text(json.dumps(shapes))
    path = write(records, tmp_path / "report.html", title=HOSTILE, latency_note=HOSTILE)
    watched = Watched(browser, path)
    assert watched.page.title() == HOSTILE
    assert watched.count("img") == watched.count("a") == 0
    assert watched.count("script") == 3
    assert HOSTILE in watched.column("leaderboard", 0)
    assert sorted(watched.column("leaderboard", 0)) == sorted(names)
    ticks = watched.page.locator("#difference-0 .ytick").all_text_contents()
    assert any(tick.startswith("</script><script>") for tick in ticks)
    watched.page.locator("#costs-1").scroll_into_view_if_needed()
    for point in watched.page.locator("#costs-1 .points path").all():
        box = point.bounding_box()
        watched.page.mouse.move(box["x"] + 5, box["y"] + 5)
        watched.page.locator("#costs-1 .hovertext").first.wait_for()
    assert watched.count("a") == watched.count("img") == 0
    watched.close()


def test_the_markup_names_no_address(study: Path) -> None:
    text = study.read_text(encoding="utf-8")
    before, rest = text.split('<script type="application/json"', 1)
    data, _, ours = rest.split("</script>", 3)[0], None, text.rsplit("<script>", 1)[1]
    for part in (before, data, ours):
        assert not re.search(r"https?:|//\w|\bsrc=|@import|url\(", part)


@pytest.mark.integration
def test_more_than_twelve_variants_and_what_is_left_out(browser: Any, tmp_path: Path) -> None:
    gains = {"stock": 0.0} | {f"act{index}": 0.01 * index for index in range(16)}
    watched = Watched(browser, write(make_study(tmp_path, gains, seeds=2), tmp_path / "report.html", latencies={}))
    text = watched.page.locator("main").inner_text()
    assert "the 12 best variants and the baselines of these; 4 more are in the tables only" in text
    assert "Left out: no latency known" in text
    assert watched.count("#leaderboard tbody tr") == 17
    legend = watched.page.locator("#costs-1").locator("xpath=..").locator(".legend button").all_inner_texts()
    assert sorted(legend) == sorted(["stock", *(f"act{index}" for index in range(4, 16))])
    assert watched.count("#costs-1 .points path") == 13 * 3  # a mean and two runs of each
    watched.close()


@pytest.mark.integration
def test_one_seed_has_no_intervals(browser: Any, tmp_path: Path) -> None:
    watched = Watched(browser, write(make_study(tmp_path, seeds=1), tmp_path / "report.html"))
    assert "Nothing to judge by for" in watched.page.locator(".summary").inner_text()
    assert "nan" not in watched.page.locator("body").inner_text().lower().split()
    assert watched.count("#difference-0 .errorbar") == watched.count("#costs-0 .errorbar") == 0
    assert watched.count("#difference-0 .points path") == 8
    assert watched.count("#curves-0 .scatterlayer .trace") == 5  # no bands
    watched.close()


@pytest.mark.integration
@pytest.mark.parametrize("state", ["none", "failed", "no baseline", "nan"])
def test_poor_studies_have_a_page_too(browser: Any, tmp_path: Path, state: str) -> None:
    records = make_study(tmp_path, {"arelu": 0.0, "mish": 0.01} if state == "no baseline" else GAINS)
    if state == "none":
        records = []
    if state == "failed":
        records = [
            dataclasses.replace(each, state="failed", scores={}, classes={}, reason="killed") for each in records
        ]
    if state == "nan":
        nan = {"classes": {"WBC": math.nan}, "seconds_per_epoch": math.nan, "gflops_640": math.nan}
        records = [dataclasses.replace(each, **nan) for each in records]
        (records[0].folder / "results.csv").write_text(
            "epoch,train/loss,metrics/mAP50-95(B)\n1,nan,0.1\n2,inf,0.2\n3,1"
        )
        (records[6].folder / "activations.json").write_text(
            '{"x": [0, 1], "sites": [{"name": "0.act", "activation": "dyrelu_b", "before": [0, NaN], "after": [1, 2]}]}'
        )
    watched = Watched(browser, write(records, tmp_path / "report.html"))
    assert watched.page.locator("h2").all_inner_texts()[-1] == "How to read this"
    drawn = watched.page.locator(".js-plotly-plot").evaluate_all("all => all.map(div => div.id)")
    expected = {
        "none": [],
        "failed": [],
        "no baseline": ["costs-0", "costs-1", "curves-0", "curves-1", "classes-0", "shapes-0"],
        "nan": ["difference-0", "costs-0", "costs-1", "curves-0", "curves-1", "shapes-0", "shapes-1"],
    }
    assert drawn == expected[state]
    assert watched.count("figcaption") >= 6 - (state == "none")
    watched.close()


@pytest.mark.integration
def test_classification_is_drawn_from_its_own_columns(browser: Any, tmp_path: Path) -> None:
    records = []
    for record in make_study(tmp_path):
        results = "epoch,train/loss,metrics/accuracy_top1,metrics/accuracy_top5\n1,0.9,0.25,0.7\n2,0.8,0.5,0.9\n"
        (record.folder / "results.csv").write_text(results)
        scores = {"top1": record.scores["mAP50-95"], "top5": 0.9}
        records.append(dataclasses.replace(record, scores=scores, classes={}))
    watched = Watched(browser, write(records, tmp_path / "report.html", metric="top1"))
    lines = watched.page.locator("#curves-0").evaluate("div => div.data.filter(t => t.line.color).map(t => [t.x, t.y])")
    assert lines == [[[1, 2], [0.25, 0.5]]] * 5
    assert "top5" in watched.page.locator("#leaderboard thead").inner_text()
    watched.close()


def draw(records: Sequence[RunRecord], cost: Cost = LATENCY) -> tuple[Figure, Figure, Figure]:
    """Return the charts of score against cost, of classes and of differences."""
    rows = build_leaderboard(records, baseline="stock", latencies=LATENCIES)
    runs = {row.variant: [record for record in records if record.variant == row.variant] for row in rows}
    styles = assign_styles(rows)
    return (
        draw_cost(rows, runs, styles, "mAP50-95", cost),
        draw_classes(rows, runs, styles),
        draw_differences(rows, runs, styles, "mAP50-95"),
    )


def make_scores(scores: dict[str, list[float]]) -> list[RunRecord]:
    """Return finished runs with given scores, which are those of their only class, too."""
    return [
        make_run(Path("none"), name, 0, seed, False, scores={"mAP50-95": score}, classes={"RBC": score})
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]


FIVE = [0.50, 0.51, 0.52, 0.53, 0.54]


def test_few_runs_are_drawn_as_points_and_many_as_an_interval() -> None:
    cost, classes, _ = draw(make_scores({"stock": FIVE, "arelu": [0.1, 0.9], "mish": [0.6]}))
    for figure, axis in ((cost, "y"), (classes, "x")):
        drawn = [
            (trace["meta"], list(trace[axis]), f"error_{axis}" in trace) for trace in figure.traces if "meta" in trace
        ]
        single = ("arelu", [0.1, 0.9], False)
        assert single in drawn
        drawn.remove(single)
        assert {(name, round(value, 9), interval) for name, (value,), interval in drawn} == {
            ("stock", 0.52, True),
            ("arelu", 0.5, False),
            ("mish", 0.6, False),
        }
        said = "with its 95 % interval; single runs as small dots where there are fewer than 5"
        assert said in figure.text
    assert "Mean over seeds, with its 95 % interval. Filled" in draw(make_scores({"stock": FIVE}))[0].text
    assert "Mean over seeds, single runs as small dots. Filled" in draw(make_scores({"stock": FIVE[:4]}))[0].text
    assert draw(make_scores({"stock": FIVE[:1]}))[0].text.startswith("One run of each variant. Filled")


@pytest.mark.parametrize("gains", [[0.05, 0.15], [0.05, 0.05, 0.15, 0.15, 0.4]])
def test_intervals_of_few_pairs_do_not_set_the_axis(gains: list[float]) -> None:
    scores = {"stock": FIVE[: len(gains)], "arelu": [a + b for a, b in zip(FIVE, gains, strict=False)]}
    figure = draw(make_scores(scores))[2]
    start, end = figure.layout["xaxis"]["range"]
    (mean,) = [trace for trace in figure.traces if "error_x" in trace]
    low, high = mean["x"][0] - mean["error_x"]["arrayminus"][0], mean["x"][0] + mean["error_x"]["array"][0]
    if len(gains) == 2:  # -0.54 to 0.74; the axis is three times 0 to 0.15, and 5 % at each end
        assert (start, end) == (pytest.approx(-0.15 - 0.0225), pytest.approx(0.3 + 0.0225))
        assert (low, high) == (pytest.approx(-0.535, abs=0.001), pytest.approx(0.735, abs=0.001))
    else:
        assert start < low < 0 < high < end
    assert figure.text.endswith("go on beyond it.") == (len(gains) == 2)


STAIRS = {"stock": 0.0, "hardswish": -0.03, "dyrelu_b": 0.03, "mish": -0.001}


def test_the_front_is_a_line_and_marks_say_who_is_on_it() -> None:
    figure = draw(make_study(Path("none"), STAIRS, seeds=6, files=False))[0]
    line, *_ = figure.traces
    means = {trace["meta"]: trace for trace in figure.traces if "meta" in trace}
    # 6.85, 6.9 and 6.95 ms are equal: the best of these is on the front.
    best, slow = means["stock"], means["dyrelu_b"]
    assert (line["mode"], line["line"]["shape"], line["y"]) == ("lines", "hv", [best["y"][0], slow["y"][0]])
    assert line["x"] == [best["x"][0], slow["x"][0]]
    marks = {name: (trace["marker"]["symbol"], trace["marker"]["color"]) for name, trace in means.items()}
    assert marks == {
        "stock": ("square", "c0"),
        "dyrelu_b": ("circle", "c1"),
        "mish": ("circle", "paper"),
        "hardswish": ("circle-x", "paper"),
    }
    assert "6 runs, tied with the front" in means["mish"]["hovertext"][0]
    assert "Costs that differ by 2 % or less count as equal." in figure.text
    assert [text.split(" (")[0] for text in figure.notes[:3]] == [
        "On the front: stock and dyrelu_b.",
        "Tied with it: mish",
        "Dominated: hardswish",
    ]
    equal = draw(make_study(Path("none"), {"stock": 0.0, "mish": -0.001}, files=False), PARAMETERS)[0]
    assert all(trace["mode"] == "markers" for trace in equal.traces)  # a single variant on the front is no line
    assert "Variants of equal cost stand side by side." in equal.text


def test_bars_of_the_leaderboard_have_runs_or_an_interval(tmp_path: Path) -> None:
    scores = {"stock": FIVE, "arelu": [0.4, 0.6], "mish": [0.5]}
    text = write(make_scores(scores), tmp_path / "report.html", latencies={}).read_text(encoding="utf-8")
    bars = re.findall(r'<span class="bar" aria-hidden="true">(.*?<b style="left:[^"]*"></b>)</span>', text)
    places = [re.findall(r"<(i|span|b) style=\"left:([\d.]+)%", bar) for bar in bars]
    # From 0.4 to 0.6: the interval of arelu, -0.77 to 1.77, has no part in it. The best mean comes first.
    assert places[0][0][0] == "i"
    assert [each for each in places if each[0][0] == "span"] == [
        [("span", "0.0"), ("span", "100.0"), ("b", "50.0")],
        [("span", "50.0"), ("b", "50.0")],
    ]
    assert "Circles: the single runs, where there are fewer than 5." in text


MANY = {"stock": 0.0, "dyrelu_c@backbone, gelu@neck": 0.02} | {f"act{index}": 0.005 * index for index in range(8)}


@pytest.mark.integration
@pytest.mark.parametrize("seeds", [1, 2, 6])
def test_no_column_is_clipped_and_charts_stand_side_by_side(browser: Any, tmp_path: Path, seeds: int) -> None:
    latencies = {name: 5 + 0.3 * index for index, name in enumerate(MANY)}
    path = write(make_study(tmp_path, MANY, seeds=seeds), tmp_path / "report.html", latencies=latencies)
    watched = Watched(browser, path)
    for box in watched.page.locator(".scroll").all():
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0
    left, right = (watched.page.locator(f"#costs-{index}").bounding_box() for index in range(2))
    assert (left["y"], left["height"]) == (right["y"], right["height"])
    note = watched.page.locator("#costs-0").locator("xpath=..").locator(".note")
    assert note.bounding_box()["y"] >= left["y"] + left["height"]
    assert note.inner_text().startswith("On the front: ")
    assert ("One run each cannot tell scores apart" in note.inner_text()) == (seeds == 1)
    watched.close()


def test_the_folders_of_variants_not_drawn_are_not_read(tmp_path: Path) -> None:
    gains = {"stock": 0.0} | {f"act{index}": 0.001 * index for index in range(400)}
    records = make_study(tmp_path / "none", gains, seeds=5, files=False)
    text = write(records, tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<tr>") == 2 + 401 + 2005
    assert "388 more are in the tables only" in text
