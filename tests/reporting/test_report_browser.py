"""The report in a real browser. Skipped where chromium is not installed (Debian: chromium)."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import write_metrics

from reporting.report_page import report_page
from reporting.run_curves import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# Looks at the page as a user would, and leaves what it saw in the attribute data-seen.
PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const seen = { ms: performance.now(), requests: performance.getEntriesByType("resource").length };
  const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
  const at = (type, part) => svg.dispatchEvent(new PointerEvent(type, { bubbles: true, button: 0,
    clientX: box.left + MARGIN.left + part * (figures[0].view.width - MARGIN.left - MARGIN.right), clientY: box.top + 50 }));
  seen.back = getComputedStyle(document.body).backgroundColor;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.marks = [...svg.querySelectorAll("text")].map((t) => t.textContent);
  if (figures[0].view) {
    at("pointermove", 1);
    seen.tip = document.querySelector(".tip").textContent;
    at("pointerdown", 0.5); at("pointermove", 0.75); at("pointerup", 0.75);
    seen.zoom = [figures[0].view.x0, figures[1].view.x1];
    seen.hash = location.hash;
    document.getElementById("reset").click();
    seen.reset = [figures[0].view.x0, figures[0].view.x1];
    const run = document.querySelector("[data-run='0']");
    if (run) {
      run.click();
      at("pointermove", 1);
      seen.without = document.querySelector(".tip").textContent;
      run.click();
    }
    const log = document.getElementById("log"), x = document.getElementById("x");
    log.click();
    x.value = "tokens"; x.dispatchEvent(new Event("change"));
    seen.tokens = figures[0].view.x1;
    seen.state = location.hash;
  }
  document.body.dataset.seen = JSON.stringify(seen);
}, 200));
</script>
"""


def look(folder, runs, size=(1600, 1200), dark=False):
    """What the probe saw on the page of these runs, what stood on the console, and the page."""
    page = report_page(runs)
    (folder / "page.html").write_text(page + PROBE)
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={folder}/profile", f"--window-size={size[0]},{size[1]}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=4000", "--dump-dom", f"file://{folder}/page.html",
        ],
        capture_output=True, text=True, timeout=80,
    )  # fmt: skip
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    console = [x for x in done.stderr.splitlines() if "CONSOLE" in x]
    assert seen, done.stderr[-2000:]
    return json.loads(seen[1].replace("&quot;", '"').replace("&amp;", "&")), console, page


@pytest.mark.parametrize("size", [(400, 900), (1600, 1200)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_charts_show_the_numbers_of_the_metrics(tmp_path, size, dark, count):
    runs = [read_run(write_metrics(tmp_path / f"r{i}.jsonl", lr=i)) for i in range(count)]
    seen, console, _ = look(tmp_path, runs, size, dark)
    assert console == [] and seen["requests"] == 0 and seen["overflow"] == 0
    assert seen["back"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    loss, mean = runs[0].train["train_loss"][-1], runs[0].train["smoothed"][-1]
    for value in (loss, mean, runs[0].evals["val_loss"][-1]):
        assert f" {value:.6g} " in seen["tip"].replace("at", " at"), seen["tip"]
    assert seen["tip"].count("at 50") == 3 * count
    assert seen["zoom"] == pytest.approx([25.5, 37.75]) and "from=25.5&to=37.75" in seen["hash"]
    assert seen["reset"] == [1, 50] and seen["tokens"] == 3000
    assert ("without" in seen) == (count > 1)
    assert "r0, " not in seen.get("without", "") and seen.get("without", "r1, ").count("r1, ") > 0
    assert seen["state"] == "#x=tokens&log=1"


def test_a_run_without_records_has_a_page(tmp_path):
    path = write_metrics(tmp_path / "a.jsonl", steps=0)
    seen, console, _ = look(tmp_path, [read_run(path)])
    assert console == [] and seen["marks"] == ["nothing to show yet"]


def test_a_hundred_thousand_records_make_a_small_page_that_is_soon_there(tmp_path):
    run = read_run(write_metrics(tmp_path / "a.jsonl", steps=100_000))
    seen, console, page = look(tmp_path, [run])
    assert console == [] and len(page.encode()) < 3_000_000
    print(f"{len(page.encode()):,} bytes, {seen['ms']:.0f} ms until all was drawn")
    assert seen["ms"] < 10_000  # 2 s on an idle machine; no test is of speed
    assert f" {run.train['smoothed'][-1]:.6g} at 100,000" in seen["tip"]
    five, _, page = look(tmp_path, [run] * 5)
    assert len(page.encode()) < 3_000_000 and five["tip"].count("at 100,000") == 15
