"""Reports: SVG, HTML and folders, with equal bytes for equal runs."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from chatstream.errors import ConfigError
from chatstream.simulation import WORKLOADS, EngineModel, measure, report
from tests.simulation.builders import run

ENGINE = EngineModel()
CALLS = WORKLOADS["conv"].calls_at_load(1.5, ENGINE, 2, seed=1, duration_s=600)


@pytest.fixture(scope="module")
def written() -> report.Report:
    simulation = {"sample_every_s": 10.0, "records_eta": True, "is_exact": True}
    results = []
    for slots in (2, 3):
        result = run(CALLS, max_concurrency=slots, max_queue_size=20, simulation=simulation)
        figures = measure(result, ttft_slo_s=30.0, engine=ENGINE, num_slots=slots)
        results.append(report.Result(label=f"{slots} <slots>", run=result, figures=figures))
    rows = [["", "2 slots", "3 slots"], ["good & quick", "10 %", "20 %"]]
    return report.Report(title="conv < code", rows=rows, results=results, ttft_slo_s=30.0, figures={"good": 1})


def titles(svg: str) -> set[str]:
    return {element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_one_file_has_all_charts(written: report.Report, tmp_path: Path) -> None:
    report.write(written, tmp_path / "all.svg")
    found = titles((tmp_path / "all.svg").read_text(encoding="utf-8"))
    wanted = {"Time to first token", "Queue", "Good service by arrival time", "Estimates on arrival", "SLO"}
    assert wanted <= found
    assert {"2 <slots>", "3 <slots>"} <= found


def test_without_estimates_there_is_no_chart_of_estimates(tmp_path: Path) -> None:
    result = run(CALLS[:50], max_concurrency=2)
    figures = measure(result, ttft_slo_s=30.0, engine=ENGINE, num_slots=2)
    results = [report.Result(label="2", run=result, figures=figures)]
    page = report.Report(title="t", rows=[[""]], results=results, ttft_slo_s=30.0, figures={})
    report.write(page, tmp_path / "all.svg")
    assert "Estimates on arrival" not in titles((tmp_path / "all.svg").read_text(encoding="utf-8"))


def test_a_page_has_the_table_and_the_charts(written: report.Report, tmp_path: Path) -> None:
    report.write(written, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>conv &lt; code</h1>" in page
    assert "<td>good &amp; quick</td><td>10 %</td>" in page
    assert page.count("<svg") == page.count("</svg>") == 5
    assert "<?xml" not in page


def test_a_folder_has_everything(written: report.Report, tmp_path: Path) -> None:
    report.write(written, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"index.html", "figures.json", "time_to_first_token.svg", "queue_over_time.svg"} <= names
    assert json.loads((tmp_path / "report/figures.json").read_text(encoding="utf-8")) == {"good": 1}


def test_the_same_run_gives_the_same_bytes(written: report.Report, tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        report.write(written, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_an_unwritable_path_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere" / "x.svg", tmp_path / "file"):
        with pytest.raises(ConfigError) as caught:
            report.check_can_write(path)
        assert caught.value.param == "report"
    report.check_can_write(tmp_path / "x.html")
    report.check_can_write(tmp_path / "new" / "folder")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"openchatstream\[report\]"):
        report.check_can_write(tmp_path / "x.svg")
