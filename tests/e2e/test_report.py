"""`ashlar zoo report --html` in a real Chromium: what it shows of the demo zoo, to eyes and to the keyboard, and that nothing leaves it or gets in."""

import shutil

import browser
import pytest
import servers

HOSTILE_LICENCE = "</script><script>document.title = 'taken'</script><!-- &quot;"
HOSTILE_SOURCE = "<img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def page(zoo, tmp_path_factory):
    """The report of the demo zoo and one model whose card and folder are hostile, open in a browser; and the models' names."""
    if browser.program() is None:
        pytest.skip("there is no Chromium")
    folder, models = zoo
    scratch = tmp_path_factory.mktemp("report")
    copy = scratch / "zoo"
    shutil.copytree(folder, copy)
    hostile = scratch / HOSTILE_SOURCE
    shutil.copytree(servers.DEMO / "math-lora", hostile)
    (hostile / "README.md").write_text(f"---\nlicense: {HOSTILE_LICENCE}\n---\n")
    added = servers.ashlar("zoo", "add", hostile, "--name", "other/hostile", "--zoo", copy)
    assert added.returncode == 0, added.stderr
    file = scratch / "report.html"
    done = servers.ashlar("zoo", "report", "--zoo", copy, "--html", file, "--compare", "demo/base", "demo/math-lora")
    assert done.returncode == 0, done.stderr
    opened = browser.Browser(scratch / "profile")
    try:
        opened.open(file)
        yield opened, [*models, "other/hostile"], file
    finally:
        opened.close()


def texts(page: browser.Browser, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map((one) => one.innerText)")


def details(page: browser.Browser) -> str:
    return page.evaluate("document.getElementById('details').innerText")


def focus(page: browser.Browser, block: str, model: str):
    """Goes to the cell of a model's row whose label begins so."""
    assert page.evaluate(
        f"""(() => {{
            const row = [...document.querySelectorAll('.map tbody tr')].find((row) => row.firstChild.innerText.startsWith({model!r}));
            const cell = [...row.querySelectorAll('td')].find((cell) => cell.getAttribute('aria-label').startsWith({block!r}));
            cell.focus();
            return document.activeElement === cell;
        }})()"""
    )


def lit_rows(page: browser.Browser) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('td.lit')].map((cell) => cell.parentElement.firstChild.innerText)")


def test_every_model_is_on_the_map_and_has_its_costs(page):
    page, models, _ = page
    rows = texts(page, ".map tbody th")
    # The hostile one is math-lora's chain by another name, yet with another card: equal blocks are one row.
    assert "demo/math-lora and 1 more" in rows
    assert sorted(row.removesuffix(" and 1 more") for row in rows) == sorted(set(models) - {"other/hostile"})
    costs = texts(page, ".costs[aria-label='Costs of models'] tbody th")
    assert sorted(text.split("\n")[0] for text in costs) == sorted(models)
    assert [text.split()[0] for text in texts(page, ".costs[aria-label='Costs of tenants'] tbody th")] == ["demo", "other"]
    assert "9 models of 2 tenants" in texts(page, "main")[0]


def test_focus_lights_all_who_share_a_block(page):
    page, models, _ = page
    focus(page, "embed", "demo/base")
    # All but the one that was trained whole.
    sharers = {"demo/japanese-full"} ^ set(models) - {"other/hostile"}
    assert {row.removesuffix(" and 1 more") for row in lit_rows(page)} == sharers
    told = details(page)
    assert "8 models: demo/assistant-top, demo/banking-bias" in told and "other/hostile" in told and "bf16" in told, told
    focus(page, "attention 0", "demo/japanese-full")
    assert lit_rows(page) == ["demo/japanese-full"]
    assert "nobody" in details(page)
    focus(page, "attention 7", "demo/names-lora")
    assert "adapter over it" in details(page)


def test_arrow_keys_go_from_block_to_block(page):
    page, _, _ = page
    focus(page, "embed", "demo/base")
    for key, label in [("ArrowRight", "attention 0"), ("ArrowRight", "feed-forward 0"), ("End", "head"), ("ArrowRight", "head"), ("Home", "embed")]:
        page.press(key)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(f"{label}:"), key
    row = page.evaluate("document.activeElement.parentElement.firstChild.innerText")
    page.press("ArrowDown")
    assert page.evaluate("document.activeElement.parentElement.firstChild.innerText") != row
    grid = "document.activeElement.closest('table')?.getAttribute('aria-label')"
    before = page.evaluate(grid)
    page.press("Tab")
    assert page.evaluate(grid) != before, "a grid is one stop of the tab key"


def test_pointing_lights_like_focus(page):
    page, _, _ = page
    x, y = page.evaluate(
        """(() => {
            const cell = document.querySelector(".map td.own");
            cell.scrollIntoView({ block: 'center' });
            const box = cell.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
    )
    page.point(x, y)
    assert page.evaluate("[...document.querySelectorAll('td.lit')].length") == 1


def test_names_are_found_and_costs_sorted(page):
    page, _, _ = page
    search = "((name) => { const box = document.getElementById('find'); box.value = name; box.dispatchEvent(new Event('input')); })"
    page.evaluate(f"{search}('LORA')")
    assert texts(page, ".map tbody th") == ["demo/names-lora", "demo/math-lora and 1 more"]
    page.evaluate(f"{search}('')")
    page.evaluate("document.querySelectorAll('.costs thead button')[3].click()")
    assert texts(page, ".costs tbody th")[0].startswith("demo/japanese-full"), "it has most of its own"
    assert page.evaluate("document.querySelectorAll('.costs thead th')[3].getAttribute('aria-sort')") == "descending"


def test_heat_map_tells_what_training_changed(page):
    page, _, _ = page
    labels = page.evaluate("[...document.querySelectorAll('td.heat')].map((cell) => cell.getAttribute('aria-label'))")
    changed = [label.split(":")[0] for label in labels if not label.endswith("the same tensor")]
    assert sorted(changed) == sorted(f"attention {layer} {role}" for layer in range(4, 8) for role in "qv"), "LoRA that was merged"
    page.evaluate("document.querySelector('td.heat.compared').focus()")
    told = details(page)
    assert "difference" in told and "equal elements" in told and "cosine" in told, told


def test_what_a_zoo_says_is_text(page):
    page, _, _ = page
    costs = "\n".join(texts(page, ".costs tbody th"))
    assert HOSTILE_LICENCE in costs and HOSTILE_SOURCE in costs
    assert page.evaluate("document.title") == "Zoo report"
    assert page.evaluate("document.scripts.length") == 2 and page.evaluate("document.images.length") == 0


def test_page_asks_for_nothing_and_complains_of_nothing(page):
    page, _, file = page
    assert page.complaints == []
    assert page.requests == [file.resolve().as_uri()]
    # The policy holds: what were in the page could reach nothing.
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    page.call("Runtime.evaluate", expression="0")
    assert page.requests == [file.resolve().as_uri()]
    assert any("Content Security Policy" in str(complaint) for complaint in page.complaints)
